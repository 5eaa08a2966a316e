"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: read beside `formats/legacy.py`.

`at` is the address of each block, [blocks, 1, 1]; a decoder gives float32 [blocks, rows, values], the block's values in
order. j counts rows of 16 values: row 0 has the low nibbles, row 1 the high ones.
"""

import triton
import triton.language as tl

from .fields import f16, i8, u8


@triton.jit
def rows_of_16():
    return tl.arange(0, 2)[None, :, None], tl.arange(0, 16)[None, None, :]


@triton.jit
def q4_0(at, table):
    j, i = rows_of_16()
    q = (u8(at + 2 + i) >> (4 * j)) & 15
    return f16(at) * (q - 8).to(tl.float32)


@triton.jit
def q4_1(at, table):
    j, i = rows_of_16()
    q = (u8(at + 4 + i) >> (4 * j)) & 15
    return f16(at) * q.to(tl.float32) + f16(at + 2)


@triton.jit
def q5_0(at, table):
    j, i = rows_of_16()
    high = (u8(at + 2 + 2 * j + i // 8) >> (i % 8)) & 1
    q = ((u8(at + 6 + i) >> (4 * j)) & 15) | (high << 4)
    return f16(at) * (q - 16).to(tl.float32)


@triton.jit
def q5_1(at, table):
    j, i = rows_of_16()
    high = (u8(at + 4 + 2 * j + i // 8) >> (i % 8)) & 1
    q = ((u8(at + 8 + i) >> (4 * j)) & 15) | (high << 4)
    return f16(at) * q.to(tl.float32) + f16(at + 2)


@triton.jit
def q8_0(at, table):
    j, i = rows_of_16()
    return f16(at) * i8(at + 2 + 16 * j + i).to(tl.float32)
