"""Decoded weights that stay: which, how many, and that they are what decoding gives."""

import gc

import pytest
import torch
from samples import random_blocks

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")

from gguf_native.ops.cache import PACE, DecodedCache
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.formats import FORMATS, is_packed
from gguf_native.ops.matmul import Workspace

MEGABYTE = 1 << 20
LAYERS = (("Q4_K", (64, 512)), ("IQ4_XS", (64, 512)), ("Q8_0", (256, 512)), ("Q4_K", (16, 512)))


class Model:
    """Blocks of LAYERS, decoded in turn with one workspace."""

    def __init__(self, limit: int, room: int = MEGABYTE, dtype: torch.dtype = torch.float32):
        self.cache = DecodedCache(limit, lambda device: room)
        self.workspace, self.dtype = Workspace(cache=self.cache), dtype
        self.blocks = [
            random_blocks(name, shape[0] * shape[1] // FORMATS[name].block_size, seed).view(shape[0], -1)
            for seed, (name, shape) in enumerate(LAYERS)
        ]

    def forward(self) -> list[int]:
        """The address of each decoded weight; every one is compared with `dequantize`."""
        addresses = []
        for blocks, (name, shape) in zip(self.blocks, LAYERS, strict=True):
            values = self.workspace.decode(blocks, name, shape, self.dtype)
            assert torch.equal(values, dequantize(blocks, name, shape, self.dtype))
            addresses.append(values.data_ptr())
        return addresses

    def stream(self) -> None:
        """Have the blocks at new places, as weights are that come over the bus in each forward."""
        self.blocks = [blocks.clone() for blocks in self.blocks]
        gc.collect()

    def kept(self) -> list[int]:
        """Numbers of the layers whose decoded weight has memory of its own."""
        ours = {kept.blocks.data_ptr() for kept in self.cache.kept.values()}
        return [number for number, blocks in enumerate(self.blocks) if blocks.data_ptr() in ours]


def nbytes(*numbers: int, itemsize: int = 4) -> int:
    return sum(torch.Size(LAYERS[number][1]).numel() * itemsize for number in numbers)


def test_every_format_has_a_pace():
    assert set(PACE) == {name for name in FORMATS if is_packed(name)}


def test_the_second_forward_fills_and_the_third_decodes_nothing(monkeypatch):
    model = Model(limit=MEGABYTE)
    model.forward()
    assert model.kept() == []
    second = model.forward()
    assert model.kept() == [0, 1, 2, 3]
    # What would be decoded again would be seen as a wrong value.
    monkeypatch.setattr("gguf_native.ops.matmul.decode", lambda *arguments: pytest.fail("decoded again"))
    assert model.forward() == second


def test_dearest_for_its_bytes_first_and_what_still_fits_after():
    # The smallest is the dearest, of two of one size the type that decodes more slowly; the largest does not fit.
    model = Model(limit=nbytes(3, 1) + nbytes(0) - 1)
    for _ in range(3):
        model.forward()
    assert model.kept() == [1, 3]
    assert model.cache.nbytes == nbytes(1, 3)
    model = Model(limit=nbytes(0, 1, 3))
    for _ in range(3):
        model.forward()
    assert model.kept() == [0, 1, 3]


@pytest.mark.parametrize("room", [nbytes(3), 0, -MEGABYTE])
def test_no_more_than_there_is_room_for(room, caplog):
    model = Model(limit=MEGABYTE, room=room)
    with caplog.at_level("INFO", "gguf_native"):
        for _ in range(4):
            model.forward()
    assert model.kept() == ([3] if room > 0 else [])
    assert len(caplog.messages) == 1
    assert f"{max(0, room) >> 20} MB being free for it" in caplog.text


def test_nothing_by_a_limit_of_0(caplog):
    model = Model(limit=0)
    with caplog.at_level("INFO", "gguf_native"):
        for _ in range(3):
            model.forward()
    assert model.kept() == []
    assert model.cache.requests == {}
    assert caplog.messages == []


def test_nothing_of_weights_that_stream(caplog, monkeypatch):
    monkeypatch.setattr("gguf_native.ops.cache.MOST_REQUESTS", 10)
    model, seen = Model(limit=MEGABYTE), []
    with caplog.at_level("INFO", "gguf_native"):
        for _ in range(4):
            model.forward()
            # Alive, so that no new tensor gets the address of an old one.
            seen += model.blocks
            model.stream()
    assert model.cache.is_settled
    assert (model.cache.nbytes, model.cache.requests) == (0, {})
    assert "weights stream" in caplog.text


def test_nothing_if_some_weights_stream(caplog):
    model = Model(limit=MEGABYTE)
    with caplog.at_level("INFO", "gguf_native"):
        for _ in range(6):
            model.forward()
            model.blocks[1:] = [blocks.clone() for blocks in model.blocks[1:]]
            gc.collect()
    assert model.cache.nbytes == 0
    assert model.cache.is_settled
    assert "weights stream" in caplog.text


def test_nothing_once_the_streamer_has_said_that_weights_stream(caplog):
    """Theirs are the same tensors in each forward. The next sampling begins anew."""
    model = Model(MEGABYTE)
    with caplog.at_level("INFO", "gguf_native"):
        model.forward()
        model.cache.weights_stream()
        for _ in range(3):
            assert model.forward()
        assert model.kept() == []
        model.cache.weights_stream()
    assert len(caplog.messages) == 1 and "weights stream" in caplog.messages[0]
    model.cache.reset()
    for _ in range(3):
        model.forward()
    assert model.kept()


def test_what_is_kept_goes_when_weights_begin_to_stream(caplog):
    """Something else has taken GPU memory meanwhile, and DynamicVRAM has given up packed weights."""
    model = Model(MEGABYTE)
    for _ in range(3):
        model.forward()
    assert model.kept() and model.cache.nbytes
    with caplog.at_level("INFO", "gguf_native"):
        model.cache.weights_stream()
    assert (model.kept(), model.cache.nbytes) == ([], 0)
    assert "weights stream" in caplog.text
    assert model.forward() and not model.kept()


def test_a_forward_that_runs_again_has_nothing_chosen_for_it():
    model = Model(MEGABYTE)
    model.forward()
    assert model.cache.keep_no_more() == 0
    for _ in range(3):
        assert model.forward() and not model.kept()
    model.cache.reset()
    for _ in range(3):
        model.forward()
    nbytes = model.cache.nbytes
    assert nbytes > 0 and model.cache.keep_no_more() == nbytes


def test_after_loading_the_blocks_of_the_first_forward_are_others():
    model = Model(limit=MEGABYTE)
    model.forward()
    model.stream()
    for _ in range(4):
        model.forward()
    assert model.kept() == [0, 1, 2, 3]


def test_a_layer_that_decodes_twice_at_a_time_ends_no_forward():
    model = Model(limit=MEGABYTE)
    name, shape = LAYERS[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.workspace.decode(model.blocks[0], name, shape, dtype)
    model.forward()
    model.forward()
    assert set(model.kept()) == {0, 1, 2, 3}


def test_what_a_graph_records_chooses_and_fills_nothing():
    """It has not been done when it is recorded, and never is where recording fails."""
    model = Model(limit=MEGABYTE)
    model.forward()
    with model.workspace.apart():
        model.forward()
    assert model.kept() == []
    for blocks, (name, shape) in zip(model.blocks[:2], LAYERS[:2], strict=True):
        model.workspace.decode(blocks, name, shape, model.dtype)
    assert model.kept() == [0, 1, 2, 3]
    filled = [kept.filled_with for kept in model.cache.kept.values()]
    with model.workspace.apart():
        inside = model.forward()
    assert [kept.filled_with for kept in model.cache.kept.values()] == filled
    values = {kept.values.data_ptr() for kept in model.cache.kept.values()}
    assert [address in values for address in inside] == [True, True, False, False]
    assert set(model.forward()) == values


def test_given_up_until_sampling_ends():
    model = Model(limit=MEGABYTE)
    for _ in range(3):
        model.forward()
    assert model.cache.give_up() == nbytes(0, 1, 2, 3)
    assert model.cache.nbytes == model.cache.give_up() == 0
    model.forward()
    model.forward()
    assert model.kept() == []
    model.workspace.release()
    model.forward()
    model.forward()
    assert model.kept() == [0, 1, 2, 3]


def test_half_the_bytes_in_16_bits():
    model = Model(limit=nbytes(0, 1, 3, itemsize=2), dtype=torch.bfloat16)
    for _ in range(3):
        model.forward()
    assert model.kept() == [0, 1, 3]


def test_values_are_no_inference_tensors():
    model = Model(limit=MEGABYTE)
    with torch.inference_mode():
        for _ in range(3):
            model.forward()
    assert not any(kept.values.is_inference() for kept in model.cache.kept.values())
