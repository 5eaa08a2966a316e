"""Linear layers of few inputs, in one pass over the blocks: the decoded matrix is never written.

A field q of a block becomes a float without a conversion: or-ed into the mantissa of a power of two, "one", whose last
place counts 1, it is one + q exactly, two values to a 32-bit word. Tensor cores multiply that by the inputs as they
are, each sub-block for itself, with the sums in float32; the scale of a sub-block then multiplies its sums. What the
fields are too large by is a product of the inputs with a constant matrix.

A type's function is read beside its decoder in `legacy.py`, `k_quants.py` and `i_quants.py`. j counts the groups of a
block, bytes side by side whose fields share scales. `at` is the address of the block as one of 16-bit words, [groups,
outputs, 1]; x that of its first input, [groups, 1, rows]; `valid` says which blocks there are, if not all. `numbers`
and `shift` are what `numbers_of` gives. The products are added to `sums`, float32 [groups, outputs, rows].
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..formats import FORMATS
from ..formats.codebooks import VALUES_OF_CODE
from .launch import BOUND, alignment, bind, on_its_device

MAX_ROWS = 16
# Products with fewer columns than this come out wrong on a GPU.
PADDED_ROWS = 2


@triton.jit
def words_of(at, n: tl.constexpr):
    """n words from each address on, their two bytes apart in the halves of an int32."""
    word = tl.load(at + tl.arange(0, n)[None, None, :]).to(tl.int32)
    return (word | (word << 8)) & 0x00FF00FF


INTERPRETED = tl.constexpr(not isinstance(words_of, triton.JITFunction))


@triton.jit
def long_words_of(at, n: tl.constexpr):
    """n words of 32 bits from each address on, which is a multiple of four."""
    return tl.load(at.to(tl.pointer_type(tl.int32)) + tl.arange(0, n)[None, None, :])


@triton.jit
def byte(at, offset):
    return tl.load(at.to(tl.pointer_type(tl.uint8)) + offset).to(tl.int32)


@triton.jit
def half(at):
    """float16, as float32."""
    return tl.load(at).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def inputs_at(at, valid):
    if valid is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=valid, other=0)


@triton.jit
def inputs(x, k, valid, n: tl.constexpr):
    """n inputs of each row from number k of the block on: [groups, n, inputs]."""
    return inputs_at(x + (k + tl.arange(0, n)[None, :, None]), valid)


@triton.jit
def even_and_odd(x):
    """The inputs of bytes 0 and 2 of words of 32 bits, and those of bytes 1 and 3: [groups, n / 2, inputs] each."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2, x.shape[2]))
    return tl.split(tl.permute(pairs, (0, 1, 3, 2)))


@triton.jit
def dot(weight, x, sums):
    """weight @ x + sums. float32 inputs are taken as two bfloat16, which leaves out 2^-17 of them."""
    if INTERPRETED:  # it cannot multiply matrices of bfloat16
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), sums)
    elif x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(weight, low, tl.dot(weight, high, sums))
    else:
        return tl.dot(weight, x, sums)


@triton.jit
def as_weight(pairs, x):
    """The halves of int32 as floats side by side, of the dtype that multiplies x."""
    dtype: tl.constexpr = tl.float16 if x.dtype == tl.float16 else tl.bfloat16
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2]))


@triton.jit
def plus_one(q, x, one):
    """one + q, for fields q below 128. `one` is not known at compile time: else it takes an instruction of its own."""
    return as_weight(q | one, x)


@triton.jit
def sixteen(x, one):
    """16 * one."""
    return one + (0x10001000 if x.dtype == tl.float16 else 0x02000200)


@triton.jit
def sums_of(x, OUTPUTS: tl.constexpr, of_bfloat16: tl.constexpr, of_float16: tl.constexpr):
    """The sum of the inputs times a number for all outputs: by the tensor cores, which puts it where it is needed."""
    if x.dtype == tl.float16:
        factors = tl.full((x.shape[0], OUTPUTS, x.shape[1]), of_float16, tl.float16)
    else:
        factors = tl.full((x.shape[0], OUTPUTS, x.shape[1]), of_bfloat16, tl.bfloat16)
    return dot(factors, x, tl.zeros((x.shape[0], OUTPUTS, x.shape[2]), tl.float32))


@triton.jit
def less(zero: tl.constexpr, q, x, one):
    """The products with q - zero."""
    return dot(plus_one(q, x, one), x, sums_of(x, q.shape[1], -128 - zero, -1024 - zero))


@triton.jit
def products(q, x, one):
    """The products with one + q."""
    return dot(plus_one(q, x, one), x, tl.zeros((q.shape[0], q.shape[1], x.shape[2]), tl.float32))


@triton.jit
def products_of_two(q_even, q_odd, x, one_even, one_odd):
    """The same of fields from bytes 0 and 2 of words of 32 bits, and of those from bytes 1 and 3."""
    x_even, x_odd = even_and_odd(x)
    return dot(plus_one(q_odd, x_odd, one_odd), x_odd, products(q_even, x_even, one_even))


@triton.jit
def scaled_less_minimum(sums, scale, minimum, of_fields, x):
    """sums and the products with scale * q - minimum, of those with one + q."""
    too_much = (1024 if x.dtype == tl.float16 else 128) * scale + minimum
    return sums + scale * of_fields - too_much * sums_of(x, of_fields.shape[1], 1, 1)


@triton.jit
def q4_0(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    qs = words_of(at + 1, 8)
    low = less(8, qs & 0x000F000F, inputs(x, 0, valid, 16), one)
    high = less(8, (qs >> 4) & 0x000F000F, inputs(x, 16, valid, 16), one)
    return sums + half(at) * (low + high)


@triton.jit
def q8_0(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    q = words_of(at + 1, 16) ^ 0x00800080  # q + 128, which is two nibbles
    x = inputs(x, 0, valid, 32)
    low = dot(plus_one(q & 0x000F000F, x, one), x, sums_of(x, q.shape[1], -17 * 128 - 128, -17 * 1024 - 128))
    return sums + half(at) * dot(plus_one((q >> 4) & 0x000F000F, x, sixteen(x, one)), x, low)


@triton.jit
def q2_k(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    qs = words_of(at + 8 + 8 * j, 8)
    d, dmin = half(at + 40), half(at + 41)
    n, side = j // 2, j % 2
    for field in tl.static_range(4):
        scale_min = byte(at, 8 * n + 2 * field + side)
        scale, minimum = d * (scale_min & 15).to(tl.float32), dmin * (scale_min >> 4).to(tl.float32)
        q = (qs >> (2 * field)) & 0x00030003
        x_field = inputs(x, 128 * n + 32 * field + 16 * side, valid, 16)
        sums = scaled_less_minimum(sums, scale, minimum, products(q, x_field, one), x_field)
    return sums


@triton.jit
def q3_k(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    n, side = j // 2, j % 2
    qs = words_of(at + 16 + 8 * j, 8)
    hmask = (words_of(at + 8 * side, 8) << 2) >> shift  # 4 * n
    d = half(at + 54)
    for field in tl.static_range(4):
        low_bits = (byte(at, 96 + 2 * field + side) >> (4 * n)) & 15
        high_bits = (byte(at, 104 + 2 * (field % 2) + side) >> (4 * n + 2 * (field // 2))) & 3
        scale = d * (low_bits + 16 * high_bits - 32).to(tl.float32)
        x_field = inputs(x, 128 * n + 32 * field + 16 * side, valid, 16)
        one_and_bit = one ^ ((hmask >> field) & 0x00040004)
        sums += scale * less(4, (qs >> (2 * field)) & 0x00030003, x_field, one_and_bit)
    return sums


@triton.jit
def six_bit_scale_and_min(at, j):
    """As in k_quants.py, of the address of the block."""
    k = j % 4
    first, second, nibbles = byte(at, 4 + k), byte(at, 8 + k), byte(at, 12 + k)
    scale = tl.where(j < 4, first & 63, (nibbles & 15) | ((first >> 6) << 4))
    minimum = tl.where(j < 4, second & 63, (nibbles >> 4) | ((second >> 6) << 4))
    return half(at) * scale.to(tl.float32), half(at + 1) * minimum.to(tl.float32)


@triton.jit
def q4_k(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    qs = long_words_of(at + 8 + 16 * j, 8)
    for high in tl.static_range(2):
        even, odd = (qs >> (4 * high)) & 0x000F000F, (qs >> (8 + 4 * high)) & 0x000F000F
        x_high = inputs(x, 64 * j + 32 * high, valid, 32)
        scale, minimum = six_bit_scale_and_min(at, 2 * j + high)
        of_fields = products_of_two(even, odd, x_high, one, one)
        sums = scaled_less_minimum(sums, scale, minimum, of_fields, x_high)
    return sums


@triton.jit
def q5_k(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    qs = long_words_of(at + 24 + 16 * j, 8)
    qh = long_words_of(at + 8, 8) >> shift  # 2 * j
    for high in tl.static_range(2):
        even, odd = (qs >> (4 * high)) & 0x000F000F, (qs >> (8 + 4 * high)) & 0x000F000F
        # Xor, because the compiler joins two "or", which then take an instruction more.
        even_bits, odd_bits = (qh << (4 - high)) & 0x00100010, (qh >> (4 + high)) & 0x00100010
        x_high = inputs(x, 64 * j + 32 * high, valid, 32)
        scale, minimum = six_bit_scale_and_min(at, 2 * j + high)
        of_fields = products_of_two(even, odd, x_high, one ^ even_bits, one ^ odd_bits)
        sums = scaled_less_minimum(sums, scale, minimum, of_fields, x_high)
    return sums


@triton.jit
def q6_k(at, j, x, valid, numbers, shift, sums):
    one = numbers[0]
    n, c = j // 4, j % 4
    ql = words_of(at + 8 * j, 8)
    qh = words_of(at + 64 + 16 * n + 8 * (c % 2), 8) >> shift  # 2 * (c // 2)
    d = half(at + 104)
    low_scale = d * byte(at, 192 + 8 * n + c).to(tl.int8).to(tl.float32)
    high_scale = d * byte(at, 196 + 8 * n + c).to(tl.int8).to(tl.float32)
    x0, x1 = inputs(x, 128 * n + 16 * c, valid, 16), inputs(x, 128 * n + 16 * c + 64, valid, 16)
    low = less(32, ql & 0x000F000F, x0, one ^ ((qh << 4) & 0x00300030))
    high = less(32, (ql >> 4) & 0x000F000F, x1, one ^ (qh & 0x00300030))
    return sums + low_scale * low + high_scale * high


@triton.jit
def byte_of(low, high, codes):
    """The bytes numbered by the low three bits of four nibbles, of eight in two words."""
    if INTERPRETED:
        table = (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)
        word = tl.zeros(codes.shape, tl.uint64)
        for nibble in tl.static_range(4):
            word |= ((table >> (8 * ((codes >> (4 * nibble)) & 7)).to(tl.uint64)) & 255) << (8 * nibble)
        return word.to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        return libdevice.byte_perm(low, high, codes)


@triton.jit
def looked_up(codes, which, word0, word1, word2, word3):
    """The bytes numbered by four nibbles, of 16 in four words. `which` is 0x3210, plus 4 for nibbles of 8 or more."""
    return byte_of(byte_of(word0, word1, codes), byte_of(word2, word3, codes), which)


@triton.jit
def iq4_xs(at, j, x, valid, numbers, shift, sums):
    each_byte = numbers[0]
    qs = tl.load(at + 4 + 8 * j + tl.arange(0, 8)[None, None, :]).to(tl.int32)
    codes, which = qs & 0x7777, ((qs >> 1) & 0x4444) | each_byte
    first = looked_up(codes, which, numbers[1], numbers[2], numbers[3], numbers[4])
    second = looked_up(codes, which, numbers[5], numbers[6], numbers[7], numbers[8])
    x0, x1 = inputs(x, 32 * j, valid, 16), inputs(x, 32 * j + 16, valid, 16)
    low = as_weight(byte_of(first, second, tl.full(qs.shape, 0x6240, tl.int32)), x0)
    high = as_weight(byte_of(first, second, tl.full(qs.shape, 0x7351, tl.int32)), x0)
    low_bits = (byte(at, 4 + j // 2) >> (4 * (j % 2))) & 15
    high_bits = (tl.load(at + 1).to(tl.int32) >> (2 * j)) & 3
    scale = half(at) * (low_bits + 16 * high_bits - 32).to(tl.float32)
    nothing = tl.zeros((qs.shape[0], qs.shape[1], x0.shape[2]), tl.float32)
    return sums + scale * dot(high, x1, dot(low, x0, nothing))


@triton.jit
def number(numbers, i):
    return tl.load(numbers + tl.full((1, 1, 1), i, tl.int32))


@triton.jit
def few_rows_kernel(
    blocks,  # uint8 [n_out, row_blocks, 2 * WORDS]
    x,  # [ROWS, row_blocks * BLOCK] of any float dtype
    bias,  # [n_out], if HAS_BIAS
    numbers,  # see numbers_of
    out,  # [ROWS, n_out]
    n_out,
    row_blocks,
    DOT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    first_output = tl.program_id(0) * OUTPUTS
    n_here = tl.minimum(n_out - first_output, OUTPUTS)
    n, m = tl.arange(0, OUTPUTS), tl.arange(0, PADDED_ROWS)
    # Past the end the last output, or row, is computed again and not stored.
    weight = blocks.to(tl.pointer_type(tl.uint16)) + first_output.to(tl.int64) * row_blocks * WORDS
    weight += (tl.minimum(n, n_here - 1) * (row_blocks * WORDS))[None, :, None]
    x += (tl.minimum(m, ROWS - 1) * (row_blocks * BLOCK))[None, None, :]
    group = tl.arange(0, BLOCKS * GROUPS)[:, None, None]
    # Loaded, because Triton brings nothing but loads and literals into the layout of a matrix product.
    shift = tl.load(numbers + 9 + group % GROUPS)
    one, word0, word1, word2 = number(numbers, 0), number(numbers, 1), number(numbers, 2), number(numbers, 3)
    word3, word4, word5 = number(numbers, 4), number(numbers, 5), number(numbers, 6)
    constants = (one, word0, word1, word2, word3, word4, word5, number(numbers, 7), number(numbers, 8))
    sums = tl.zeros((BLOCKS * GROUPS, OUTPUTS, PADDED_ROWS), tl.float32)
    for first in tl.range(0, row_blocks, BLOCKS, num_stages=STAGES):
        here, valid = first + group // GROUPS, None
        if not WHOLE:
            valid = here < row_blocks
            here = tl.minimum(here, row_blocks - 1)
        sums = DOT(weight + here * WORDS, group % GROUPS, x + here * BLOCK, valid, constants, shift, sums)
    result = tl.sum(sums, 0)
    n, m = n[:, None], m[None, :]
    if HAS_BIAS:
        result += tl.load(bias + first_output + tl.minimum(n, n_here - 1)).to(tl.float32)
    at = out + first_output + m * n_out + n
    tl.store(at, result.to(out.dtype.element_ty), mask=(n < n_here) & (m < ROWS))


class FewRows(NamedTuple):
    """A type's products with the inputs, and how to launch them."""

    dot: object  # Triton function, see above
    shifts: tuple[int, ...]  # one for each group of a block; which they are, the function says
    outputs: int
    blocks: int
    n_warps: int
    n_stages: int
    codebook: str | None = None  # a name in VALUES_OF_CODE


FEW_ROWS = {
    "Q4_0": FewRows(q4_0, (0,), 16, 32, 4, 2),
    "Q8_0": FewRows(q8_0, (0,), 16, 16, 4, 2),
    "Q2_K": FewRows(q2_k, (0,) * 4, 16, 4, 4, 2),
    "Q3_K": FewRows(q3_k, (0, 0, 4, 4), 16, 4, 4, 2),
    "Q4_K": FewRows(q4_k, (0,) * 4, 16, 4, 4, 2),
    "Q5_K": FewRows(q5_k, (0, 2, 4, 6), 16, 4, 4, 2),
    "Q6_K": FewRows(q6_k, (0, 0, 2, 2) * 2, 16, 4, 4, 2),
    "IQ4_XS": FewRows(iq4_xs, (0,) * 8, 16, 4, 4, 2, "IQ4_NL"),
}


@functools.cache
def numbers_of(name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a type's function has as `numbers`, and the shifts.

    That is "one" as two floats of the dtype that the weights take, and eight zeros; or 0x3210, the low bytes of the 16
    values of a codebook as such floats in four words, and their high bytes.
    """
    kernel = FEW_ROWS[name]
    dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    if kernel.codebook:
        values = torch.tensor(VALUES_OF_CODE[kernel.codebook], dtype=dtype).view(torch.uint8).view(16, 2)
        numbers = [0x3210, *values.T.contiguous().view(torch.int32).flatten().tolist()]
    else:
        numbers = [0x64006400 if dtype == torch.float16 else 0x43004300, *[0] * 8]
    return torch.tensor([*numbers, *kernel.shifts], dtype=torch.int32, device=device)


@on_its_device
def linear_into(blocks: torch.Tensor, name: str, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    n_rows, n_out = out.shape
    tensors = (blocks, x, x if bias is None else bias, numbers_of(name, x.dtype, x.device), out)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    bias_dtype = None if bias is None else bias.dtype
    key = ("few rows", name, x.dtype, bias_dtype, x.shape, n_out, blocks.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        return bound(*addresses)
    kernel, block_format = FEW_ROWS[name], FORMATS[name]
    block_bytes, block_size = block_format.block_bytes, block_format.block_size
    row_blocks = blocks.shape[1] // block_bytes
    shape = (n_out, row_blocks, kernel.dot, block_bytes // 2, block_size, len(kernel.shifts), n_rows)
    options = (max(PADDED_ROWS, triton.next_power_of_2(n_rows)), bias is not None, row_blocks % kernel.blocks == 0)
    rest = (*shape, *options, kernel.outputs, kernel.blocks, kernel.n_stages)
    bind(key, few_rows_kernel, triton.cdiv(n_out, kernel.outputs), tensors, rest, kernel.n_warps)


def linear(blocks: torch.Tensor, name: str, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias of uint8 blocks [n_out, row_bytes] and x [1 to MAX_ROWS, n_in], contiguous: [rows, n_out] as x."""
    if blocks.data_ptr() % 4:  # blocks of a multiple of four bytes are read as 32-bit words
        blocks = blocks.clone()
    out = torch.empty(len(x), len(blocks), dtype=x.dtype, device=x.device)
    linear_into(blocks, name, x, bias, out)
    return out
