"""Decode a packed weight, whole or by rows, in eager mode and under torch.compile."""

import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from .dequantize import decode_into, dequantize, dequantize_rows
from .formats import FORMAT_BY_NUMBER, FORMATS


# torch.compile sees one opaque op in place of the bit arithmetic of a format.
@torch.library.custom_op("gguf_native::dequantize", mutates_args=())
def dequantize_op(blocks: torch.Tensor, type_number: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return dequantize(blocks, type_number, shape, dtype)


@dequantize_op.register_fake
def _(blocks, type_number, shape, dtype):
    return blocks.new_empty(shape, dtype=dtype)


@torch.library.custom_op("gguf_native::dequantize_rows", mutates_args=())
def dequantize_rows_op(blocks: torch.Tensor, type_number: int, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_rows(blocks, type_number, index, dtype)


@dequantize_rows_op.register_fake
def _(blocks, type_number, index, dtype):
    block_format = FORMAT_BY_NUMBER[type_number]
    row_values = blocks.shape[-1] // block_format.block_bytes * block_format.block_size
    return blocks.new_empty((*index.shape, row_values), dtype=dtype)


def decode_weight(weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Packed weight -> dense `dtype` of its logical shape, on its device."""
    blocks, params = weight._qdata, weight._params
    block_format = FORMATS[params.type]
    if torch.compiler.is_compiling():
        return dequantize_op(blocks, block_format.number, list(params.orig_shape), dtype)
    # Shape and bytes were found to fit when the weight was packed.
    out = torch.empty(params.orig_shape, dtype=dtype, device=blocks.device)
    decode_into(block_format, blocks, out)
    return out


def gather_rows(weight: QuantizedTensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """index (int, any shape) -> rows of a packed matrix, dense `dtype` [*index.shape, row]; decodes those rows only."""
    params = weight._params
    if torch.compiler.is_compiling():
        return dequantize_rows_op(weight._qdata, FORMATS[params.type].number, index, dtype)
    return dequantize_rows(weight._qdata, params.type, index, dtype)
