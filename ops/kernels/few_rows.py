"""Linear layers of few inputs, in one pass over the blocks: the decoded matrix is never written."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from .few_rows_products import IQ4_WORDS, iq4_xs, q2_k, q3_k, q4_0, q4_k, q5_k, q6_k, q8_0
from .launch import BOUND, alignment, bind, on_its_device

# More rows are taken in groups.
ROWS_AT_ONCE = 4
# Products come times 2^-53, see few_rows_products.py.
RESTORED = tl.constexpr(2.0**53)


@triton.jit
def few_rows_kernel(
    blocks,  # uint8 [n_out, row_blocks, 2 * WORDS]
    x,  # [n_rows, row_blocks * BLOCK] of any float dtype
    bias,  # [n_out], if HAS_BIAS
    out,  # [n_rows, n_out]
    n_out,
    row_blocks,
    n_rows,
    word0,  # the codebook of the type, if it has one; arguments, because literals take an instruction each time
    word1,
    word2,
    word3,
    PRODUCTS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
):
    # Programs of the same outputs follow each other, and find the blocks in the cache.
    row_groups = (n_rows + ROWS - 1) // ROWS
    first_row = tl.program_id(0) % row_groups * ROWS
    first_output = tl.program_id(0) // row_groups * OUTPUTS
    n, m = tl.arange(0, OUTPUTS)[None, :, None], tl.arange(0, ROWS)[None, None, :]
    # Past the end the last output, or row, is computed again and not stored.
    n_here = tl.minimum(n_out - first_output, OUTPUTS)
    weight = blocks.to(tl.pointer_type(tl.uint16)) + first_output.to(tl.int64) * row_blocks * WORDS
    weight += tl.minimum(n, n_here - 1) * (row_blocks * WORDS)
    x += tl.minimum(first_row + m, n_rows - 1) * (row_blocks * BLOCK)
    lane = tl.arange(0, LANES)[:, None, None]
    sums = tl.zeros((LANES, OUTPUTS, ROWS), tl.float32)
    for first in range(0, row_blocks, LANES // PIECES):
        here, valid = first + lane // PIECES, None
        if not WHOLE:
            valid = here < row_blocks
            here = tl.minimum(here, row_blocks - 1)
        at = weight + here * WORDS
        sums += PRODUCTS(at, lane % PIECES, x + here * BLOCK, valid, (word0, word1, word2, word3), PIECES)
    result = tl.sum(sums, 0) * RESTORED
    n, m = tl.arange(0, OUTPUTS)[:, None], first_row + tl.arange(0, ROWS)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + first_output + tl.minimum(n, n_here - 1)).to(tl.float32)
    out += first_output + m * n_out + n
    tl.store(out, result.to(out.dtype.element_ty), mask=(n < n_here) & (m < n_rows))


class FewRows(NamedTuple):
    """A type's products with the inputs, and how to launch them."""

    products: object  # Triton function, see few_rows_products.py
    pieces: int  # of a block
    outputs: int
    lanes: int
    n_warps: int
    max_rows: int  # with more, decoding and the library's product are faster
    table: tuple[int, int, int, int] = (0, 0, 0, 0)


# The numbers were chosen by benchmarks/kernels.py, see its results.
FEW_ROWS = {
    "Q4_0": FewRows(q4_0, 2, 8, 32, 1, 8),
    "Q8_0": FewRows(q8_0, 4, 4, 64, 2, 8),
    "Q2_K": FewRows(q2_k, 16, 4, 64, 1, 4),
    "Q3_K": FewRows(q3_k, 16, 4, 64, 2, 4),
    "Q4_K": FewRows(q4_k, 8, 8, 32, 1, 8),
    "Q5_K": FewRows(q5_k, 8, 8, 32, 1, 8),
    "Q6_K": FewRows(q6_k, 16, 4, 32, 1, 8),
    "IQ4_XS": FewRows(iq4_xs, 16, 4, 32, 1, 8, IQ4_WORDS),
}


@on_its_device
def linear_into(blocks: torch.Tensor, name: str, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    n_rows, n_out = out.shape
    tensors = (blocks, x, x if bias is None else bias, out)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    bias_dtype = None if bias is None else bias.dtype
    key = ("few rows", name, x.dtype, bias_dtype, x.shape, n_out, blocks.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        return bound(*addresses)
    kernel, block_format = FEW_ROWS[name], FORMATS[name]
    block_bytes, block_size = block_format.block_bytes, block_format.block_size
    row_blocks = blocks.shape[1] // block_bytes
    rows = min(triton.next_power_of_2(n_rows), ROWS_AT_ONCE)
    numbers = (n_out, row_blocks, n_rows, *kernel.table)
    shape = (kernel.products, block_bytes // 2, block_size, kernel.pieces, rows)
    whole = row_blocks % (kernel.lanes // kernel.pieces) == 0
    n_programs = triton.cdiv(n_out, kernel.outputs) * triton.cdiv(n_rows, rows)
    rest = (*numbers, *shape, bias is not None, whole, kernel.outputs, kernel.lanes)
    bind(key, few_rows_kernel, n_programs, tensors, rest, kernel.n_warps)


def linear(blocks: torch.Tensor, name: str, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias of uint8 blocks [n_out, row_bytes] and x [rows, n_in], contiguous, rows > 0: [rows, n_out] as x."""
    if blocks.data_ptr() % 16:  # blocks of a multiple of four bytes are read as longer words
        blocks = blocks.clone()
    if x.data_ptr() % 16:
        x = x.clone()
    out = torch.empty(len(x), len(blocks), dtype=x.dtype, device=x.device)
    linear_into(blocks, name, x, bias, out)
    return out
