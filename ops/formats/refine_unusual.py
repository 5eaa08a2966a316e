"""Blocks unlike those that refinement was made for: there ggml's own search may find a lesser error, so both are tried.

Refinement has the trials that pay for values of both signs and many sizes, which all count. It is cheap to tell other
blocks, and in the weights of a model they are few.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from .base import BlockFormat
from .exact import sum_rows, with_energy
from .refine import Refinement
from .refine_columns import Columns

# Of blocks of 256 Gaussian, Laplace or Student's t values none is beyond these two, of 32 less than one in a hundred.
GREATEST_MEAN = 0.7
GREATEST_LIKENESS = 0.55
# Importance with a lognormal distribution of deviation 1 has a share of 0.37, that of every seventh column 0.14.
LEAST_SHARE = 0.25
# Of the mean importance: what is below does not count.
LITTLE = 1e-3
# No type's scale in float16 reaches as far, and ggml's sums of squares stay finite.
GREATEST_SEARCHED = 2.0**40


def least_error_encoder(
    block_format: type[BlockFormat], refinement: Refinement
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """A function for one thread: float32 [n, block_size], weights likewise or None for 1 -> uint8 [n, block_bytes].

    Blocks that are unusual are encoded by ggml's search too, and each keeps what has the least weighted squared error.
    Calls with the same n have the same memory: to get new memory from the system takes longer than to fill it.
    """

    @lru_cache(maxsize=1)
    def columns_of(n: int, is_weighted: bool, device: torch.device) -> Columns:
        size, codes = refinement.group_size, refinement.codes
        return Columns(n, block_format.block_size, size, codes, is_weighted, device)

    def encode(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        columns = columns_of(len(values), weights is not None, values.device)
        columns.take(values, weights)
        unusual = are_unusual(columns)
        blocks = refinement.encode(columns)
        places = unusual.nonzero().squeeze(1)
        if not len(places):
            return blocks
        values = values.index_select(0, places)
        weights = torch.ones_like(values) if weights is None else weights.index_select(0, places)
        return blocks.index_copy_(
            0, places, better_of_ggml(block_format, blocks.index_select(0, places), values, weights)
        )

    return encode


def better_of_ggml(
    block_format: type[BlockFormat], best: torch.Tensor, values: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Blocks uint8 [n, block_bytes] of values, or ggml's where their weighted squared error is less."""
    error = weighted_error(block_format.decode(best), values, weights)
    for trial in trials_of_ggml(block_format, values, weights):
        new_error = weighted_error(block_format.decode(trial), values, weights)
        better = new_error < error
        best, error = torch.where(better.unsqueeze(1), trial, best), torch.where(better, new_error, error)
    return best


def are_unusual(columns: Columns) -> torch.Tensor:
    """bool [n]: whether one sign prevails, most values are near the greatest, or few of them count."""
    magnitudes, block_size = torch.abs(columns.x, out=columns.product), columns.x.numel() // columns.n
    size, peak = sum_of_block(columns, magnitudes), columns.blocks(magnitudes.amax(0)).amax(0)
    unusual = (sum_of_block(columns, columns.x).abs() > size * GREATEST_MEAN).logical_or_(
        size > peak * (GREATEST_LIKENESS * block_size)
    )
    searchable = peak < GREATEST_SEARCHED
    if columns.w is None:
        return unusual.logical_and_(searchable)
    weight = sum_of_block(columns, columns.w)
    little = (weight * (LITTLE / block_size)).repeat(columns.groups)
    counting = columns.blocks(magnitudes.masked_fill_(columns.w < little, 0).amax(0)).amax(0)
    squares = sum_of_block(columns, torch.mul(columns.w, columns.w, out=columns.product))
    few = weight * weight < squares * (LEAST_SHARE * block_size)
    return unusual.logical_or_(few).logical_or_(counting < peak * 0.5).logical_and_(searchable)


def sum_of_block(columns: Columns, rows: torch.Tensor) -> torch.Tensor:
    """[n]: the sum over the values of a block, x, w or product of the columns."""
    return columns.over_groups(columns.blocks(columns.sum(rows)))


def trials_of_ggml(
    block_format: type[BlockFormat], values: torch.Tensor, weights: torch.Tensor
) -> Iterator[torch.Tensor]:
    """uint8 [n, block_bytes]: what ggml's encoder makes of the values by themselves, and of these weights.

    In the first generation of formats ggml adds the energy of a row; here a row is a block.
    """
    yield block_format.encode(values)
    yield block_format.encode(values, weights)
    if block_format.energy_of_row:
        yield block_format.encode(values, with_energy(weights, values, 1))


def weighted_error(decoded: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[n]: in float64, which holds all squares, added one by one."""
    squares = (decoded.double() - values).square_().mul_(weights)
    return sum_rows(squares.t().contiguous().unbind(0))
