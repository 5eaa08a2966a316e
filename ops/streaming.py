"""Packed weights that a model reads from its pinned file as its layers need them, sent some layers ahead of their use.

For DynamicVRAM, which says for each weight whether there is GPU memory that it may keep. What may be kept is sent once.
What may not goes through a ring of memory in the order of the last forward: while the GPU computes, the bytes of later
layers cross the bus, so that small layers with large weights (the modulation of Flux) do not wait for theirs.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from comfy_aimdo.model_vbar import vbar_fault, vbar_signature_compare, vbar_unpin
from comfy_aimdo.torch import aimdo_to_tensor

from .layout import on_other_memory
from .pinned_part import PinnedPart
from .ring import ALIGNMENT, Place, Ring

log = logging.getLogger("gguf_native")

# Bytes of weights sent before they are needed: the streamed weights of one double block of Flux, of which half is
# modulation, cross the bus while the block before computes.
LOOK_AHEAD = 192 << 20


@dataclass(eq=False, slots=True)
class Source:
    """What is asked of a streaming layer at every use: of a module each question takes microseconds."""

    slot: tuple  # its part of DynamicVRAM
    blocks: torch.Tensor  # packed, in the file
    nbytes: int
    may_stay: bool = True  # False once DynamicVRAM has said that there is no room
    # Where its weight was last in the ring, the bytes there, the weight over them, and its bias on the GPU.
    start: int | None = None
    there: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    # The end of its copy, recorded anew each time.
    copied: torch.cuda.Event | None = None


@dataclass(eq=False, slots=True)
class Sent:
    """A weight on its way to the GPU or there: packed `weight`, `bias` or None, and the event of its arrival."""

    streamer: "Streamer"
    source: Source
    weight: torch.Tensor
    bias: torch.Tensor | None
    ready: torch.cuda.Event | None
    place: Place | None  # None for memory that the layer keeps


class Streamer:
    """Sends the weights of one model from pinned files to one GPU."""

    def __init__(self, device: torch.device, begins: Callable[[], None]):
        """begins: called in each sampling before the first weight that may not stay."""
        self.device, self.begins = device, begins
        self.parts: list[PinnedPart] = []
        self.ring_bytes = LOOK_AHEAD
        self.stream = torch.cuda.Stream(device)
        self.compute: torch.cuda.Stream  # the current one at the last call from outside
        self.buffer: torch.Tensor | None = None
        # Layer -> the streamed layer that the last forward used next.
        self.after: dict[torch.nn.Module, torch.nn.Module] = {}
        self._begin()

    def prepare(self, parts: list[PinnedPart], largest: int) -> None:
        """For a load, after `reset`: the parts that its weights lie in, and the bytes of the largest weight."""
        self.parts, self.ring_bytes = parts, max(LOOK_AHEAD, 2 * largest)
        self._begin()

    def _begin(self) -> None:
        self.ring = Ring(self.ring_bytes)
        self.sources: dict[torch.nn.Module, Source] = {}
        self.sent: dict[torch.nn.Module, Sent] = {}
        self.n_ahead = 0  # bytes of `sent`
        # The layer that the ring was begun with, and the one borrowed last.
        self.first: torch.nn.Module | None = None
        self.last: torch.nn.Module | None = None
        self.works: bool | None = None  # not known before the files are pinned or refused

    def reset(self) -> None:
        """Give back what was sent and not used, and the ring: after sampling, and before it where one was cancelled."""
        if self.sent or self.buffer is not None:
            self.compute = torch.cuda.current_stream(self.device.index)
            self._drop_sent()
            # The ring's memory may serve others at once.
            self.compute.wait_stream(self.stream)
        self.buffer = None
        self._begin()

    def give_up(self) -> bool:
        """Give back the ring until the next sampling; whether there was one. The host's smaller buffers serve."""
        had_one = self.buffer is not None
        self.reset()
        self.works = False
        return had_one

    def serves(self) -> bool:
        """Whether weights come this way now; waits for the files to be pinned."""
        if self.works is None:
            self.works = all(part.is_pinned() for part in self.parts)
            if not self.works and all(part.is_asked_for for part in self.parts):
                log_unpinned()
                # The others serve nothing without those that were refused.
                for part in self.parts:
                    part.unpin()
        return self.works

    def borrow(self, layer: torch.nn.Module) -> Sent | None:
        """A layer's weight, for the current stream's use; None if it cannot come this way. Give it back after use."""
        if not (self.works or self.serves()):
            return None
        self.compute = torch.cuda.current_stream(self.device.index)
        sent = self.sent.pop(layer, None)
        if sent is not None:
            self.n_ahead -= sent.source.nbytes
        else:
            sent = self._send_now(layer)
        if sent is None:
            return None
        if sent.ready is not None:
            self.compute.wait_event(sent.ready)
        if self.last is not None and self.last is not layer:
            self.after[self.last] = layer
        self.last = layer
        # Several at once: each turn to the other stream takes the processor as long as a copy.
        if self.n_ahead < LOOK_AHEAD // 4:
            try:
                self._send_ahead(layer)
            except BaseException:
                self.give_back(sent)
                raise
        return sent

    def give_back(self, sent: Sent) -> None:
        if sent.place is None:
            vbar_unpin(sent.source.slot)
        else:
            sent.place.done = self.compute.record_event()

    def _send_now(self, layer: torch.nn.Module) -> Sent | None:
        if self.n_ahead >= LOOK_AHEAD // 2:
            # The forward takes another path than the last one.
            self._drop_sent()
        with torch.cuda.stream(self.stream):
            sent = self._send(layer)
            if sent is None and self.works:
                # What was sent ahead fills the ring.
                self._drop_sent()
                sent = self._send(layer)
        return sent

    def _send_ahead(self, layer: torch.nn.Module) -> None:
        tip = next(reversed(self.sent), layer)
        with torch.cuda.stream(self.stream):
            while self.n_ahead < LOOK_AHEAD:
                following = self.after.get(tip)
                if following is None or following is layer or following in self.sent:
                    return
                if following.streamer is not self:
                    # Since the last load it comes another way: a LoRA patches its bias, or has enlarged it.
                    self.after[tip] = self.after.pop(following, None)
                    continue
                sent = self._send(following)
                if sent is None:
                    return
                if sent.ready is None:
                    # It is kept by now, and is borrowed without us.
                    vbar_unpin(sent.source.slot)
                    self.after[tip] = self.after.pop(following, None)
                    continue
                self.sent[following] = sent
                self.n_ahead += sent.source.nbytes
                tip = following

    def _send(self, layer: torch.nn.Module) -> Sent | None:
        source = self.sources.get(layer)
        if source is None:
            blocks = layer.weight._qdata
            source = self.sources[layer] = Source(layer._v, blocks, blocks.nbytes)
        if source.may_stay:
            signature = vbar_fault(source.slot)
            if vbar_signature_compare(signature, layer._v_signature):
                return Sent(self, source, layer._v_weight, layer._v_bias, None, None)
            if signature is not None:
                try:
                    return self._send_to_stay(layer, source, signature)
                except BaseException:
                    vbar_unpin(source.slot)
                    raise
        # Whom DynamicVRAM has refused it refuses until the next load, at which all of this begins anew.
        source.may_stay = False
        return self._send_into_ring(layer, source)

    def _send_to_stay(self, layer: torch.nn.Module, source: Source, signature: object) -> Sent:
        """Into the layer's own memory, laid out as the host does it."""
        memory = aimdo_to_tensor(source.slot, self.device)
        weight = on_other_memory(layer.weight, memory[: source.nbytes].view(source.blocks.shape))
        bias = None
        if layer.bias is not None:
            dtype, start = layer.bias._model_dtype, -(-source.nbytes // ALIGNMENT) * ALIGNMENT
            bias = memory[start : start + layer.bias.numel() * dtype.itemsize].view(dtype).view(layer.bias.shape)
        # Whatever held this memory before may still be in use.
        self.stream.wait_stream(self.compute)
        # If it is not in the pinned file, its copy waits for what is before it on the stream, so it comes first.
        if bias is not None:
            bias.copy_(layer.bias, non_blocking=True)
        weight._qdata.copy_(source.blocks, non_blocking=True)
        layer._v_weight, layer._v_bias, layer._v_signature = weight, bias, signature
        return Sent(self, source, weight, bias, self.stream.record_event(), None)

    def _send_into_ring(self, layer: torch.nn.Module, source: Source) -> Sent | None:
        if self.buffer is None and not self._make_buffer():
            return None
        if source.start is None and layer.bias is not None:
            source.bias = self._send_bias(layer.bias)
        if layer is self.first:
            # So that each forward has the places of the last one, and what was prepared for an address serves again.
            self.ring.head = 0
        found = self.ring.take(source.nbytes)
        if found is None:
            return None
        place, before = found
        if self.first is None:
            self.first = layer
        for done in before:
            self.stream.wait_event(done)
        if source.start != place.start:
            self._move(layer, source, place.start)
        source.there.copy_(source.blocks, non_blocking=True)
        source.copied = self.stream.record_event(source.copied)
        return Sent(self, source, source.weight, source.bias, source.copied, place)

    def _make_buffer(self) -> bool:
        """The ring's memory; without room for it the host's smaller buffers serve until sampling ends."""
        # First, for it gives memory back.
        self.begins()
        try:
            # Not an inference tensor: the model may also run outside inference mode. Of the stream that computes, which
            # may have it once more after a reset.
            with torch.inference_mode(False), torch.cuda.stream(self.compute):
                self.buffer = torch.empty(self.ring_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            self.works = False
            self._drop_sent()
            log_no_ring(self.ring_bytes)
            return False
        self.stream.wait_stream(self.compute)
        return True

    def _move(self, layer: torch.nn.Module, source: Source, start: int) -> None:
        """Note where in the ring a layer's weight lies from now on."""
        with torch.inference_mode(False):
            source.there = self.buffer[start : start + source.nbytes].view(source.blocks.shape)
            source.weight = on_other_memory(layer.weight, source.there)
        if source.start is None:
            layer._v_signature = None
        source.start = start

    def _send_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """To where it stays for this sampling, for biases are small."""
        # Blocking, the processor would convert it and wait for all that the GPU has been given.
        with torch.inference_mode(False):
            sent = bias.to(self.device, bias._model_dtype, non_blocking=True)
        sent.record_stream(self.compute)
        return sent

    def _drop_sent(self) -> None:
        for sent in self.sent.values():
            if sent.place is None:
                # By its signature the weight is there: whoever finds it must not read before it is.
                self.compute.wait_event(sent.ready)
                vbar_unpin(sent.source.slot)
            else:
                # Nothing reads it, but its copy may be under way: the next one is behind it on the same stream.
                sent.place.done = sent.ready
        self.sent.clear()
        self.n_ahead = 0


@cache
def log_unpinned() -> None:
    log.info(
        "GGUF Native: this system does not let the GPU read a file's pages where they are, so weights go to the GPU "
        "through ComfyUI's own buffers, which is slower."
    )


@cache
def log_no_ring(n_bytes: int) -> None:
    log.info(
        "GGUF Native: there is no room for the %d MB of GPU memory that weights are sent ahead into, so they go there "
        "through ComfyUI's own buffers, which is slower.",
        n_bytes >> 20,
    )
