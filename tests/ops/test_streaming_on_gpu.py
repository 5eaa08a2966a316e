"""Weights out of pinned files on a real GPU: streams, events and pages are no stand-ins, DynamicVRAM keeps nothing."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")
pytest.importorskip("comfy_aimdo", reason="comfy-aimdo is not installed: there is no DynamicVRAM")

from gguf_native.ops import streaming
from gguf_native.ops.layout import on_other_memory
from gguf_native.ops.pinned_part import PinnedPart
from gguf_native.ops.streaming import Streamer
from streaming_machine import Layer, layers_of

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(streaming, "vbar_fault", lambda slot: None)
    monkeypatch.setattr(streaming, "vbar_signature_compare", lambda one, other: False)


def streamed(layers: list[Layer], path: Path) -> Streamer:
    """The streamer of layers whose weights and biases are from now on those of a pinned file."""
    tensors = [tensor for layer in layers for tensor in (layer.weight._qdata, layer.bias) if tensor is not None]
    path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    opened = path.open("rb")
    part, start = PinnedPart(opened, 0, path.stat().st_size), 0

    def of_file(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal start
        found = part.view(start, tensor.nbytes)
        start += tensor.nbytes
        return found.view(tensor.dtype).view(tensor.shape)

    streamer = Streamer(GPU, lambda: None)
    for layer in layers:
        layer.weight, layer.streamer = on_other_memory(layer.weight, of_file(layer.weight._qdata)), streamer
        if layer.bias is not None:
            layer.bias = of_file(layer.bias)
            layer.bias._model_dtype = torch.bfloat16
    part.pin(GPU)
    streamer.prepare([part], max(layer.nbytes for layer in layers))
    return streamer


def test_each_weight_is_there_whole_while_it_is_read(tmp_path, monkeypatch):
    """A GPU that is late by times that differ, a ring of some ten places."""
    choose = random.Random(0)
    monkeypatch.setattr(streaming, "LOOK_AHEAD", 1 << 20)
    layers = layers_of(*(choose.randrange(100, 2000) for _ in range(40)))
    expected = [layer.weight._qdata.clone() for layer in layers]
    streamer = streamed(layers, tmp_path / "model")
    for _ in range(10):
        read = []
        for layer in layers:
            sent = streamer.borrow(layer)
            torch.cuda._sleep(choose.choice((0, 1000, 200_000)))
            read.append((sent.weight._qdata.clone(), sent.bias))
            streamer.give_back(sent)
        for layer, (blocks, bias), wanted in zip(layers, read, expected, strict=True):
            assert torch.equal(blocks.cpu(), wanted)
            assert bias is None or torch.equal(bias.cpu(), layer.bias.bfloat16())
    assert streamer.sent and streamer.buffer.nbytes == 1 << 20
    streamer.reset()
    torch.cuda.synchronize()
    streamer.parts[0].unpin()


def test_the_processor_waits_for_no_bias(tmp_path):
    layers = layers_of(*[1000] * 8)
    streamer = streamed(layers, tmp_path / "model")
    # What the first use loads is not to be waited for.
    for layer in layers:
        streamer.give_back(streamer.borrow(layer))
    streamer.reset()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(1 << 30)
    busy.record()
    biases = [streamer.borrow(layer).bias for layer in layers]
    assert not busy.query()
    torch.cuda.synchronize()
    for layer, bias in zip(layers, biases, strict=True):
        assert bias is None or torch.equal(bias.cpu(), layer.bias.bfloat16())
    streamer.reset()
    torch.cuda.synchronize()
    streamer.parts[0].unpin()
