"""`enable_cuda_graph`: a model's forward recorded once for each shape of its inputs and replayed in one launch.

A forward of Flux is some 2500 launches. Where the GPU is done before the processor has made them, at small pictures,
replaying takes what the GPU alone needs. What is replayed gave the same bits as the forward when it was recorded.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only

from .capture import capture
from .matmul import Workspace

log = logging.getLogger("gguf_native")

PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None))
# Values of tensors in RAM are part of what identifies a call; larger ones are no mere numbers.
MOST_VALUES = 1024
# Recording takes about as long as one and a half forwards; with fewer left it is not begun.
LEAST_REPLAYS = 6
# A GPU that needs less than this share of the processor's time after it was waiting for it during the forward. Launches
# queue up: where the GPU sets the pace, some thousand are left, which is more.
SHARE_OF_LAG = 0.25
# Of the forward's time, above which replaying is not worth its memory.
WORTHWHILE = 0.95


class NotPlainError(TypeError):
    """A call has something that is neither a tensor nor a plain value: it may do anything at each step."""


@dataclass
class Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: object
    weights: object  # what `held_weights` gave


class ForwardGraphs:
    """The recordings of one model's forward, made and replayed in place of it.

    why_not(x, options): why nothing may be recorded now, or None. held_weights(): a context in which all weights stay
    where they are; gives what tells them from any that take their place.
    """

    def __init__(
        self,
        workspace: Workspace,
        why_not: Callable[[torch.Tensor, dict], str | None],
        held_weights: Callable[[], AbstractContextManager],
    ):
        self.workspace, self.why_not, self.held_weights = workspace, why_not, held_weights
        self.useless: set[Hashable] = set()
        self.said: set[str] = set()
        self.recordings: dict[Hashable, Recording] = {}
        self.reset()

    def reset(self) -> None:
        """Give the memory back: after sampling, and whenever a weight, a LoRA or a cached value moves."""
        if self.recordings:
            # The last replay may be under way.
            torch.cuda.synchronize()
        self.recordings = {}
        self.seen: Counter[Hashable] = Counter()

    def give_up(self) -> bool:
        """Give the memory of what is recorded back, not to record it again; whether there was any."""
        had_any = bool(self.recordings)
        if had_any:
            self.useless |= self.recordings.keys()
            self.reset()
            self._say("off: another forward needs the memory")
        return had_any

    def forward(self, run: Callable, args: tuple, kwargs: dict, options: dict):
        """What run(*args, **kwargs) gives. options: the host's `transformer_options`, which is among them."""
        tensors: list[torch.Tensor] = []
        try:
            key = description((args, kwargs), tensors)
        except NotPlainError as error:
            self._say(f"off: {error}")
            return run(*args, **kwargs)
        if key in self.recordings and (output := self._replay(self.recordings[key], tensors)) is not None:
            return output
        self.seen[key] += 1
        # The first forward compiles and chooses, the second shows how long one takes.
        if self.seen[key] != 2 or key in self.useless or n_steps(options) - 2 < LEAST_REPLAYS:
            return run(*args, **kwargs)
        return self._record(key, run, args, kwargs, tensors, options)

    def _replay(self, recording: Recording, tensors: list[torch.Tensor]):
        """The forward's output, or None if weights are no longer where they were."""
        with self.held_weights() as weights:
            if weights == recording.weights:
                torch._foreach_copy_(recording.inputs, tensors)
                recording.graph.replay()
                return tree_map_only(torch.Tensor, torch.clone, recording.output)
        self.reset()
        self._say("off for now: weights have left the GPU")
        return None

    def _record(self, key: Hashable, run: Callable, args: tuple, kwargs: dict, tensors: list, options: dict):
        """The forward's output; if it pays, the next ones of this key are replayed."""
        # Before the forward, which may change what it is given.
        inputs = [tensor.clone() for tensor in tensors]
        again = rebuilt((args, kwargs), iter(inputs))
        start, end, replayed, ended = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        # What is queued already, such as replays at another size, is not this forward's.
        torch.cuda.synchronize()
        began = time.perf_counter()
        start.record()
        output = run(*args, **kwargs)
        end.record()
        if not done_within(end, SHARE_OF_LAG * (time.perf_counter() - began)):
            return self._refuse(key, "off at this size: the GPU, not the processor, sets the pace", output)
        if reason := self.why_not(tensors[0], options):
            self._say(f"off: {reason}")
            return output
        # Of what torch holds free for other forwards a recording can take nothing.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        with self.held_weights() as weights:
            try:
                recording = self._recorded(run, again, inputs, weights)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                return self._refuse(key, f"off: this model's forward cannot be recorded ({why})", output)
            replayed.record()
            recording.graph.replay()
            ended.record()
        if not all(map(torch.equal, tensors_of(output), tensors_of(recording.output))):
            return self._refuse(key, "off: replaying did not give the forward's very values", output)
        usual, replay = start.elapsed_time(end), replayed.elapsed_time(ended)
        if replay > WORTHWHILE * usual:
            return self._refuse(key, f"off at this size: {replay:.0f} ms in place of {usual:.0f} do not pay", output)
        self.recordings[key] = recording
        megabytes = max(0, free - torch.cuda.mem_get_info()[0]) / 2**20
        self._say(f"a forward takes {replay:.0f} ms in place of {usual:.0f}, for {megabytes:.0f} MB")
        return output

    def _recorded(self, run: Callable, again: tuple, inputs: list, weights: object) -> Recording:
        args, kwargs = again
        # What is apart goes while it still records: CUDA's asynchronous allocator knows it only there.
        with capture() as graph, self.workspace.apart():
            output = run(*args, **kwargs)
        return Recording(graph, inputs, output, weights)

    def _refuse(self, key: Hashable, what: str, output):
        self.useless.add(key)
        self._say(what)
        return output

    def _say(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            log.info("GGUF Native: enable_cuda_graph: %s.", what)


def n_steps(options: dict) -> int:
    """Forwards that a sampling makes at least, by the host's list of noise levels."""
    return len(options.get("sample_sigmas", ())) - 1


def done_within(event: torch.cuda.Event, seconds: float) -> bool:
    limit = time.perf_counter() + seconds
    while not event.query():
        if time.perf_counter() > limit:
            return False
    return True


def description(value: object, tensors: list[torch.Tensor]) -> Hashable:
    """What tells one call from another but the values of tensors on the GPU, which are added to `tensors`."""
    leaves, _ = tree_flatten_with_path(value)
    tensors += [leaf for _, leaf in leaves if is_on_gpu(leaf)]
    return tuple((path, leaf_description(leaf)) for path, leaf in leaves)


def leaf_description(leaf: object) -> Hashable:
    if is_on_gpu(leaf):
        return "tensor", leaf.shape, leaf.dtype
    if isinstance(leaf, torch.Tensor) and leaf.numel() <= MOST_VALUES:
        return "values", leaf.shape, leaf.dtype, tuple(leaf.flatten().tolist())
    if isinstance(leaf, PLAIN):
        return leaf
    raise NotPlainError(f"something of type {type(leaf).__name__} takes part in each step")


def is_on_gpu(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_cuda


def rebuilt(value: object, tensors: Iterator[torch.Tensor]):
    """`value` with its tensors on the GPU replaced, in the order of `description`."""
    return tree_map_only(torch.Tensor, lambda tensor: next(tensors) if tensor.is_cuda else tensor, value)


def tensors_of(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
