"""The K-quants: 256 values in sub-blocks whose scales (and minima) are quantised too.

Every product d * scale * q is exact in float32 (11 + 6 + 5 bits at most), so the fused multiply-add of addcmul rounds
like the spec's multiplication followed by a subtraction. Where bits are shuffled, letters name their sub-block.
"""

import torch

from .base import BlockFormat, bit_planes, half, half_bytes, pack_planes
from .exact import divide, finite_quotient, largest, nearest, square_root, sum_rows, with_energy
from .search import (
    GROUP_MAX_EPS,
    STEPS_WITH_IMPORTANCE,
    make_q3_quants,
    make_qkx2_quants,
    make_qp_quants,
    make_qx_quants,
)


def mean_and_magnitude(groups: torch.Tensor) -> torch.Tensor:
    """ggml's weights for a fit with a minimum: [n, k] -> root mean square of each group + |value|."""
    columns = groups.t()
    return square_root(sum_rows((columns * columns).unbind(0)) / groups.shape[1]).unsqueeze(1) + groups.abs()


class Q2_K(BlockFormat):
    """scales: 16 B, low nibble scale, high nibble minimum | qs: 64 B of 2-bit fields | d: f16 | dmin: f16

    256 values (d * scale) * q - dmin * min, 16 to a sub-block; 32 bytes hold 4 x 32 values, lowest field first.
    """

    number, block_size, block_bytes = 10, 256, 84
    group_size, q_max, scale_max, energy, steps, penalty = 16, 3, 15, 1, (-0.5, 0.1, 15), torch.abs
    own_weights = staticmethod(torch.abs)

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scales, qs, d_dmin = blocks[:, :16], blocks[:, 16:80], blocks[:, 80:]
        scale, minus_min = scale_and_minus_min(d_dmin, bit_planes(scales, 4))
        q = bit_planes(qs.unflatten(1, (2, 32)), 2).view(-1, 16, 16)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (16, 16)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit_with_minimum(cls, values, importance))

    @classmethod
    def pack(cls, d_dmin: torch.Tensor, scales_and_mins: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        qs = pack_planes(q.view(-1, 2, 4, 32), 2).flatten(1)
        return torch.cat((pack_planes(scales_and_mins, 4), qs, d_dmin), 1)


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

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        groups = values.view(-1, 16)
        if importance is None:
            exact, searched = make_q3_quants(groups, nmax=4)
            d, scale = scales_by_greatest(exact.view(-1, 16), nmax=32)
            scale = (scale + 32).masked_fill_(d == 0, 0).to(torch.uint8)
        else:
            weights = with_energy(importance, values, 2).view(-1, 16)
            exact, searched = make_qx_quants(groups, 4, weights)
            d, scale = make_qx_quants(exact.view(-1, 16), 32, sum_rows(weights.unbind(1)).view(-1, 16))
            d = d.unsqueeze(1)
        return cls.pack(d, scale, codes_again(groups, d.half().float() * (scale.int() - 32), searched, 4))

    @classmethod
    def pack(cls, d: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        low, high = pack_planes((scale & 15).view(-1, 2, 8), 4), pack_planes((scale >> 4).view(-1, 4, 4), 2)
        hmask, qs = pack_planes(q.view(-1, 8, 32) >> 2, 1), pack_planes((q & 3).view(-1, 2, 4, 32), 2).flatten(1)
        return torch.cat((hmask, qs, low, high, half_bytes(d)), 1)


class Q4_K(BlockFormat):
    """d: f16 | dmin: f16 | scales: 12 B, see six_bit_scales_and_mins | qs: 128 B

    256 values (d * scale) * q - dmin * min, 32 to a sub-block; a run of 32 bytes holds 32 low, then 32 high nibbles.
    """

    number, block_size, block_bytes = 12, 256, 144
    group_size, q_max, scale_max, energy, steps, penalty = 32, 15, 63, 2, (-1.0, 0.1, 20), torch.square
    own_weights = staticmethod(mean_and_magnitude)

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d_dmin, scales, qs = blocks[:, :4], blocks[:, 4:16], blocks[:, 16:]
        scale, minus_min = scale_and_minus_min(d_dmin, six_bit_scales_and_mins(scales))
        q = bit_planes(qs.unflatten(1, (4, 32)), 4).flatten(1, 2)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (8, 32)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit_with_minimum(cls, values, importance))

    @classmethod
    def pack(cls, d_dmin: torch.Tensor, scales_and_mins: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        qs = pack_planes(q.view(-1, 4, 2, 32), 4).flatten(1)
        return torch.cat((d_dmin, pack_six_bit(scales_and_mins), qs), 1)


class Q5_K(BlockFormat):
    """d: f16 | dmin: f16 | scales: 12 B as in Q4_K | qh: 32 B, bit k of byte j belongs to value 32 k + j | qs: 128 B

    256 values (d * scale) * q - dmin * min, 32 to a sub-block; qs as in Q4_K, qh is the fifth bit of q.
    """

    number, block_size, block_bytes = 13, 256, 176
    group_size, q_max, scale_max, energy, steps, penalty = 32, 31, 63, 2, (-0.5, 0.1, 15), torch.square
    own_weights = staticmethod(mean_and_magnitude)

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d_dmin, scales, qh, qs = blocks[:, :4], blocks[:, 4:16], blocks[:, 16:48], blocks[:, 48:]
        scale, minus_min = scale_and_minus_min(d_dmin, six_bit_scales_and_mins(scales))
        q = bit_planes(qs.unflatten(1, (4, 32)), 4).flatten(1, 2).add_(bit_planes(qh, 1), alpha=16)
        torch.addcmul(minus_min, q, scale, out=out.unflatten(1, (8, 32)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit_with_minimum(cls, values, importance))

    @classmethod
    def pack(cls, d_dmin: torch.Tensor, scales_and_mins: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        qh, qs = pack_planes(q.view(-1, 8, 32) >> 4, 1), pack_planes((q & 15).view(-1, 4, 2, 32), 4).flatten(1)
        return torch.cat((d_dmin, pack_six_bit(scales_and_mins), qh, qs), 1)


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

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        groups = values.view(-1, 16)
        exact, searched = make_qx_quants(groups, 32, importance if importance is None else importance.view(-1, 16))
        exact = exact.view(-1, 16)
        d, scale = scales_by_greatest(exact, nmax=128)
        q = codes_again(groups, d.half().float() * scale, searched, 32)
        empty = exact.abs().amax(1, keepdim=True) < GROUP_MAX_EPS
        return cls.pack(d, scale.to(torch.int8).view(torch.uint8), q).masked_fill_(empty, 0)

    @classmethod
    def pack(cls, d: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        ql, qh = pack_planes((q & 15).view(-1, 2, 2, 64), 4), pack_planes((q >> 4).view(-1, 2, 4, 32), 2)
        return torch.cat((ql.flatten(1), qh.flatten(1), scale, half_bytes(d)), 1)


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


def pack_six_bit(scales_and_mins: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 2, 8] -> uint8 [n, 12]: the inverse of six_bit_scales_and_mins."""
    first, last = scales_and_mins.split(4, 2)
    return torch.cat(((first | last >> 4 << 6).flatten(1), pack_planes(last & 15, 4)), 1)


def fit_with_minimum(
    cls: type[BlockFormat], values: torch.Tensor, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find scales, minima and codes of Q2_K, Q4_K and Q5_K; the codes once more for what the scales were rounded to.

    The class says how: its steps, penalty and own_weights go into the search without importance, its energy into the
    weights with it; codes go up to q_max, scales and minima up to scale_max.
    -> f16 bytes of d and dmin [n, 4], scales and minima uint8 [n, 2, k], codes uint8 [n * k, group_size].
    """
    groups = values.view(-1, cls.group_size)
    if importance is None:
        weights = cls.own_weights(groups)
        *exact, searched = make_qkx2_quants(groups, weights, cls.q_max, cls.steps, cls.penalty)
        exact = torch.stack(exact).view(2, len(values), -1)
        d, rounded = both_by_greatest(exact, cls.scale_max)
    else:
        weights = with_energy(importance, values, cls.energy).view(-1, cls.group_size)
        *exact, searched = make_qkx2_quants(groups, weights, cls.q_max, STEPS_WITH_IMPORTANCE)
        exact = torch.stack(exact).view(-1, 256 // cls.group_size)
        sums = sum_rows(weights.unbind(1)).view(len(values), -1).repeat(2, 1)
        d, rounded = (item.view(2, len(values), -1) for item in make_qp_quants(exact, sums, cls.scale_max))
    d = d.half()
    scale, dmin = (d.float() * rounded).view(2, -1, 1)
    q = nearest((groups + dmin) / scale, 0, cls.q_max).to(torch.uint8)
    q = torch.where(scale == 0, searched, q)
    return d.transpose(0, 1).contiguous().view(-1, 2).view(torch.uint8), rounded.transpose(0, 1).to(torch.uint8), q


def both_by_greatest(exact: torch.Tensor, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales or minima [..., k] over their greatest, which becomes nmax -> d [..., 1], the rounded ones [..., k]."""
    top = exact.amax(-1, keepdim=True).clamp_(min=0).add_(0.0)
    return divide(top, nmax), nearest(exact * finite_quotient(nmax, top), 0, nmax)


def scales_by_greatest(exact: torch.Tensor, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed scales [n, k] over the one farthest from zero, which becomes -nmax -> d [n, 1], rounded ones [n, k]."""
    inverse = finite_quotient(-nmax, largest(exact).unsqueeze(1))
    return finite_quotient(1, inverse), nearest(exact * inverse, -nmax, nmax - 1)


def codes_again(groups: torch.Tensor, scale: torch.Tensor, searched: torch.Tensor, nmax: int) -> torch.Tensor:
    """The codes nearest to [n, k] values over their scales, plus nmax, uint8; those searched where the scale is 0."""
    scale = scale.view(-1, 1)
    q = nearest(groups / scale, -nmax, nmax - 1).add_(nmax).to(torch.uint8)
    return torch.where(scale == 0, searched, q)
