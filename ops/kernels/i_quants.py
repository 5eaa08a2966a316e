"""IQ1_S to IQ4_XS: read beside `formats/i_quants.py`.

`at` is the address of each block, [blocks, 1, 1]; `table` the int8 codebook of the format; a decoder gives float32
[blocks, groups, values], in order. g counts groups of 8 values (of 16 for the four-bit types), i values in one.
"""

import triton
import triton.language as tl

from .fields import f16, u8, u16, u32_halves, value_of_nibble


@triton.jit
def groups_of_8():
    return tl.arange(0, 32)[None, :, None], tl.arange(0, 8)[None, None, :]


@triton.jit
def point(table, index, i):
    """Coordinate i of a grid point of 8."""
    return tl.load(table + index * 8 + i).to(tl.float32)


@triton.jit
def signed(values, signs, i):
    """Minus where bit i of `signs` is set."""
    return tl.where(((signs >> i) & 1) == 0, values, -values)


@triton.jit
def even_signs(seven):
    """Seven sign bits and an eighth that makes their number even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return seven | (parity << 7)


@triton.jit
def iq1_s(at, table):
    g, i = groups_of_8()
    qh = u16(at + 34 + 2 * (g // 4))
    index = u8(at + 2 + g) | (((qh >> (3 * (g % 4))) & 7) << 8)
    eighth = f16(at) * (2 * ((qh >> 12) & 7) + 1).to(tl.float32) * 0.125
    delta = (1 - 2 * (qh >> 15)).to(tl.float32)
    return eighth * (point(table, index, i) + delta)


@triton.jit
def iq1_m(at, table):
    g, i = groups_of_8()
    # d is spread over the top nibbles of the four scale words.
    d_bits = (u8(at + 49) >> 4) | (u8(at + 51) & 0xF0) | ((u8(at + 53) >> 4) << 8) | ((u8(at + 55) >> 4) << 12)
    d = d_bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    qh = (u8(at + 32 + g // 2) >> (4 * (g % 2))) & 15
    index = u8(at + g) | ((qh & 7) << 8)
    scale = (u16(at + 48 + 2 * (g // 8)) >> (3 * (g % 8 // 2))) & 7
    eighth = d * (2 * scale + 1).to(tl.float32) * 0.125
    delta = (1 - 2 * (qh >> 3)).to(tl.float32)
    return eighth * (point(table, index, i) + delta)


@triton.jit
def iq2_xxs(at, table):
    g, i = groups_of_8()
    words = at + 2 + 8 * (g // 4)
    signs_and_scale = u32_halves(words + 4)
    db = f16(at) * (((signs_and_scale >> 28) & 15).to(tl.float32) + 0.5) * 0.25
    signs = even_signs((signs_and_scale >> (7 * (g % 4))) & 127)
    return db * signed(point(table, u8(words + g % 4), i), signs, i)


@triton.jit
def iq2_xs(at, table):
    g, i = groups_of_8()
    q = u16(at + 2 + 2 * g)
    scale = (u8(at + 66 + g // 4) >> (4 * (g // 2 % 2))) & 15
    db = f16(at) * (scale.to(tl.float32) + 0.5) * 0.25
    return db * signed(point(table, q & 511, i), even_signs(q >> 9), i)


@triton.jit
def iq2_s(at, table):
    g, i = groups_of_8()
    index = u8(at + 2 + g) | (((u8(at + 66 + g // 4) >> (2 * (g % 4))) & 3) << 8)
    scale = (u8(at + 74 + g // 4) >> (4 * (g // 2 % 2))) & 15
    db = f16(at) * (scale.to(tl.float32) + 0.5) * 0.25
    return db * signed(point(table, index, i), u8(at + 34 + g), i)


@triton.jit
def iq3_xxs(at, table):
    g, i = groups_of_8()
    signs_and_scale = u32_halves(at + 66 + 4 * (g // 4))
    db = f16(at) * (((signs_and_scale >> 28) & 15).to(tl.float32) + 0.5) * 0.5
    signs = even_signs((signs_and_scale >> (7 * (g % 4))) & 127)
    index = u8(at + 2 + 2 * g + i // 4)
    return db * signed(tl.load(table + index * 4 + i % 4).to(tl.float32), signs, i)


@triton.jit
def iq3_s(at, table):
    g, i = groups_of_8()
    k = 2 * g + i // 4
    index = u8(at + 2 + k) | (((u8(at + 66 + k // 8) >> (k % 8)) & 1) << 8)
    scale = (u8(at + 106 + g // 8) >> (4 * (g // 4 % 2))) & 15
    db = f16(at) * (2 * scale + 1).to(tl.float32)
    return db * signed(tl.load(table + index * 4 + i % 4).to(tl.float32), u8(at + 74 + g), i)


@triton.jit
def iq4_value(code):
    """The codebook of IQ4_NL: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113."""
    return value_of_nibble(code, 0xF6EADDCFBFAD9881, 0x7159453526190D01)


@triton.jit
def iq4_nl(at, table):
    j, i = tl.arange(0, 2)[None, :, None], tl.arange(0, 16)[None, None, :]
    return f16(at) * iq4_value((u8(at + 2 + i) >> (4 * j)) & 15)


@triton.jit
def iq4_xs(at, table):
    j, i = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    low = (u8(at + 4 + j // 4) >> (4 * (j // 2 % 2))) & 15
    high = (u8(at + 2 + j // 8) >> (2 * (j // 2 % 4))) & 3
    dl = f16(at) * (low + 16 * high - 32).to(tl.float32)
    return dl * iq4_value((u8(at + 8 + 16 * (j // 2) + i) >> (4 * (j % 2))) & 15)
