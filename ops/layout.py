"""A GGUF weight as a comfy-kitchen `QuantizedTensor`: its storage is the file's own bytes."""

from dataclasses import dataclass, replace

import torch
from comfy_kitchen.tensor.base import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from .dequantize import dequantize
from .formats import FORMATS

LAYOUT = "GGUFLayout"


@dataclass(frozen=True)
class GGUFParams(BaseLayoutParams):
    """What the bytes mean: `type` is a key of FORMATS; `scale` is None, because scales live inside the blocks."""

    type: str
    transposed: bool = False

    def _tensor_fields(self) -> list[str]:
        return []


class GGUFLayout(QuantizedLayout):
    """uint8 [rows, bytes_per_row] (or [blocks, bytes_per_block] where rows are not whole blocks) <-> `orig_shape`."""

    Params = GGUFParams

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs) -> tuple[torch.Tensor, GGUFParams]:
        raise NotImplementedError(
            "A GGUF weight is never quantised again while a model runs: patches stay beside it. "
            "Something asked comfy-kitchen to requantise one; report the node that did."
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGUFParams) -> torch.Tensor:
        shape = params.orig_shape[::-1] if params.transposed else params.orig_shape
        return dequantize(qdata, params.type, shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGUFParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


register_layout_class(LAYOUT, GGUFLayout)


def pack(blocks: torch.Tensor, type_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """A packed weight over `blocks`, without a copy.

    blocks: uint8, contiguous, all bytes of the tensor in file order. shape: logical, torch order.
    dtype: what the weight claims to be and what it decodes to when nobody says otherwise.
    """
    block_format = FORMATS[type_name]
    rows_are_whole_blocks = shape[-1] % block_format.block_size == 0
    row_bytes = shape[-1] // block_format.block_size * block_format.block_bytes
    qdata = blocks.view(-1, row_bytes if rows_are_whole_blocks else block_format.block_bytes)
    return QuantizedTensor(qdata, LAYOUT, GGUFParams(None, dtype, tuple(shape), type_name))


def is_packed(tensor: torch.Tensor | None) -> bool:
    """Whether `tensor` holds GGUF blocks."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def reshape_packed(weight: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """The same blocks under another logical shape with as many values."""
    return QuantizedTensor(weight._qdata, LAYOUT, replace(weight._params, orig_shape=tuple(shape)))


def relabel(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same blocks claiming to be `dtype`; outside inference mode, `.to(dtype)` would copy them."""
    return QuantizedTensor(weight._qdata, LAYOUT, replace(weight._params, orig_dtype=dtype))


def on_other_memory(weight: QuantizedTensor, blocks: torch.Tensor) -> QuantizedTensor:
    """The same weight over other blocks of the same shape."""
    return QuantizedTensor(blocks, LAYOUT, weight._params)


def decoded(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of a packed weight: `dtype`, its logical shape, on its device."""
    return relabel(weight, dtype).dequantize()


def _decode_to(dtype: torch.dtype, args: tuple) -> list:
    return [decoded(arg, dtype) if is_packed(arg) else dequantize_args(arg) for arg in args]


@register_layout_op(torch.ops.aten.t.default, GGUFLayout)
def _t(weight, args, kwargs):
    params = weight._params
    flipped = replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, LAYOUT, flipped)


# `.to(device, dtype)`: comfy-kitchen has the other forms of `.to` itself.
@register_layout_op(torch.ops.aten.to.device, GGUFLayout)
def _to_device(weight, args, kwargs):
    _, device, dtype, _, copy = (*args, False, False)[:5]
    qdata = weight._qdata.to(device, copy=copy or kwargs.get("copy", False))
    return QuantizedTensor(qdata, LAYOUT, replace(weight._params, orig_dtype=dtype))


# The host reshapes weights of checkpoints whose names it converts.
@register_layout_op(torch.ops.aten.reshape.default, GGUFLayout)
@register_layout_op(torch.ops.aten.view.default, GGUFLayout)
def _reshape(weight, args, kwargs):
    if weight._params.transposed:
        return weight.dequantize().reshape(args[1])
    return reshape_packed(weight, torch.empty(weight.shape, device="meta").reshape(args[1]).shape)


@register_layout_op(torch.ops.aten.linear.default, GGUFLayout)
def _linear(_, args, kwargs):
    return torch.ops.aten.linear.default(*_decode_to(args[0].dtype, args), **kwargs)


@register_layout_op(torch.ops.aten.mm.default, GGUFLayout)
def _mm(_, args, kwargs):
    return torch.ops.aten.mm.default(*_decode_to(args[0].dtype, args), **kwargs)


@register_layout_op(torch.ops.aten.addmm.default, GGUFLayout)
def _addmm(_, args, kwargs):
    return torch.ops.aten.addmm.default(*_decode_to(args[1].dtype, args), **kwargs)
