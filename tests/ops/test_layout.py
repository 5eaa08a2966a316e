"""A packed weight as the host's `QuantizedTensor`: what stays packed, what decodes, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from samples import random_blocks

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.memory_management
from comfy_kitchen.tensor.base import QuantizedTensor
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.layout import is_packed, pack, relabel, reshape_packed

TYPES = ["Q8_0", "Q4_K", "IQ4_NL"]


def weight_of(type_name: str, rows: int = 6, columns: int = 512, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    blocks = random_blocks(type_name, rows * columns // FORMATS[type_name].block_size)
    return pack(blocks.flatten(), type_name, (rows, columns), dtype)


def values(weight: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return dequantize(weight._qdata, weight._params.type, weight._params.orig_shape, dtype or weight.dtype)


@pytest.fixture(params=[torch.inference_mode, torch.no_grad])
def without_gradients(request):
    with request.param():
        yield


@pytest.mark.parametrize("type_name", FORMATS)
def test_every_type_packs(type_name):
    weight = weight_of(type_name, 4, 256)
    assert is_packed(weight)
    assert weight.shape == (4, 256)
    assert weight.nbytes == 1024 // FORMATS[type_name].block_size * FORMATS[type_name].block_bytes
    assert torch.equal(weight.dequantize().nan_to_num(), values(weight).nan_to_num())


def test_rows_that_are_no_whole_blocks_lie_flat():
    weight = pack(random_blocks("Q8_0", 9).flatten(), "Q8_0", (32, 1, 3, 3), torch.float32)
    assert weight._qdata.shape == (9, 34)
    assert weight.dequantize().shape == (32, 1, 3, 3)


def test_plain_tensors_are_not_packed():
    assert not is_packed(torch.ones(2))
    assert not is_packed(None)


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("type_name", TYPES)
def test_dtype_is_a_label(type_name):
    weight = weight_of(type_name)
    for other in (weight.to(torch.bfloat16), weight.half(), relabel(weight, torch.float16)):
        assert is_packed(other)
        assert other._qdata.dtype == torch.uint8
        assert torch.equal(other._qdata, weight._qdata)
        assert torch.equal(other.dequantize(), values(weight, other.dtype))
    assert relabel(weight, torch.float16)._qdata.data_ptr() == weight._qdata.data_ptr()


@pytest.mark.usefixtures("without_gradients")
def test_copies():
    weight = weight_of("Q4_K")
    assert weight.to("cpu")._qdata.data_ptr() == weight._qdata.data_ptr()
    assert weight.detach()._qdata.data_ptr() == weight._qdata.data_ptr()
    assert is_packed(weight.to("cpu", torch.float16))
    assert weight.to("cpu", torch.float16).dtype == torch.float16
    assert weight.to("cpu", torch.float16, copy=True)._qdata.data_ptr() != weight._qdata.data_ptr()
    assert weight.to("meta").device.type == "meta"
    assert is_packed(weight.to("meta"))
    clone = weight.clone()
    assert is_packed(clone)
    assert clone._qdata.data_ptr() != weight._qdata.data_ptr()
    assert torch.equal(clone.dequantize(), weight.dequantize())


@pytest.mark.usefixtures("without_gradients")
def test_copy_within_the_type():
    weight, other = weight_of("Q4_K"), weight_of("Q4_K").clone()
    other._qdata.zero_()
    other.copy_(weight)
    assert torch.equal(other._qdata, weight._qdata)


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_decoded_weight(type_name, dtype):
    weight = weight_of(type_name, dtype=torch.bfloat16)
    dense = values(weight, dtype)
    x, bias, y = torch.randn(3, 512).to(dtype), torch.randn(6).to(dtype), torch.randn(4, 6).to(dtype)
    assert torch.equal(F.linear(x, weight, bias), F.linear(x, dense, bias))
    assert torch.equal(F.linear(x, weight), F.linear(x, dense))
    assert torch.equal(torch.mm(y, weight), torch.mm(y, dense))
    assert torch.equal(torch.mm(x, weight.t()), torch.mm(x, dense.t()))
    assert torch.equal(torch.addmm(bias, x, weight.t()), torch.addmm(bias, x, dense.t()))


@pytest.mark.usefixtures("without_gradients")
def test_transposed_stays_packed():
    weight = weight_of("Q4_K")
    flipped = weight.t()
    assert is_packed(flipped)
    assert flipped.shape == (512, 6)
    assert torch.equal(flipped.dequantize(), values(weight).t())
    assert torch.equal(flipped.t().dequantize(), values(weight))
    assert torch.equal(flipped.reshape(-1), values(weight).t().reshape(-1))


@pytest.mark.usefixtures("without_gradients")
def test_another_shape_stays_packed():
    weight = weight_of("Q4_K")
    for shape in ((6, 512, 1, 1), (3, 1024), (-1,), (2, -1, 4)):
        other = weight.reshape(shape)
        assert is_packed(other)
        assert other._qdata.data_ptr() == weight._qdata.data_ptr()
        assert torch.equal(other.dequantize(), values(weight).reshape(shape))
    assert reshape_packed(weight, (512, 6)).shape == (512, 6)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        weight.reshape(5, 5)


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w + 1,
        lambda w: 2 * w,
        lambda w: w[:2],
        lambda w: w[1, 3:7],
        lambda w: torch.cat([w, w]),
        lambda w: torch.stack([w, torch.ones(6, 512)]),
        lambda w: w.sum(dim=1),
        lambda w: w.chunk(2)[1],
        lambda w: w.unsqueeze(0),
        lambda w: F.conv2d(torch.ones(1, 512, 2, 2), w[:, :, None, None]),
        lambda w: torch.ones(6, 512) - w,
    ],
)
def test_any_other_operation_sees_the_values(operation):
    weight = weight_of("Q4_K")
    result = operation(weight)
    assert not is_packed(result)
    assert torch.equal(result, operation(values(weight)))


def test_quantising_again_is_refused():
    weight = weight_of("Q4_K")
    with pytest.raises(NotImplementedError, match="never quantised again"):
        weight.requantize_from_float(weight.dequantize(), scale="recalculate", stochastic_rounding=1)
    with pytest.raises(TypeError, match="Cannot copy"):
        weight.copy_(weight.dequantize())


def test_parts_make_the_same_weight():
    weight = weight_of("Q4_K")
    names, context = weight.__tensor_flatten__()
    assert names == ["_qdata"]
    again = QuantizedTensor.__tensor_unflatten__({"_qdata": weight._qdata}, context, weight.size(), weight.stride())
    assert again._params == weight._params
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("type_name", TYPES)
def test_host_lays_it_out_in_a_buffer(type_name):
    """What DynamicVRAM does: the bytes of several weights, each from a multiple of 1024 on."""
    tensors = [weight_of(type_name), torch.randn(6), None, weight_of(type_name, 1, 256)]
    sizes = [comfy.memory_management.vram_aligned_size(tensor) for tensor in tensors]
    assert sizes[0] == -(-tensors[0].nbytes // 1024) * 1024
    assert sizes[1:] == [1024, 0, 1024]
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8)
    views = comfy.memory_management.interpret_gathered_like(tensors, buffer)
    for view, tensor in zip(views, tensors, strict=True):
        if tensor is not None:
            view.copy_(tensor)
    assert is_packed(views[0])
    assert torch.equal(views[0].dequantize(), tensors[0].dequantize())
    assert torch.equal(views[3].dequantize(), tensors[3].dequantize())
    assert torch.equal(buffer[: tensors[0].nbytes], tensors[0]._qdata.flatten())
