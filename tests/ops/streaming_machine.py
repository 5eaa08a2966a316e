"""A GPU that streams weights, without one: streams, events and DynamicVRAM are stand-ins, the bytes are real."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from gguf_native.ops import streaming
from gguf_native.ops.layout import pack
from gguf_native.ops.ring import ALIGNMENT
from gguf_native.ops.streaming import Sent, Streamer
from samples import random_blocks

KB = 1024
CPU = torch.device("cpu")


class Event:
    """In place of torch.cuda.Event: the moments that have passed when it has, the last of which is its own."""

    def __init__(self):
        self.moment, self.known = None, frozenset()

    def record(self, known: frozenset) -> None:
        self.moment = object()
        self.known = known | {self.moment}


class Stream:
    """In place of torch.cuda.Stream: the moments that pass before what is given to it next."""

    def __init__(self, device=None):
        self.known = frozenset()

    def record_event(self, event: Event | None = None) -> Event:
        """Recorded anew, an event stands for another moment."""
        event = event or Event()
        event.record(self.known)
        self.known |= event.known
        return event

    def wait_event(self, event: Event) -> None:
        self.known |= event.known

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Slot:
    """In place of a layer's part of DynamicVRAM: memory there while it `fits`, another after it was taken away."""

    def __init__(self, nbytes: int):
        self.memory, self.fits, self.serial, self.n_pins = torch.zeros(nbytes, dtype=torch.uint8), False, 0, 0

    def take_away(self) -> None:
        self.fits, self.serial = False, self.serial + 1
        self.memory.zero_()

    def fault(self) -> int | None:
        self.n_pins += self.fits
        return self.serial if self.fits else None

    def unpin(self) -> None:
        self.n_pins -= 1
        assert self.n_pins >= 0


class Layer:
    """What the streamer and DynamicVRAM know of a layer."""

    def __init__(self, seed: int, n_rows: int, has_bias: bool = False):
        blocks = random_blocks("Q8_0", n_rows * 4, seed)
        self.weight = pack(blocks.flatten(), "Q8_0", (n_rows, 128), torch.bfloat16)
        self.bias = torch.full((n_rows,), float(seed)) if has_bias else None
        if has_bias:
            self.bias._model_dtype = torch.bfloat16
        self._v, self._v_signature = Slot(self.nbytes + ALIGNMENT + 2 * n_rows), None
        self._v_weight = self._v_bias = self.streamer = None

    @property
    def nbytes(self) -> int:
        return self.weight._qdata.nbytes


class Machine:
    """Layers of one model, its streamer, and the stream that computes; n_sent counts the copies of each layer."""

    def __init__(self, layers: list[Layer], files: tuple = ()):
        self.layers, self.compute = layers, Stream()
        self.n_begun = 0
        self.streamer = Streamer(CPU, self.begins)
        self.streamer.prepare(list(files), max(layer.nbytes for layer in layers))
        self.sent, self.readers = [], []
        # Biases in memory of the streamer's stream, and the other stream that reads it, which torch is told of.
        self.lent: list[tuple[torch.Tensor, Stream]] = []
        for layer in layers:
            layer.streamer = self.streamer

    def begins(self) -> None:
        self.n_begun += 1

    def forward(self, layers: list[Layer] | None = None) -> list[Layer]:
        """One after the other; the layers that the host had to serve."""
        return [layer for layer in layers or self.layers if not self.use(layer)]

    def use(self, layer: Layer) -> bool:
        if layer not in self.streamer.sent and self.has_kept(layer):
            self.check(layer, layer._v_weight, layer._v_bias)
            layer._v.unpin()
            return True
        sent = self.streamer.borrow(layer)
        if sent is None:
            return False
        self.check(layer, sent.weight, sent.bias)
        if sent.place is not None:
            self.check_place(sent)
        self.streamer.give_back(sent)
        if sent.place is not None:
            self.readers.append((sent.place, sent.place.done.moment))
        return True

    def has_kept(self, layer: Layer) -> bool:
        """As the layers ask before they come to the streamer."""
        signature = layer._v.fault()
        if signature is not None and signature != layer._v_signature:
            layer._v.unpin()
        return signature is not None and signature == layer._v_signature

    def check(self, layer: Layer, weight, bias) -> None:
        assert torch.equal(weight._qdata, layer.weight._qdata)
        assert weight.shape == layer.weight.shape
        if layer.bias is not None:
            assert bias.dtype == torch.bfloat16 and torch.equal(bias, layer.bias.bfloat16())
        # What computes has waited for the copy.
        copies = [moment for copied, moment in self.sent if copied is layer]
        assert copies[-1] in self.compute.known

    def check_place(self, sent: Sent) -> None:
        """The copy waited for all that read this memory before."""
        for place, done in self.readers:
            if place.start < sent.place.end and sent.place.start < place.end:
                assert done in sent.ready.known

    def noted(self, send):
        def send_and_note(layer: Layer):
            # Copies go to the current one.
            assert torch.cuda.current_stream(CPU) is self.streamer.stream
            before = self.compute.record_event()
            sent = send(layer)
            if sent is not None and sent.ready is not None:
                self.sent.append((layer, sent.ready.moment))
                # Memory that a layer keeps may have been another's, which nobody tells of.
                assert sent.place is not None or before.moment in sent.ready.known
            return sent

        return send_and_note

    def names(self) -> list[int]:
        """The numbers of the layers sent since the last call."""
        names = [self.layers.index(layer) for layer, _ in self.sent[self.n_told :]]
        self.n_told = len(self.sent)
        return names

    n_told = 0


def machine_maker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Function (layers, files) -> Machine, with the stand-ins in torch's and DynamicVRAM's place."""
    computing = []

    @contextmanager
    def on_stream(stream: Stream):
        computing.append(stream)
        try:
            yield
        finally:
            computing.pop()

    monkeypatch.setattr(streaming, "LOOK_AHEAD", 32 * KB)
    monkeypatch.setattr(streaming, "vbar_fault", Slot.fault)
    monkeypatch.setattr(streaming, "vbar_unpin", Slot.unpin)
    monkeypatch.setattr(streaming, "vbar_signature_compare", lambda one, other: one is not None and one == other)
    monkeypatch.setattr(streaming, "aimdo_to_tensor", lambda slot, device: slot.memory)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing[-1])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)

    def make(layers: list[Layer], files: tuple = ()) -> Machine:
        made = Machine(layers, files)
        computing.append(made.compute)
        monkeypatch.setattr(made.streamer, "_send", made.noted(made.streamer._send))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *lent: made.lent.append(lent))
        return made

    return make


def layers_of(*n_rows: int) -> list[Layer]:
    """Rows are of 136 bytes; every other layer has a bias."""
    return [Layer(seed, rows, bool(seed % 2)) for seed, rows in enumerate(n_rows)]
