"""Q2_K to Q6_K: read beside `formats/k_quants.py`.

`at` is the address of each block, [blocks, 1, 1]; a decoder gives float32 [blocks, sub-blocks, values], in order.
j counts sub-blocks, i values in one.
"""

import triton
import triton.language as tl

from .fields import f16, i8, u8


@triton.jit
def sub_blocks_of_16():
    return tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]


@triton.jit
def sub_blocks_of_32():
    return tl.arange(0, 8)[None, :, None], tl.arange(0, 32)[None, None, :]


@triton.jit
def two_bit_field(qs, j, i):
    """Value i of sub-block j of 16: 32 bytes hold 4 x 32 values, lowest field first."""
    return (u8(qs + 32 * (j // 8) + 16 * (j % 2) + i) >> (2 * (j % 8 // 2))) & 3


@triton.jit
def q2_k(at, table):
    j, i = sub_blocks_of_16()
    scale_min = u8(at + j)
    q = two_bit_field(at + 16, j, i)
    d, dmin = f16(at + 80), f16(at + 82)
    return d * (scale_min & 15).to(tl.float32) * q.to(tl.float32) - dmin * (scale_min >> 4).to(tl.float32)


@triton.jit
def q3_k(at, table):
    j, i = sub_blocks_of_16()
    high = (u8(at + 16 * (j % 2) + i) >> (j // 2)) & 1
    q = two_bit_field(at + 32, j, i) + 4 * high - 4
    low_bits = (u8(at + 96 + j % 8) >> (4 * (j // 8))) & 15
    high_bits = (u8(at + 104 + j % 4) >> (2 * (j // 4))) & 3
    scale = low_bits + 16 * high_bits - 32
    return f16(at + 108) * scale.to(tl.float32) * q.to(tl.float32)


@triton.jit
def six_bit_scale_and_min(scales, j):
    """The 6-bit scale and minimum of sub-block j: the first four whole, the last four as nibbles and two high bits."""
    k = j % 4
    first, second = u8(scales + k), u8(scales + 4 + k)
    nibbles = u8(scales + 8 + k)
    scale = tl.where(j < 4, first & 63, (nibbles & 15) | ((first >> 6) << 4))
    minimum = tl.where(j < 4, second & 63, (nibbles >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def q4_k(at, table):
    j, i = sub_blocks_of_32()
    scale, minimum = six_bit_scale_and_min(at + 4, j)
    q = (u8(at + 16 + 32 * (j // 2) + i) >> (4 * (j % 2))) & 15
    return f16(at) * scale * q.to(tl.float32) - f16(at + 2) * minimum


@triton.jit
def q5_k(at, table):
    j, i = sub_blocks_of_32()
    scale, minimum = six_bit_scale_and_min(at + 4, j)
    low = (u8(at + 48 + 32 * (j // 2) + i) >> (4 * (j % 2))) & 15
    high = (u8(at + 16 + i) >> j) & 1
    return f16(at) * scale * (low + 16 * high).to(tl.float32) - f16(at + 2) * minimum


@triton.jit
def q6_k(at, table):
    j, i = sub_blocks_of_16()
    low = (u8(at + 64 * (j // 8) + 16 * (j % 4) + i) >> (4 * (j % 8 // 4))) & 15
    high = two_bit_field(at + 128, j, i)
    scale = i8(at + 192 + j)
    return f16(at + 208) * scale.to(tl.float32) * (low + 16 * high - 32).to(tl.float32)
