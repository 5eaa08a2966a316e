"""The first generation of block formats: 32 values that share one scale, and one minimum in the *_1 types.

The product d * q is exact in float32 (11 bits times 5), so the fused multiply-add of addcmul rounds like the spec's
multiplication followed by an addition. The types without a minimum need their integer offset first: d may be infinite.
"""

import torch

from .base import BlockFormat, bit_fields, bit_planes, half, half_bytes, pack_fields, pack_planes, round_half_away
from .exact import divide, finite_quotient, largest, smallest
from .search import STEPS_WITH_IMPORTANCE, make_qkx2_quants, make_qx_quants


class Q4_0(BlockFormat):
    """d: f16 | qs: 16 B, low nibbles are values 0-15, high ones 16-31 -> 32 values d * (q - 8)"""

    number, block_size, block_bytes = 2, 32, 18
    energy_of_row = True

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:]
        q = bit_planes(qs, 4).flatten(1).sub_(8).view(torch.int8)
        torch.mul(q, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit(values, importance, 8))

    @classmethod
    def pack(cls, d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((half_bytes(d), pack_nibbles(q)), 1)


class Q4_1(BlockFormat):
    """d: f16 | m: f16 | qs: 16 B, nibbles as in Q4_0 -> 32 values d * q + m"""

    number, block_size, block_bytes = 3, 32, 20
    energy_of_row = True

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, m = half(blocks[:, :4]).split(1, dim=1)
        q = bit_planes(blocks[:, 4:], 4).flatten(1)
        torch.addcmul(m, q, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit_with_minimum(values, importance, 15))

    @classmethod
    def pack(cls, d: torch.Tensor, m: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((half_bytes(d), half_bytes(m), pack_nibbles(q)), 1)


class Q5_0(BlockFormat):
    """d: f16 | qh: u32, bit j is the fifth bit of value j | qs: 16 B, nibbles as in Q4_0 -> 32 values d * (q - 16)"""

    number, block_size, block_bytes = 6, 32, 22
    energy_of_row = True

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qh, qs = half(blocks[:, :2]), blocks[:, 2:6], blocks[:, 6:]
        q = five_bit_codes(qs, qh).sub_(16).view(torch.int8)
        torch.mul(q, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit(values, importance, 16))

    @classmethod
    def pack(cls, d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((half_bytes(d), pack_fields(q >> 4, 1), pack_nibbles(q & 15)), 1)


class Q5_1(BlockFormat):
    """d: f16 | m: f16 | qh: u32 as in Q5_0 | qs: 16 B, nibbles as in Q4_0 -> 32 values d * q + m"""

    number, block_size, block_bytes = 7, 32, 24
    energy_of_row = True

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, m = half(blocks[:, :4]).split(1, dim=1)
        q = five_bit_codes(qs=blocks[:, 8:], qh=blocks[:, 4:8])
        torch.addcmul(m, q, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        return cls.pack(*fit_with_minimum(values, importance, 31))

    @classmethod
    def pack(cls, d: torch.Tensor, m: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((half_bytes(d), half_bytes(m), pack_fields(q >> 4, 1), pack_nibbles(q & 15)), 1)


class Q8_0(BlockFormat):
    """d: f16 | qs: 32 x i8 -> 32 values d * q"""

    number, block_size, block_bytes = 8, 32, 34

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:].view(torch.int8)
        torch.mul(qs, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d = divide(values.abs().amax(1, keepdim=True), 127)
        return cls.pack(d, round_half_away(values * finite_quotient(1, d)).to(torch.int8).view(torch.uint8))

    @classmethod
    def pack(cls, d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((half_bytes(d), q), 1)


def five_bit_codes(qs: torch.Tensor, qh: torch.Tensor) -> torch.Tensor:
    """qs uint8 [n, 16] and qh uint8 [n, 4] -> uint8 [n, 32]."""
    high = bit_fields(qh, 1)
    return bit_planes(qs, 4).flatten(1).add_(high, alpha=16)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 32] below 16 -> uint8 [n, 16]."""
    return pack_planes(q.unflatten(1, (2, 16)), 4)


def fit(values: torch.Tensor, importance: torch.Tensor | None, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d [n, 1] and codes uint8 [n, 32] below 2 nmax; without importance the value farthest from zero becomes code 0."""
    if importance is not None:
        d, q = make_qx_quants(values, nmax, importance)
        return d.unsqueeze(1), q
    d = largest(values).unsqueeze(1) / -nmax
    return d, truncated_codes(values, d, nmax + 0.5, 2 * nmax - 1)


def fit_with_minimum(
    values: torch.Tensor, importance: torch.Tensor | None, nmax: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d and m [n, 1], codes uint8 [n, 32] in 0 ... nmax; without importance the range of the values is covered."""
    if importance is not None:
        d, minus_m, q = make_qkx2_quants(values, importance, nmax, STEPS_WITH_IMPORTANCE)
        return d.unsqueeze(1), -minus_m.unsqueeze(1), q
    m = smallest(values).unsqueeze(1)
    d = divide((values.amax(1, keepdim=True) - m).add_(0.0), nmax)
    return d, m, truncated_codes(values - m, d, 0.5, nmax)


def truncated_codes(values: torch.Tensor, d: torch.Tensor, offset: float, nmax: int) -> torch.Tensor:
    """values [n, 32] / d [n, 1] + offset without its fraction, at most nmax, as uint8; 0 where 1 / d is infinite."""
    codes = (values * finite_quotient(1, d)).add_(offset).clamp_(max=nmax)
    return codes.to(torch.uint8).masked_fill_(divide(1, d).isinf() & (d != 0), 0)
