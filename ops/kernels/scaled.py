"""Decoding to 8 bits with a scale for each row, for matrix products in float8 and int8."""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from . import KERNELS
from .launch import BOUND, alignment, bind, on_its_device, table_of


@triton.jit
def row_peaks_kernel(
    blocks,  # uint8 [n_rows, row_blocks, BLOCK_BYTES]
    peaks,  # float32 [n_rows]
    table,
    row_blocks,
    DECODE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)[:, None, None]
    peak = tl.zeros((BLOCKS, ROWS, VALUES), tl.float32)
    poison = tl.zeros((BLOCKS, ROWS, VALUES), tl.float32)
    for first in range(0, row_blocks, BLOCKS):
        at = row * row_blocks + tl.minimum(first + b, row_blocks - 1)
        values = DECODE(blocks + at * BLOCK_BYTES, table)
        peak = tl.maximum(peak, tl.abs(values))
        # A maximum passes NaN over; infinity and NaN times zero are NaN.
        poison += values * 0
    tl.store(peaks + row, tl.max(tl.ravel(peak), 0) + tl.sum(tl.ravel(poison), 0))


@on_its_device
def row_peaks_into(blocks: torch.Tensor, name: str, peaks: torch.Tensor) -> None:
    """uint8 [n_rows, row_bytes] -> float32 [n_rows]: the greatest magnitude in each, NaN if a value is not finite."""
    kernel, block_format = KERNELS[name], FORMATS[name]
    row_peaks_kernel[(blocks.shape[0],)](
        blocks,
        peaks,
        table_of(blocks, name),
        blocks.shape[1] // block_format.block_bytes,
        kernel.decode,
        block_format.block_bytes,
        kernel.rows,
        kernel.values,
        max(1, kernel.values_per_program // block_format.block_size),
        num_warps=kernel.n_warps,
    )


@triton.jit
def decode_scaled_kernel(
    blocks,  # uint8 [n_blocks, BLOCK_BYTES]
    out,  # int8 or float8_e4m3fn [n_blocks, ROWS * VALUES]
    factors,  # float32 [n_blocks / row_blocks]
    table,
    n_blocks,
    row_blocks,
    DECODE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    b = tl.arange(0, BLOCKS)[:, None, None]
    here = tl.minimum(b, n_blocks - 1 - first)
    factor = tl.load(factors + (first + here) // row_blocks)
    values = DECODE(blocks + first.to(tl.int64) * BLOCK_BYTES + here * BLOCK_BYTES, table) * factor
    if out.dtype.element_ty == tl.int8:
        # To the nearest integer, of two the even one: the sum has no bits left for a fraction, and its low byte is it.
        values = (values + 12582912.0).to(tl.int32, bitcast=True)
    i = (b * ROWS + tl.arange(0, ROWS)[None, :, None]) * VALUES + tl.arange(0, VALUES)[None, None, :]
    at = out + first.to(tl.int64) * (ROWS * VALUES) + i
    tl.store(at, values.to(out.dtype.element_ty), mask=first + b < n_blocks)


@on_its_device
def decode_scaled_into(
    blocks: torch.Tensor, name: str, factors: torch.Tensor, out: torch.Tensor
) -> Callable[[], None] | None:
    """uint8 [n_rows, row_bytes] -> out [n_rows, n_columns]: value times factor of the row, rounded to the nearest.

    out: int8 or float8_e4m3fn, contiguous; the products must lie in its range. factors: float32 [n_rows]. Returns what
    `decode_into` does.
    """
    table = table_of(blocks, name)
    addresses = blocks.data_ptr(), out.data_ptr(), factors.data_ptr(), table.data_ptr()
    key = ("scaled", name, out.dtype, blocks.shape, blocks.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        bound(*addresses)
    else:
        kernel, block_format = KERNELS[name], FORMATS[name]
        block_bytes = block_format.block_bytes
        row_blocks = blocks.shape[1] // block_bytes
        n_blocks = row_blocks * blocks.shape[0]
        values_per_program, n_warps = kernel.eight_bits or (kernel.values_per_program, kernel.n_warps)
        per_program = max(1, values_per_program // block_format.block_size)
        rest = (n_blocks, row_blocks, kernel.decode, block_bytes, kernel.rows, kernel.values, per_program)
        n_programs = triton.cdiv(n_blocks, per_program)
        bind(
            key,
            decode_scaled_kernel,
            n_programs,
            (blocks, out, factors, table),
            rest,
            n_warps,
            enable_fp_fusion=False,
        )
    return partial(BOUND[key], *addresses) if key in BOUND else None


@triton.jit
def quantize_rows_kernel(
    x,  # [n_rows, n_columns] of any float dtype
    out,  # float8_e4m3fn [n_rows, n_columns]
    scales,  # float32 [n_rows]
    n_columns,
    PEAK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    values = tl.load(x + row * n_columns + c, mask=c < n_columns, other=0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(values), 0), 1e-30)
    tl.store(scales + row, peak * (1 / PEAK))
    tl.store(out + row * n_columns + c, (values * (PEAK / peak)).to(out.dtype.element_ty), mask=c < n_columns)


@on_its_device
def quantize_rows_into(
    x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor, peak: float
) -> Callable[[], None] | None:
    """x [n_rows, n_columns] -> float8_e4m3fn `out` of its shape, float32 scales [n_rows, 1]: x is about their product.

    Returns what `decode_into` does.
    """
    addresses = x.data_ptr(), out.data_ptr(), scales.data_ptr()
    key = ("rows", x.dtype, x.shape, x.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        bound(*addresses)
    else:
        n_rows, n_columns = x.shape
        rest = (n_columns, peak, triton.next_power_of_2(n_columns))
        bind(key, quantize_rows_kernel, n_rows, (x, out, scales), rest, n_warps=8)
    return partial(BOUND[key], *addresses) if key in BOUND else None
