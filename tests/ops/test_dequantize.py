"""The public dequantize: shapes, rows, errors, memory."""

import re

import gguf
import numpy as np
import pytest
import samples
import torch
from gguf_native.ops import dequantize
from gguf_native.ops.dequantize import dequantize_rows
from gguf_native.ops.formats import FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_format = pytest.mark.parametrize("name", FORMATS)


def packed_matrix(name: str, rows: int, blocks_per_row: int) -> torch.Tensor:
    return samples.random_blocks(name, rows * blocks_per_row).view(rows, -1)


@every_format
def test_a_tensor_in_several_passes_equals_the_gguf_package(name, monkeypatch):
    monkeypatch.setitem(dequantize.__globals__["VALUES_PER_PASS"], "cpu", 1024)
    packed = packed_matrix(name, 31, 35)
    whole = FORMATS[name].decode(packed.view(31 * 35, -1)).view(31, -1)
    assert torch.equal(dequantize(packed, name), whole)
    if name in gguf.quants._type_traits:
        expected = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(whole.numpy(), expected)


@every_format
def test_name_and_number_and_leading_dimensions(name):
    packed = packed_matrix(name, 6, 2)
    by_name = dequantize(packed, name)
    assert by_name.shape == (6, 2 * FORMATS[name].block_size)
    assert torch.equal(dequantize(packed.view(2, 3, -1), FORMATS[name].number), by_name.view(2, 3, -1))
    assert torch.equal(dequantize(packed.flatten(), name), by_name.flatten())


@every_format
def test_logical_shape_may_differ_from_the_rows(name):
    packed = packed_matrix(name, 3, 4)
    shape = (FORMATS[name].block_size, 2, 1, 6)
    assert torch.equal(dequantize(packed, name, shape), dequantize(packed, name).view(shape))
    assert dequantize(packed, name, torch.Size(shape), torch.bfloat16).dtype == torch.bfloat16


@every_format
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_to_decode(name, shape):
    packed = torch.empty(*shape[:-1], shape[-1] * FORMATS[name].block_bytes, dtype=torch.uint8)
    assert dequantize(packed, name).shape == (*shape[:-1], shape[-1] * FORMATS[name].block_size)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_view_of_a_tensor(name, dtype):
    packed = packed_matrix(name, 7, 6)
    columns = slice(FORMATS[name].block_bytes, 3 * FORMATS[name].block_bytes)
    view = packed.view(7, -1)[1::2, columns]
    assert torch.equal(dequantize(view, name, dtype=dtype), dequantize(view.contiguous(), name, dtype=dtype))


@every_format
@pytest.mark.parametrize("index", [[3], [0, 8, 3, 3], [[1, 2, 0], [8, 8, 5]], 4, []], ids=str)
def test_rows_are_gathered(name, index):
    packed = packed_matrix(name, 9, 3)
    index = torch.tensor(index, dtype=torch.int64)
    for dtype in DTYPES:
        assert torch.equal(dequantize_rows(packed, name, index, dtype), dequantize(packed, name, dtype=dtype)[index])


def test_only_the_rows_asked_for_are_decoded():
    packed = packed_matrix("Q4_K", 4000, 4)
    assert peak_bytes(lambda: dequantize_rows(packed, "Q4_K", torch.tensor([7, 3999]))) < 200_000


@pytest.mark.parametrize("unknown", ["Q4_2", "q4_k", "", 4, 999, -1])
def test_unknown_type(unknown):
    with pytest.raises(ValueError, match=re.escape(f"GGML type {unknown!r} is unknown; known are F32, F16,")):
        dequantize(torch.zeros(144, dtype=torch.uint8), unknown)


def test_rows_that_are_not_whole_blocks():
    packed = torch.zeros(3, 145, dtype=torch.uint8)
    message = re.escape("Rows of 145 bytes are not whole Q4_K blocks of 144 bytes.")
    with pytest.raises(ValueError, match=message):
        dequantize(packed, "Q4_K")
    with pytest.raises(ValueError, match=message):
        dequantize_rows(packed, "Q4_K", torch.tensor([0]))


def test_shape_that_does_not_fit():
    message = re.escape("Shape (2, 255) has 510 values; 2 blocks of Q4_K hold 512.")
    with pytest.raises(ValueError, match=message):
        dequantize(torch.zeros(2, 144, dtype=torch.uint8), "Q4_K", (2, 255))


def test_bytes_of_another_dtype():
    with pytest.raises(ValueError, match=re.escape("Packed Q8_0 data must be torch.uint8; got torch.float32.")):
        dequantize(torch.zeros(34), "Q8_0")


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_is_at_most_four_bytes_per_element(name, dtype):
    n_values = 1 << 20
    packed = samples.random_blocks(name, 1024).repeat(n_values // FORMATS[name].block_size // 1024, 1)
    dequantize(packed[:1], name)
    scratch = peak_bytes(lambda: dequantize(packed, name, dtype=dtype)) - n_values * dtype.itemsize
    assert 0 <= scratch <= 4 * n_values


def peak_bytes(function) -> int:
    """Most bytes that the CPU allocator held at one time while `function` ran, the result included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
