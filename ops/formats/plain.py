"""The types that are not quantised: a block is one little-endian number."""

import torch

from .base import BlockFormat, reinterpret


class PlainFormat(BlockFormat):
    """A block is one value of `storage_dtype`."""

    block_size = 1
    storage_dtype: torch.dtype

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(reinterpret(blocks, cls.storage_dtype))


class Rounded:
    """What the types that values are written as have besides: they are rounded to nearest."""

    storage_dtype: torch.dtype

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return values.to(cls.storage_dtype).contiguous().view(torch.uint8)


class F32(Rounded, PlainFormat):
    """f32 -> 1 value"""

    number, block_bytes, storage_dtype = 0, 4, torch.float32


class F16(Rounded, PlainFormat):
    """f16 -> 1 value"""

    number, block_bytes, storage_dtype = 1, 2, torch.float16


class BF16(Rounded, PlainFormat):
    """bf16 -> 1 value"""

    number, block_bytes, storage_dtype = 30, 2, torch.bfloat16


class F64(PlainFormat):
    """f64 -> 1 value"""

    number, block_bytes, storage_dtype = 28, 8, torch.float64


class I8(PlainFormat):
    """i8 -> 1 value"""

    number, block_bytes, storage_dtype = 24, 1, torch.int8


class I16(PlainFormat):
    """i16 -> 1 value"""

    number, block_bytes, storage_dtype = 25, 2, torch.int16


class I32(PlainFormat):
    """i32 -> 1 value"""

    number, block_bytes, storage_dtype = 26, 4, torch.int32


class I64(PlainFormat):
    """i64 -> 1 value"""

    number, block_bytes, storage_dtype = 27, 8, torch.int64
