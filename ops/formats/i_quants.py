"""The I-quants: groups of values are points of a grid, looked up by index; signs and scales are stored beside it.

Every product of scale, grid value and sign is exact in float32, so the order of the factors does not matter.
"""

import torch

from .base import BlockFormat, bit_fields, half, half_bytes, pack_fields, pack_planes, reinterpret, shifts
from .codebooks import look_up
from .exact import finite_quotient, largest, nearest, with_energy
from .grid_search import search_grid
from .search import nearest_codes, search_codebook


class IQ1_S(BlockFormat):
    """d: f16 | qs: 32 B | qh: 8 x u16 -> 256 values d * (2 * scale + 1) * (grid + delta), 32 to a sub-block

    qh: bits 0-11 four times the 3 high bits of a grid index, 12-14 scale, 15 delta: 1/8 or, if set, -1/8.
    """

    number, block_size, block_bytes = 19, 256, 50

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs, qh = half(blocks[:, :2]), blocks[:, 2:34], reinterpret(blocks[:, 34:], torch.int16)
        eighth = d * (((qh >> 12) & 7) * 2 + 1) * 0.125
        index = qs.unflatten(1, (8, 4)) + (three_bit_fields(qh) << 8)
        delta = (qh >> 15) | 1
        eighths = look_up("IQ1_S", index).add_(delta[..., None, None])
        torch.mul(eighths, eighth[..., None, None], out=out.unflatten(1, (8, 4, 8)))


class IQ1_M(BlockFormat):
    """qs: 32 B | qh: 16 B | scales: 4 x u16 -> 256 values d * (2 * scale + 1) * (grid + delta), 16 to a sub-block

    scales: bits 0-11 four times a scale, 12-15 a quarter of d: f16, lowest first.
    qh, a nibble for 8 values: bits 0-2 the high bits of the grid index, 3 delta: 1/8 or, if set, -1/8.
    """

    number, block_size, block_bytes = 29, 256, 56

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        qs, qh, scales = blocks[:, :32], bit_fields(blocks[:, 32:48], 4), blocks[:, 48:]
        d = half((scales[:, 1::4] >> 4) | (scales[:, 3::4] & 0xF0))
        scale = three_bit_fields(reinterpret(scales, torch.int16)).flatten(1)
        eighth = d * (scale * 2 + 1) * 0.125
        index = qs + ((qh & 7).to(torch.int16) << 8)
        delta = 1 - (qh >> 2 & 2).view(torch.int8)
        eighths = look_up("IQ1_S", index).add_(delta.unsqueeze(-1))
        torch.mul(eighths.unflatten(1, (16, 2)), eighth[..., None, None], out=out.unflatten(1, (16, 2, 8)))


class IQ2_XXS(BlockFormat):
    """d: f16 | qs: 8 x (4 grid indices: u8, signs and scale: u32) -> 256 values d * (scale + 1/2) / 4 * grid * sign

    32 values to a sub-block. The u32: bits 0-27 four times 7 of 8 signs, the eighth makes the number of minus signs
    even; bits 28-31 scale.
    """

    number, block_size, block_bytes = 16, 256, 66
    group_size, unit, even_signs, searches = 32, 0.125, True, 3

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:].unflatten(1, (8, 8))
        signs, scale = even_signs_and_scale(qs[..., 4:])
        db = d * (scale + 0.5) * 0.25
        values = look_up("IQ2_XXS", qs[..., :4]).mul_(signs)
        torch.mul(values, db[..., None, None], out=out.unflatten(1, (8, 4, 8)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, scale, index, signs = search_grid(cls, values, importance)
        qs = torch.cat((index.to(torch.uint8).view(-1, 8, 4), pack_even_signs_and_scale(signs, scale)), 2).flatten(1)
        return zero_where_d_is(torch.cat((d.view(torch.uint8), qs), 1))


class IQ2_XS(BlockFormat):
    """d: f16 | qs: 32 x u16 | scales: 8 B of nibbles, low first -> 256 values d * (scale + 1/2) / 4 * grid * sign

    16 values to a sub-block. qs: bits 0-8 grid index, 9-15 seven of 8 signs as in IQ2_XXS.
    """

    number, block_size, block_bytes = 17, 256, 74
    group_size, unit, even_signs, searches = 16, 0.125, True, 3

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs, scales = half(blocks[:, :2]), reinterpret(blocks[:, 2:66], torch.int16), blocks[:, 66:]
        db = d * (bit_fields(scales, 4).float() + 0.5) * 0.25
        values = look_up("IQ2_XS", qs & 511).mul_(look_up("EVEN_SIGNS", (qs >> 9) & 127))
        torch.mul(values.unflatten(1, (16, 2)), db[..., None, None], out=out.unflatten(1, (16, 2, 8)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, scale, index, signs = search_grid(cls, values, importance)
        qs = (index | (signs & 127).long() << 9).to(torch.int16).view(torch.uint8)
        return zero_where_d_is(torch.cat((d.view(torch.uint8), qs, pack_fields(scale, 4)), 1))


class IQ2_S(BlockFormat):
    """d: f16 | qs: 32 B | signs: 32 B | qh: 8 B | scales: 8 B of nibbles, low first

    256 values d * (scale + 1/2) / 4 * grid * sign, 16 to a sub-block; qh: 2-bit fields, high bits of the grid index.
    """

    number, block_size, block_bytes = 22, 256, 82
    group_size, unit, even_signs, searches = 16, 0.125, False, 2

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs, signs, qh, scales = half(blocks[:, :2]), *blocks[:, 2:].split((32, 32, 8, 8), 1)
        db = d * (bit_fields(scales, 4).float() + 0.5) * 0.25
        index = qs + (bit_fields(qh, 2).to(torch.int16) << 8)
        values = look_up("IQ2_S", index).mul_(look_up("SIGNS", signs))
        torch.mul(values.unflatten(1, (16, 2)), db[..., None, None], out=out.unflatten(1, (16, 2, 8)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, scale, index, signs = search_grid(cls, values, importance)
        qs, qh = index.to(torch.uint8), pack_fields((index >> 8).to(torch.uint8), 2)
        return zero_where_d_is(torch.cat((d.view(torch.uint8), qs, signs, qh, pack_fields(scale, 4)), 1))


class IQ3_XXS(BlockFormat):
    """d: f16 | qs: 64 B | signs and scales: 8 x u32 as in IQ2_XXS -> 256 values d * (scale + 1/2) / 2 * grid * sign

    32 values to a sub-block; a grid point is 4 values.
    """

    number, block_size, block_bytes = 18, 256, 98
    group_size, unit, even_signs, searches = 32, 0.25, True, 3

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:66]
        signs, scale = even_signs_and_scale(blocks[:, 66:].unflatten(1, (8, 4)))
        db = d * (scale + 0.5) * 0.5
        values = look_up("IQ3_XXS", qs).view_as(signs).mul_(signs)
        torch.mul(values, db[..., None, None], out=out.unflatten(1, (8, 4, 8)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, scale, index, signs = search_grid(cls, values, importance)
        signs_and_scales = pack_even_signs_and_scale(signs, scale).flatten(1)
        return zero_where_d_is(torch.cat((d.view(torch.uint8), index.to(torch.uint8), signs_and_scales), 1))


class IQ3_S(BlockFormat):
    """d: f16 | qs: 64 B | qh: 8 B | signs: 32 B | scales: 4 B of nibbles, low first

    256 values d * (2 * scale + 1) * grid * sign, 32 to a sub-block; a grid point is 4 values; bit k of byte j of qh is
    the ninth bit of grid index 8 j + k.
    """

    number, block_size, block_bytes = 21, 256, 110
    group_size, unit, even_signs, searches = 32, 1, False, 2

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs, qh, signs, scales = half(blocks[:, :2]), *blocks[:, 2:].split((64, 8, 32, 4), 1)
        db = d * (bit_fields(scales, 4) * 2 + 1)
        index = qs + (bit_fields(qh, 1).to(torch.int16) << 8)
        signs = look_up("SIGNS", signs)
        values = look_up("IQ3_S", index).view_as(signs).mul_(signs)
        torch.mul(values.unflatten(1, (8, 4)), db[..., None, None], out=out.unflatten(1, (8, 4, 8)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, scale, index, signs = search_grid(cls, values, importance)
        qs, qh = index.to(torch.uint8), pack_fields((index >> 8).to(torch.uint8), 1)
        return zero_where_d_is(torch.cat((d.view(torch.uint8), qs, qh, signs, pack_fields(scale, 4)), 1))


class IQ4_NL(BlockFormat):
    """d: f16 | qs: 16 B, low nibbles are values 0-15, high ones 16-31 -> 32 values d * codebook[q]"""

    number, block_size, block_bytes = 20, 32, 18

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, qs = half(blocks[:, :2]), blocks[:, 2:]
        values = look_up("IQ4_NL", qs).transpose(1, 2)
        torch.mul(values, d.unsqueeze(-1), out=out.unflatten(1, (2, 16)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        weights = importance if importance is None else with_energy(importance, values, 2)
        d = search_codebook(values, weights).unsqueeze(1)
        q = nearest_codes(values * finite_quotient(1, d))
        return torch.cat((half_bytes(d), pack_planes(q.view(-1, 2, 16), 4)), 1)


class IQ4_XS(BlockFormat):
    """d: f16 | scales_h: 2 B of 2-bit fields | scales_l: 4 B of nibbles, low first | qs: 128 B

    256 values d * (scale - 32) * codebook[q], 32 to a sub-block: 16 low nibbles, then 16 high ones, as in IQ4_NL.
    """

    number, block_size, block_bytes = 23, 256, 136

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d, scales_h, scales_l, qs = half(blocks[:, :2]), *blocks[:, 2:].split((2, 4, 128), 1)
        high = bit_fields(scales_h, 2)
        low = bit_fields(scales_l, 4)
        dl = d * low.add_(high, alpha=16).sub_(32).view(torch.int8)
        values = look_up("IQ4_NL", qs.unflatten(1, (8, 16))).transpose(2, 3)
        torch.mul(values, dl[..., None, None], out=out.unflatten(1, (8, 2, 16)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        groups = values.view(-1, 32)
        weights = importance if importance is None else with_energy(importance, values, 2).view(-1, 32)
        exact = search_codebook(groups, weights).view(-1, 8)
        d = largest(exact).unsqueeze(1) / -32
        scale = nearest(exact * finite_quotient(1, d), -32, 31)
        q = nearest_codes(groups * finite_quotient(1, (d * scale).view(-1, 1)))
        scale = (scale + 32).to(torch.uint8)
        scales_h, scales_l = pack_fields(scale >> 4, 2), pack_fields(scale & 15, 4)
        return torch.cat((half_bytes(d), scales_h, scales_l, pack_planes(q.view(-1, 8, 2, 16), 4).flatten(1)), 1)


def three_bit_fields(words: torch.Tensor) -> torch.Tensor:
    """int16 [n, k] -> int16 [n, k, 4]: the fields in bits 0-2, 3-5, 6-8 and 9-11."""
    steps = shifts(range(0, 12, 3), torch.int16, words.device)
    return (words.unsqueeze(-1) >> steps).bitwise_and_(7)


def even_signs_and_scale(field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, 8, 4] -> signs int8 [n, 8, 4, 8], scales float32 [n, 8]: the u32 of IQ2_XXS and IQ3_XXS."""
    words = reinterpret(field, torch.int32)
    steps = shifts(range(0, 28, 7), torch.int32, field.device)
    return look_up("EVEN_SIGNS", (words >> steps) & 127), ((words.squeeze(-1) >> 28) & 15).float()


def pack_even_signs_and_scale(signs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sign bits uint8 [n, 32] and scales uint8 [n, 8] -> uint8 [n, 8, 4]: the inverse of even_signs_and_scale."""
    fields = (signs & 127).int().view(-1, 8, 4)
    steps = shifts(range(0, 28, 7), torch.int32, signs.device)
    words = (fields << steps).sum(2, dtype=torch.int32) | scale.int() << 28
    return words.unsqueeze(2).view(torch.uint8)


def zero_where_d_is(blocks: torch.Tensor) -> torch.Tensor:
    """uint8 [n, block_bytes] that start with d: nothing but zeros where that is zero."""
    return blocks.masked_fill_(half(blocks[:, :2]) == 0, 0)
