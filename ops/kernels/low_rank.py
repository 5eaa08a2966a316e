"""Decoding with a low-rank addition: the LoRAs of a matrix join its values in registers, before the one rounding."""

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from . import KERNELS
from .launch import BOUND, alignment, bind, on_its_device, table_of

# Values of a row that a program decodes; what it reads of `down` serves all of its rows.
COLUMNS_AT_ONCE = 256
# Ranks are taken in pieces of what a tensor core multiplies at least, or of this.
MOST_RANKS = 64
# Up to a rank: rows of a program and warps, for types with blocks of few parts and of many, whose decoders need more
# registers. H200; see results/kernels.json for what decoding alone takes.
LAUNCHES = {16: ((32, 2), (16, 4)), 64: ((64, 8), (32, 4)), math.inf: ((32, 4), (32, 4))}
MANY_PARTS = 16


@triton.jit
def decode_low_rank_kernel(
    blocks,  # uint8 [n_rows, row_blocks, BLOCK_BYTES]
    out,  # [n_rows, row_blocks * PARTS * VALUES], float16 or bfloat16
    down,  # [rank, row_blocks * PARTS * VALUES], as out
    up,  # [n_rows, rank], as out
    table,  # int8, the codebook of the format
    n_rows,
    row_blocks,
    rank,
    DECODE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,  # BLOCKS * PARTS * VALUES
    RANKS: tl.constexpr,
):
    n_columns = row_blocks * (PARTS * VALUES)
    # Programs of the same columns follow each other, and find their part of `down` in the cache.
    row_groups = (n_rows + ROWS - 1) // ROWS
    first_row = tl.program_id(0) % row_groups * ROWS
    first_block = tl.program_id(0) // row_groups * BLOCKS
    b = tl.arange(0, ROWS * BLOCKS)
    # Past the end the last row is decoded again and not stored.
    at = tl.minimum(first_row + b // BLOCKS, n_rows - 1).to(tl.int64) * row_blocks + first_block + b % BLOCKS
    values = DECODE(blocks + at[:, None, None] * BLOCK_BYTES, table)
    row, column = first_row + tl.arange(0, ROWS), first_block * (PARTS * VALUES) + tl.arange(0, COLUMNS)
    row_here = tl.minimum(row, n_rows - 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS)
        of_up = tl.load(up + row_here[:, None] * rank + k[None, :], mask=k[None, :] < rank, other=0.0)
        of_down = tl.load(down + k[:, None] * n_columns + column[None, :], mask=k[:, None] < rank, other=0.0)
        sums = tl.dot(of_up, of_down, sums)
    result = tl.reshape(values, (ROWS, COLUMNS)) + sums
    place = out + row_here[:, None].to(tl.int64) * n_columns + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=row[:, None] < n_rows)


def why_not(name: str, blocks: torch.Tensor, dtype: torch.dtype, up: torch.Tensor) -> str | None:
    """Why the kernel does not add to the values of uint8 [n_rows, row_bytes] in `dtype`, or None."""
    block_format = FORMATS[name]
    # Rows that are not whole blocks lie as [n_blocks, block_bytes].
    is_by_rows = blocks.shape[0] == up.shape[0]
    if not is_by_rows or blocks.shape[1] // block_format.block_bytes * block_format.block_size % COLUMNS_AT_ONCE:
        return f"their rows are no multiple of {COLUMNS_AT_ONCE} values"
    if dtype != up.dtype or dtype not in (torch.float16, torch.bfloat16):
        return "the tensor cores want the same 16 bits for both"
    return None


@on_its_device
def decode_into(
    blocks: torch.Tensor, name: str, down: torch.Tensor, up: torch.Tensor, out: torch.Tensor
) -> Callable[[], None] | None:
    """uint8 [n_rows, row_bytes] -> out [n_rows, n_columns] = values + up [n_rows, rank] down [rank, n_columns].

    Sums are float32, rounded once. Returns what does the same again, as `launch.decode_into` does.
    """
    table, tensors = table_of(blocks, name), (blocks, out, down, up)
    addresses = (*(tensor.data_ptr() for tensor in tensors), table.data_ptr())
    key = ("low rank", name, out.dtype, blocks.shape, down.shape, blocks.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        bound(*addresses)
    else:
        kernel, block_format = KERNELS[name], FORMATS[name]
        n_rows, rank = blocks.shape[0], down.shape[0]
        row_blocks = blocks.shape[1] // block_format.block_bytes
        at_once = COLUMNS_AT_ONCE // block_format.block_size
        ranks = max(16, min(MOST_RANKS, triton.next_power_of_2(rank)))
        rows, n_warps = next(launch for most, launch in LAUNCHES.items() if rank <= most)[kernel.rows >= MANY_PARTS]
        shape = (block_format.block_bytes, kernel.rows, kernel.values, rows, at_once, COLUMNS_AT_ONCE, ranks)
        n_programs = triton.cdiv(n_rows, rows) * (row_blocks // at_once)
        rest = (n_rows, row_blocks, rank, kernel.decode, *shape)
        bind(key, decode_low_rank_kernel, n_programs, (*tensors, table), rest, n_warps)
    return partial(BOUND[key], *addresses) if key in BOUND else None
