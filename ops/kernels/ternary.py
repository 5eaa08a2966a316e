"""TQ1_0 and TQ2_0: read beside `formats/ternary.py`; `at` and results as in `k_quants.py`."""

import triton
import triton.language as tl

from .fields import f16, u8
from .k_quants import sub_blocks_of_16, two_bit_field


@triton.jit
def tq1_0(at, table):
    j, i = sub_blocks_of_16()
    # Sub-blocks 0-9: five trits of each of 32 bytes; 10-14: of 16 bytes; 15: four trits of each of 4 bytes.
    byte = tl.where(j < 10, 16 * (j % 2) + i, tl.where(j < 15, 32 + i, 48 + i % 4))
    trit = tl.where(j < 10, j // 2, tl.where(j < 15, j - 10, i // 4))
    power = tl.where(trit == 0, 1, tl.where(trit == 1, 3, tl.where(trit == 2, 9, tl.where(trit == 3, 27, 81))))
    fraction = (u8(at + byte) * power) & 255
    return f16(at + 52) * (((fraction * 3) >> 8) - 1).to(tl.float32)


@triton.jit
def tq2_0(at, table):
    j, i = sub_blocks_of_16()
    return f16(at + 64) * (two_bit_field(at, j, i) - 1).to(tl.float32)
