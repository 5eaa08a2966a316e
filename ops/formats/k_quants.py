"""The K-quants: 256 values in sub-blocks whose scales (and minima) are quantised too.

Every product d * scale * q is exact in float32 (11 + 6 + 5 bits at most), so the fused multiply-add of addcmul rounds
like the spec's multiplication followed by a subtraction. Where bits are shuffled, letters name their sub-block.
"""

import torch

from .base import BlockFormat, bit_planes, half


class Q2_K(BlockFormat):
    """scales: 16 B, low nibble scale, high nibble minimum | qs: 64 B of 2-bit fields | d: f16 | dmin: f16

    256 values (d * scale) * q - dmin * min, 16 to a sub-block; 32 bytes hold 4 x 32 values, lowest field first.
    """

    number, block_size, block_bytes = 10, 256, 84

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scales, qs, d_dmin = blocks[:, :16], blocks[:, 16:80], blocks[:, 80:]
        scale, minus_min = scale_and_minus_min(d_dmin, bit_planes(scales, 4))
        q = bit_planes(qs.unflatten(1, (2, 32)), 2).view(-1, 16, 16)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (16, 16)))


class Q3_K(BlockFormat):
    """hmask: 32 B, bit k of byte j belongs to value 32 k + j | qs: 64 B as in Q2_K | scales: 12 B | d: f16

    256 values d * (scale - 32) * (q - 4), 16 to a sub-block; hmask is the third bit of q. The 6-bit scales a to p:
      bytes 0-7   iiiiaaaa jjjjbbbb kkkkcccc lllldddd mmmmeeee nnnnffff oooogggg pppphhhh
      bytes 8-11  mmiieeaa nnjjffbb ookkggcc ppllhhdd
    """

    number, block_size, block_bytes = 11, 256, 110

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        hmask, qs, scales, d = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108], half(blocks[:, 108:])
        high = bit_planes(scales[:, 8:], 2).flatten(1)
        scale = bit_planes(scales[:, :8], 4).flatten(1).add_(high, alpha=16).sub_(32).view(torch.int8) * d
        q = bit_planes(qs.unflatten(1, (2, 32)), 2).flatten(1)
        q = q.add_(bit_planes(hmask, 1).flatten(1), alpha=4).sub_(4).view(torch.int8)
        torch.mul(q.unflatten(1, (16, 16)), scale.unsqueeze(-1), out=out.unflatten(1, (16, 16)))


class Q4_K(BlockFormat):
    """d: f16 | dmin: f16 | scales: 12 B, see six_bit_scales_and_mins | qs: 128 B

    256 values (d * scale) * q - dmin * min, 32 to a sub-block; a run of 32 bytes holds 32 low, then 32 high nibbles.
    """

    number, block_size, block_bytes = 12, 256, 144

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d_dmin, scales, qs = blocks[:, :4], blocks[:, 4:16], blocks[:, 16:]
        scale, minus_min = scale_and_minus_min(d_dmin, six_bit_scales_and_mins(scales))
        q = bit_planes(qs.unflatten(1, (4, 32)), 4).flatten(1, 2)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (8, 32)))


class Q5_K(BlockFormat):
    """d: f16 | dmin: f16 | scales: 12 B as in Q4_K | qh: 32 B, bit k of byte j belongs to value 32 k + j | qs: 128 B

    256 values (d * scale) * q - dmin * min, 32 to a sub-block; qs as in Q4_K, qh is the fifth bit of q.
    """

    number, block_size, block_bytes = 13, 256, 176

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d_dmin, scales, qh, qs = blocks[:, :4], blocks[:, 4:16], blocks[:, 16:48], blocks[:, 48:]
        scale, minus_min = scale_and_minus_min(d_dmin, six_bit_scales_and_mins(scales))
        q = bit_planes(qs.unflatten(1, (4, 32)), 4).flatten(1, 2).add_(bit_planes(qh, 1), alpha=16)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (8, 32)))


class Q6_K(BlockFormat):
    """ql: 128 B | qh: 64 B of 2-bit fields | scales: 16 x i8 | d: f16

    256 values d * scale * (q - 32), 16 to a sub-block. For each half of the block, 64 bytes of ql hold 64 low, then 64
    high nibbles: the low bits of q; 32 bytes of qh hold its two high bits, 4 x 32 of them, lowest field first.
    """

    number, block_size, block_bytes = 14, 256, 210

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        ql, qh, scales, d = blocks[:, :128], blocks[:, 128:192], blocks[:, 192:208], half(blocks[:, 208:])
        scale = scales.view(torch.int8) * d
        high = bit_planes(qh.unflatten(1, (2, 32)), 2).flatten(1)
        q = bit_planes(ql.unflatten(1, (2, 64)), 4).flatten(1).add_(high, alpha=16).sub_(32).view(torch.int8)
        torch.mul(q.unflatten(1, (16, 16)), scale.unsqueeze(-1), out=out.unflatten(1, (16, 16)))


def six_bit_scales_and_mins(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 12] -> uint8 [n, 2, 8]: the 6-bit scales (A to H), then the 6-bit minima (a to h).

    bytes 0-3   EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
    bytes 4-7   eeaaaaaa ffbbbbbb ggcccccc hhdddddd
    bytes 8-11  eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH
    """
    first_eight = scales[:, :8].unflatten(1, (2, 4))
    scales_and_mins = scales.new_empty(scales.shape[0], 2, 8)
    torch.bitwise_and(first_eight, 63, out=scales_and_mins[..., :4])
    torch.add(bit_planes(scales[:, 8:], 4), first_eight >> 6, alpha=16, out=scales_and_mins[..., 4:])
    return scales_and_mins


def scale_and_minus_min(d_dmin: torch.Tensor, scales_and_mins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f16 bytes [n, 4] and uint8 [n, 2, k] -> d * scale and -dmin * min, float32 [n, k, 1] each."""
    d_dmin = half(d_dmin)
    d_dmin[:, 1].neg_()
    scale, minus_min = (scales_and_mins * d_dmin.unsqueeze(-1)).unsqueeze(-1).unbind(1)
    return scale, minus_min
