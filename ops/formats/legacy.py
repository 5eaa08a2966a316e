"""The first generation of block formats: 32 values that share one scale, and one minimum in the *_1 types.

The product d * q is exact in float32 (11 bits times 5), so the fused multiply-add of addcmul rounds like the spec's
multiplication followed by an addition. The types without a minimum need their integer offset first: d may be infinite.
"""

import torch

from .base import BlockFormat, bit_fields, bit_planes, half


class Q4_0(BlockFormat):
    """d: f16 | qs: 16 B, low nibbles are values 0-15, high ones 16-31 -> 32 values d * (q - 8)"""

    number, block_size, block_bytes = 2, 32, 18

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:]
        q = bit_planes(qs, 4).flatten(1).sub_(8).view(torch.int8)
        torch.mul(q, d, out=out)


class Q4_1(BlockFormat):
    """d: f16 | m: f16 | qs: 16 B, nibbles as in Q4_0 -> 32 values d * q + m"""

    number, block_size, block_bytes = 3, 32, 20

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, m = half(blocks[:, :4]).split(1, dim=1)
        q = bit_planes(blocks[:, 4:], 4).flatten(1)
        torch.addcmul(m, q, d, out=out)


class Q5_0(BlockFormat):
    """d: f16 | qh: u32, bit j is the fifth bit of value j | qs: 16 B, nibbles as in Q4_0 -> 32 values d * (q - 16)"""

    number, block_size, block_bytes = 6, 32, 22

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qh, qs = half(blocks[:, :2]), blocks[:, 2:6], blocks[:, 6:]
        q = five_bit_codes(qs, qh).sub_(16).view(torch.int8)
        torch.mul(q, d, out=out)


class Q5_1(BlockFormat):
    """d: f16 | m: f16 | qh: u32 as in Q5_0 | qs: 16 B, nibbles as in Q4_0 -> 32 values d * q + m"""

    number, block_size, block_bytes = 7, 32, 24

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, m = half(blocks[:, :4]).split(1, dim=1)
        q = five_bit_codes(qs=blocks[:, 8:], qh=blocks[:, 4:8])
        torch.addcmul(m, q, d, out=out)


class Q8_0(BlockFormat):
    """d: f16 | qs: 32 x i8 -> 32 values d * q"""

    number, block_size, block_bytes = 8, 32, 34

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:].view(torch.int8)
        torch.mul(qs, d, out=out)


def five_bit_codes(qs: torch.Tensor, qh: torch.Tensor) -> torch.Tensor:
    """qs uint8 [n, 16] and qh uint8 [n, 4] -> uint8 [n, 32]."""
    high = bit_fields(qh, 1)
    return bit_planes(qs, 4).flatten(1).add_(high, alpha=16)
