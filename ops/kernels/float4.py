"""MXFP4 and NVFP4: read beside `formats/float4.py`; `at` and results as in `i_quants.py`.

As there, E2M1 values are doubled and scales halved; here they are computed instead of looked up.
"""

import triton
import triton.language as tl

from .fields import u8


@triton.jit
def e2m1_doubled(code):
    """Sign, two exponent bits, one mantissa bit -> twice the number, as float32; the codebook has no minus zero."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    magnitude = tl.where(exponent == 0, mantissa, (2 + mantissa) << (exponent - 1))
    return tl.where(code < 8, magnitude, -magnitude).to(tl.float32)


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
    byte = u8(at + j)
    mantissa, exponent = byte & 7, (byte >> 3) & 15
    normal = ((exponent + 119) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
    # 2 ** -10: half of the step between E4M3 numbers below the smallest normal one.
    d = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.0009765625, normal)
    # 0x7F, which would be NaN, counts as zero.
    d = tl.where(byte == 127, 0.0, d)
    return d * e2m1_doubled((u8(at + 4 + 8 * j + i % 8) >> (4 * (i // 8))) & 15)
