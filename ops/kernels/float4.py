"""MXFP4 and NVFP4: read beside `formats/float4.py`; `at` and results as in `i_quants.py`.

As there, E2M1 values are doubled and scales halved; the `table` of NVFP4 is that of its scales.
"""

import triton
import triton.language as tl

from .fields import u8, value_of_nibble


@triton.jit
def e2m1_doubled(code):
    """0 1 2 3 4 6 8 12 and their negatives; there is no minus zero."""
    return value_of_nibble(code, 0x0C08060403020100, 0xF4F8FAFCFDFEFF00)


@triton.jit
def mxfp4(at, table):
    j, i = tl.arange(0, 2)[None, :, None], tl.arange(0, 16)[None, None, :]
    e = u8(at)
    # 2 ** (e - 128) as the bits of a float32, whose two smallest values are denormal.
    bits = tl.where(e > 1, (e - 1) << 23, tl.where(e == 1, 1 << 22, 1 << 21))
    return bits.to(tl.float32, bitcast=True) * e2m1_doubled((u8(at + 1 + i) >> (4 * j)) & 15)


@triton.jit
def nvfp4(at, table):
    j, i = tl.arange(0, 4)[None, :, None], tl.arange(0, 16)[None, None, :]
    d = tl.load(table + u8(at + j))
    return d * e2m1_doubled((u8(at + 4 + 8 * j + i % 8) >> (4 * (i // 8))) & 15)
