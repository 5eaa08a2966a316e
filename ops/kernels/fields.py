"""How the kernels take fields out of the bytes of a block: loads by byte offset."""

import triton
import triton.language as tl


@triton.jit
def u8(at):
    """Bytes, as int32."""
    return tl.load(at).to(tl.int32)


@triton.jit
def i8(at):
    """Signed bytes, as int32."""
    return tl.load(at.to(tl.pointer_type(tl.int8))).to(tl.int32)


@triton.jit
def f16(at):
    """float16 at even offsets, as float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def u16(at):
    """Two bytes at even offsets, as int32."""
    return tl.load(at.to(tl.pointer_type(tl.uint16))).to(tl.int32)


@triton.jit
def u32_halves(at):
    """Four bytes at even offsets, as int32: two loads, because blocks align to 2 only."""
    return u16(at) | (u16(at + 2) << 16)


@triton.jit
def value_of_nibble(code, low: tl.constexpr, high: tl.constexpr):
    """The signed byte number `code` of 16: `low` holds the first eight, least significant first, `high` the others."""
    word = tl.where(code < 8, tl.full(code.shape, low, tl.uint64), tl.full(code.shape, high, tl.uint64))
    return (word >> (8 * (code & 7)).to(tl.uint64)).to(tl.int8).to(tl.float32)
