"""`quant_cache_size`: decoded weights that a model keeps while it samples, instead of decoding them at every step.

A forward uses each weight once, in a circle, so what was used longest ago is what is needed next: a cache that drops it
never hits. A fixed subset is kept instead, those first whose decoding takes longest for the bytes that they fill.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

log = logging.getLogger("gguf_native")

# Bytes per second of decoding 21504 x 3072 to 16 bits over those of a copy, read and written ones together: H200,
# benchmarks/results/kernels.json.
PACE = {
    "Q4_0": 0.93,
    "Q4_1": 0.92,
    "Q5_0": 0.93,
    "Q5_1": 0.94,
    "Q8_0": 0.91,
    "Q2_K": 0.89,
    "Q3_K": 0.88,
    "Q4_K": 0.90,
    "Q5_K": 0.89,
    "Q6_K": 0.87,
    "IQ1_S": 0.79,
    "IQ1_M": 0.74,
    "IQ2_XXS": 0.85,
    "IQ2_XS": 0.85,
    "IQ2_S": 0.80,
    "IQ3_XXS": 0.85,
    "IQ3_S": 0.83,
    "IQ4_NL": 0.80,
    "IQ4_XS": 0.72,
    "TQ1_0": 0.88,
    "TQ2_0": 0.83,
    "MXFP4": 0.73,
    "NVFP4": 0.78,
}
# A launch takes as long as so many bytes: 5 microseconds at 4.25 TB/s. Small matrices are dear for their bytes.
LAUNCH_BYTES = 21e6

# Weights are taken to stream if some lie at new places after so many forwards, or if so many requests were for new ones
# only: no model has as many weights.
MOST_FORWARDS, MOST_REQUESTS = 3, 5000


class Request(NamedTuple):
    """A weight that a forward had decoded; the reference tells whether its blocks are still the same tensor."""

    blocks: weakref.ref
    type: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def cost_of_a_byte(self) -> float:
        """What decoding takes, in bytes copied, for a byte that it writes."""
        moved = self.blocks().nbytes + self.nbytes()
        return (LAUNCH_BYTES + moved / PACE[self.type]) / self.nbytes()


# What no addition is.
NOTHING = object()


@dataclass
class Kept:
    """Decoded values [shape], once `filled_with` says which addition they have, None being one; `blocks` stay alive so
    that no other tensor can be taken for them.
    """

    blocks: torch.Tensor
    values: torch.Tensor
    filled_with: object = NOTHING


class DecodedCache:
    """Decoded weights of one model, `limit` bytes at most and no more than room(device) says when they are chosen.

    The first forward shows which weights there are; they are chosen when the second one begins. Where weights stream
    nothing is kept, since memory holds three to six times as many packed weights: the streamer says so, and those that
    the host brings are other tensors in each forward.
    """

    def __init__(self, limit: int, room: Callable[[torch.device], int]) -> None:
        self.limit, self.room = limit, room
        self.last_said = ""
        self.reset()

    def reset(self) -> None:
        """Forget all and begin anew: after sampling."""
        self.kept: dict[tuple[int, torch.dtype], Kept] = {}
        self.requests: dict[tuple[int, torch.dtype], Request] = {}
        self.last_request: Request | None = None
        self.forwards, self.is_settled = 0, self.limit == 0

    @property
    def nbytes(self) -> int:
        return sum(kept.values.nbytes for kept in self.kept.values())

    def give_up(self) -> int:
        """Free the memory until sampling ends, and return its bytes."""
        nbytes = self.nbytes
        if nbytes:
            self.kept, self.is_settled = {}, True
        return nbytes

    def keep_no_more(self) -> int:
        """As `give_up`, and nothing is chosen in this sampling either."""
        self.is_settled = True
        return self.give_up()

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Within it nothing is chosen or filled: what a CUDA graph records has not been done, and may never be."""
        state = self.kept, self.is_settled
        self.kept = {key: kept for key, kept in self.kept.items() if kept.filled_with is not NOTHING}
        self.is_settled = True
        try:
            yield
        finally:
            self.kept, self.is_settled = state

    def find(self, blocks: torch.Tensor, type: str, shape: tuple[int, ...], dtype: torch.dtype) -> Kept | None:
        """The memory of a weight that is kept, filled or yet to be, or None for one that is not."""
        key = id(blocks), dtype
        if not self.is_settled:
            self._watch(key, Request(weakref.ref(blocks), type, shape, dtype))
        return self.kept.get(key)

    def _watch(self, key: tuple[int, torch.dtype], request: Request) -> None:
        known, before = self.requests.get(key), self.last_request
        self.last_request = request
        # A layer that measures what to compute with decodes its weight more than once at a time.
        again = before is not None and before.blocks() is request.blocks()
        if known is not None and known.blocks() is request.blocks() and not again:
            self._end_of_forward(request.blocks().device)
        self.requests[key] = request
        if len(self.requests) > MOST_REQUESTS:
            self._keep_nothing()

    def _end_of_forward(self, device: torch.device) -> None:
        self.forwards += 1
        if all(request.blocks() is not None for request in self.requests.values()):
            self._choose(device)
        elif self.forwards == MOST_FORWARDS:
            self._keep_nothing()
        # The first forward after loading has tensors that the later ones have not.
        self.requests = {}

    def weights_stream(self) -> None:
        """Keep nothing in this sampling, nor what is kept already."""
        if self.kept or not self.is_settled:
            self._keep_nothing()

    def _keep_nothing(self) -> None:
        self.kept, self.requests, self.is_settled = {}, {}, True
        self._say("no decoded weight is kept: weights stream, and memory serves them better")

    def _choose(self, device: torch.device) -> None:
        self.is_settled = True
        budget = min(self.limit, self.room(device))
        # Not inference tensors: the model may also run outside inference mode.
        with torch.inference_mode(False):
            for request in dearest(self.requests.values(), budget):
                values = torch.empty(request.shape, dtype=request.dtype, device=device)
                self.kept[id(request.blocks()), request.dtype] = Kept(request.blocks(), values)
        short = f", {max(0, budget) >> 20} MB being free for it" if budget < self.limit else ""
        self._say(
            f"{len(self.kept)} of {len(self.requests)} decoded weights are kept while sampling, "
            f"{self.nbytes / 2**20:.1f} MB{short}"
        )

    def _say(self, what: str) -> None:
        if what != self.last_said:
            self.last_said = what
            log.info("GGUF Native: quant_cache_size: %s.", what)


def dearest(requests: Sequence[Request], budget: int) -> list[Request]:
    """Those that fit the bytes of a budget together, dearest decode per byte first; the first of equals."""
    chosen, left = [], budget
    for request in sorted(requests, key=Request.cost_of_a_byte, reverse=True):
        if request.nbytes() <= left:
            chosen.append(request)
            left -= request.nbytes()
    return chosen
