"""The products of a piece of a block with inputs, by type: what few_rows.py adds up.

A field of a block becomes a float without a conversion: its bits, masked and left where they are, are those of a
denormal float32, field * 2^(position - 149), exactly, as long as they lie among the lowest 24. The inputs are taken
times 2^(96 - position), so that the products are of a usual size; the sums have a factor of 2^-53, taken away at the
end. Zero points and minima multiply sums of inputs, which all outputs share.

A type's function is read beside its decoder in `legacy.py`, `k_quants.py` and `i_quants.py`. A block is taken in
pieces, one for each lane of a warp. `at` is the address of the block as one of 16-bit words, [lanes, outputs, 1];
`piece` the number of the piece, [lanes, 1, 1]; x the address of the block's first input, [lanes, 1, rows]; `valid`
says which blocks there are, if not all; `table` is the codebook, as four words. A function gives the products,
float32 [lanes, outputs, rows], times 2^-53.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

RAISED = tl.constexpr(2.0**96)
LOWERED = tl.constexpr(2.0**-53)  # 2^(96 - 149)
MAGIC = tl.constexpr(0x4B000000)  # 2^23, a float whose last place counts 1
# The values of IQ4_NL's codebook plus 128, as the bytes of four words.
IQ4_WORDS = (1059919873, 1986682191, -1499886207, -237386315)


@triton.jit
def u16(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def u8(at, offset):
    return tl.load(at.to(tl.pointer_type(tl.uint8)) + offset).to(tl.int32)


@triton.jit
def half(at):
    """float16, as float32."""
    return tl.load(at).to(tl.float16, bitcast=True).to(tl.float32)


INTERPRETED = tl.constexpr(not isinstance(half, triton.JITFunction))


@triton.jit
def u32_halves(at):
    return u16(at) | (u16(at + 1) << 16)


@triton.jit
def u32(at):
    """A word at addresses that are multiples of four."""
    return tl.load(at.to(tl.pointer_type(tl.int32)))


@triton.jit
def two(at, valid):
    """Two elements side by side from each address on."""
    at = at[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    if valid is None:
        return tl.split(tl.load(at))
    else:
        return tl.split(tl.load(at, mask=valid[:, :, :, None], other=0))


@triton.jit
def four(at, valid):
    at = at[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    elements = tl.load(at) if valid is None else tl.load(at, mask=valid[:, :, :, None], other=0)
    even, odd = tl.split(tl.reshape(elements, (at.shape[0], at.shape[1], at.shape[2], 2, 2)))
    e0, e2 = tl.split(even)
    e1, e3 = tl.split(odd)
    return e0, e1, e2, e3


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def halves(ds):
    """Two float16 of a word, as float32."""
    low, high = ds.to(tl.int16), (ds >> 16).to(tl.int16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def inputs(x, k, valid):
    """Four inputs of each row from number k of the block on, k a multiple of four."""
    if x.dtype.element_ty == tl.float32:
        return four(x + k, valid)
    else:
        low, high = two(x.to(tl.pointer_type(tl.int32)) + k // 2, valid)
        if x.dtype.element_ty == tl.bfloat16:
            return as_float(low << 16), as_float(low & -65536), as_float(high << 16), as_float(high & -65536)
        else:
            return halves(low) + halves(high)


@triton.jit
def sum_of(x):
    return (x[0] + x[1]) + (x[2] + x[3])


@triton.jit
def products(word, top, mask: tl.constexpr, position: tl.constexpr, x, sums):
    """sums + fields * x, for the fields of the four bytes of a word; top is the highest byte, shifted to the lowest."""
    unit: tl.constexpr = RAISED / 2**position
    sums += as_float(word & mask) * (x[0] * unit)
    sums += as_float(word & (mask << 8)) * (x[1] * (unit / 2**8))
    sums += as_float(word & (mask << 16)) * (x[2] * (unit / 2**16))
    return sums + as_float(top & mask) * (x[3] * unit)


@triton.jit
def number(bits, mask: tl.constexpr, zero: tl.constexpr):
    """field - zero, exactly, of a field among the lowest 23 bits; in units of where it lies."""
    return as_float((bits & mask) | MAGIC) - (8388608.0 + zero)


@triton.jit
def q4_0(at, piece, x, valid, table, PIECES: tl.constexpr):
    words: tl.constexpr = 4 // PIECES
    sums = 0.0
    for word in tl.static_range(words):
        i = words * piece + word
        qs = u32_halves(at + 1 + 2 * i)
        low, high = inputs(x, 4 * i, valid), inputs(x, 4 * i + 16, valid)
        sums += (sum_of(low) + sum_of(high)) * (-8 * LOWERED)
        top = qs >> 24
        sums = products(qs, top, 0xF0, 4, high, products(qs, top, 0x0F, 0, low, sums))
    return half(at) * sums


@triton.jit
def q8_0(at, piece, x, valid, table, PIECES: tl.constexpr):
    words: tl.constexpr = 8 // PIECES
    too_much, x_words = 0.0, ()
    for word in tl.static_range(words):
        x_word = inputs(x, 4 * (words * piece + word), valid)
        too_much += sum_of(x_word) * (128 * LOWERED)
        x_words = x_words + (x_word,)  # noqa: RUF005 (Triton unpacks no tuples)
    sums = -too_much
    for word in tl.static_range(words):
        qs = u32_halves(at + 1 + 2 * (words * piece + word)) ^ -0x7F7F7F80
        sums = products(qs, qs >> 24, 255, 0, x_words[word], sums)
    return half(at) * sums


@triton.jit
def q2_k(at, piece, x, valid, table, PIECES: tl.constexpr):
    n, side, k = piece // 8, piece % 8 // 4, 128 * (piece // 8) + 4 * (piece % 8)
    qs = u32(at + 8 + 2 * piece)
    top = qs >> 24
    of_fields, of_sums = 0.0, 0.0
    for pair in tl.static_range(2):
        scales = u32(at + 4 * n + 2 * pair) >> (8 * side)
        for odd in tl.static_range(2):
            x_field = inputs(x, k + 64 * pair + 32 * odd, valid)
            scale_min = scales >> (16 * odd)
            sums = products(qs, top, 3 * 4 ** (2 * pair + odd), 4 * pair + 2 * odd, x_field, 0.0)
            of_fields += number(scale_min, 15, 0) * sums
            of_sums += number(scale_min >> 4, 15, 0) * (sum_of(x_field) * LOWERED)
    d, dmin = halves(u32(at + 40))
    return d * of_fields - dmin * of_sums


@triton.jit
def q3_k(at, piece, x, valid, table, PIECES: tl.constexpr):
    n, side, k = piece // 8, piece % 8 // 4, 128 * (piece // 8) + 4 * (piece % 8)
    qs = u32_halves(at + 16 + 2 * piece)
    hmask = u32_halves(at + 2 * (piece % 8)) >> (4 * n)
    result = 0.0
    high_scales = u32_halves(at + 52) >> (8 * side + 4 * n)
    for pair in tl.static_range(2):
        low_scales = u32_halves(at + 48 + 2 * pair) >> (8 * side + 4 * n)
        scales = (low_scales & 0x000F000F) | (((high_scales << 4) >> (2 * pair)) & 0x00300030)
        for odd in tl.static_range(2):
            x_field = inputs(x, k + 64 * pair + 32 * odd, valid)
            q = ((qs >> (4 * pair + 2 * odd)) & 0x03030303) | (((hmask << 2) >> (2 * pair + odd)) & 0x04040404)
            sums = products(q, q >> 24, 7, 0, x_field, sum_of(x_field) * (-4 * LOWERED))
            result += number(scales >> (16 * odd), 63, 32) * sums
    return half(at + 54) * result


@triton.jit
def six_bit_scales_and_mins(first, second, third, g):
    """The scales of sub-blocks 2 g and 2 g + 1 in the lowest two bytes, and their minima."""
    scales = tl.where(g < 2, first, (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)) >> (16 * (g % 2))
    minima = tl.where(g < 2, second, ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)) >> (16 * (g % 2))
    return scales, minima


@triton.jit
def scaled_less_minima(header, g, low, high, x_low, x_high):
    """The products of two sub-blocks, of those with their fields and of the sums of inputs. `high` is times 2^-8."""
    ds, first, second, third = header
    scales, minima = six_bit_scales_and_mins(first, second, third, g)
    x_low, x_high = x_low * LOWERED, x_high * (LOWERED / 256)
    of_fields = number(scales, 63, 0) * low + number(scales, 63 << 8, 0) * high
    of_sums = number(minima, 63, 0) * x_low + number(minima, 63 << 8, 0) * x_high
    d, dmin = halves(ds)
    return d * of_fields - dmin * of_sums


@triton.jit
def q4_k(at, piece, x, valid, table, PIECES: tl.constexpr):
    g, k = piece // 2, 64 * (piece // 2) + 16 * (piece % 2)
    long = at.to(tl.pointer_type(tl.int32))
    header = four(long, None)
    qs = four(long + 4 + 4 * piece, None)
    low, high, x_low, x_high = 0.0, 0.0, 0.0, 0.0
    for w in tl.static_range(4):
        x0, x1 = inputs(x, k + 4 * w, valid), inputs(x, k + 32 + 4 * w, valid)
        top = qs[w] >> 24
        low, high = products(qs[w], top, 0x0F, 0, x0, low), products(qs[w], top, 0xF0, 12, x1, high)
        x_low, x_high = x_low + sum_of(x0), x_high + sum_of(x1)
    return scaled_less_minima(header, g, low, high, x_low, x_high)


@triton.jit
def q5_k(at, piece, x, valid, table, PIECES: tl.constexpr):
    g, k = piece // 2, 64 * (piece // 2) + 16 * (piece % 2)
    long = at.to(tl.pointer_type(tl.int32))
    header = four(long, None)
    qs, qh = four(long + 12 + 4 * piece, None), four(long + 4 + 4 * (piece % 2), None)
    low, high, x_low, x_high = 0.0, 0.0, 0.0, 0.0
    for w in tl.static_range(4):
        x0, x1 = inputs(x, k + 4 * w, valid), inputs(x, k + 32 + 4 * w, valid)
        bits = qh[w] >> (2 * g)
        q0 = (qs[w] & 0x0F0F0F0F) | ((bits << 4) & 0x10101010)
        q1 = ((qs[w] >> 4) & 0x0F0F0F0F) | ((bits << 3) & 0x10101010)
        low, high = products(q0, q0 >> 24, 31, 0, x0, low), products(q1, q1 >> 24, 31, 8, x1, high)
        x_low, x_high = x_low + sum_of(x0), x_high + sum_of(x1)
    return scaled_less_minima(header, g, low, high, x_low, x_high)


@triton.jit
def q6_k(at, piece, x, valid, table, PIECES: tl.constexpr):
    words: tl.constexpr = 16 // PIECES
    n, i = piece // (PIECES // 2), piece % (PIECES // 2) * words
    at_ql, at_qh = at + 32 * n + 2 * i, at + 64 + 16 * n + 2 * i
    of_field = (0.0, 0.0, 0.0, 0.0)
    for word in tl.static_range(words):
        ql = (u32_halves(at_ql + 2 * word), u32_halves(at_ql + 16 + 2 * word))
        qh = u32_halves(at_qh + 2 * word)
        high = (qh << 4, qh << 2, qh, qh >> 2)
        sums = ()
        for field in tl.static_range(4):
            q = ((ql[field % 2] >> (4 * (field // 2))) & 0x0F0F0F0F) | (high[field] & 0x30303030)
            x_field = inputs(x, 128 * n + 4 * i + 32 * field + 4 * word, valid)
            of_word = of_field[field] + sum_of(x_field) * (-32 * LOWERED)
            sums = sums + (products(q, q >> 24, 63, 0, x_field, of_word),)  # noqa: RUF005
        of_field = sums
    result = 0.0
    for field in tl.static_range(4):
        scale = u8(at, 192 + 8 * n + i // 4 + 2 * field) ^ 128
        result += number(scale, 255, 128) * of_field[field]
    return half(at + 104) * result


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
def iq4_xs(at, piece, x, valid, table, PIECES: tl.constexpr):
    words: tl.constexpr = 32 // PIECES
    j, first = piece // (PIECES // 8), piece % (PIECES // 8) * words
    k = 32 * j + 4 * first
    at_qs = at.to(tl.pointer_type(tl.int32)) + 2 + 4 * j + first
    qs = two(at_qs, None)
    if words == 4:
        qs = qs + two(at_qs + 2, None)
    sums = 0.0
    for w in tl.static_range(words):
        codes, which = qs[w] & 0x77777777, ((qs[w] >> 1) & 0x44444444) | 0x32103210
        x0, x1 = inputs(x, k + 4 * w, valid), inputs(x, k + 16 + 4 * w, valid)
        sums += (sum_of(x0) + sum_of(x1)) * (-128 * LOWERED)
        for side in tl.static_range(2):
            low = byte_of(table[0], table[1], codes >> (16 * side))
            high = byte_of(table[2], table[3], codes >> (16 * side))
            q = byte_of(low, high, which >> (16 * side))
            x_side = (x0[2 * side], x1[2 * side], x0[2 * side + 1], x1[2 * side + 1])
            sums = products(q, q >> 24, 255, 0, x_side, sums)
    low_bits = (u8(at, 4 + j // 2) >> (4 * (j % 2))) & 15
    high_bits = (u16(at + 1) >> (2 * j)) & 3
    return half(at) * number(low_bits | (high_bits << 4), 63, 32) * sums
