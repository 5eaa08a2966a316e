"""Blocks unlike those that refinement was made for: there ggml's own search may find a lesser error, so both are tried.

Refinement has the trials that pay for values of both signs and many sizes, which all count. It is cheap to tell other
blocks, and in the weights of a model they are few.
"""

from collections.abc import Callable, Iterator

import torch

from .base import BlockFormat
from .exact import sum_rows, with_energy

# Of blocks of 256 Gaussian, Laplace or Student's t values none is beyond these two, of 32 less than one in a hundred.
GREATEST_MEAN = 0.7
GREATEST_LIKENESS = 0.55
# Importance with a lognormal distribution of deviation 1 has a share of 0.37, that of every seventh column 0.14.
LEAST_SHARE = 0.25
# Of the mean importance: what is below does not count.
LITTLE = 1e-3
# No type's scale in float16 reaches as far, and ggml's sums of squares stay finite.
GREATEST_SEARCHED = 2.0**40


def encode_with_least_error(
    block_format: type[BlockFormat],
    refine: Callable[..., torch.Tensor],
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [n, block_size], weights likewise or None for 1 -> uint8 [n, block_bytes].

    Blocks that are unusual are encoded by ggml's search too, and each keeps what has the least weighted squared error.
    """
    blocks = refine(values, weights)
    places = are_unusual(values, weights).nonzero().squeeze(1)
    if not len(places):
        return blocks
    values = values.index_select(0, places)
    weights = torch.ones_like(values) if weights is None else weights.index_select(0, places)
    best = blocks.index_select(0, places)
    error = weighted_error(block_format.decode(best), values, weights)
    for trial in trials_of_ggml(block_format, values, weights):
        new_error = weighted_error(block_format.decode(trial), values, weights)
        better = new_error < error
        best, error = torch.where(better.unsqueeze(1), trial, best), torch.where(better, new_error, error)
    return blocks.index_copy_(0, places, best)


def are_unusual(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """bool [n]: whether one sign prevails, most values are near the greatest, or few of them count."""
    magnitudes = values.abs()
    size, peak = mean(magnitudes), magnitudes.amax(1)
    unusual = (mean(values).abs() > size * GREATEST_MEAN).logical_or_(size > peak * GREATEST_LIKENESS)
    searchable = peak < GREATEST_SEARCHED
    if weights is None:
        return unusual.logical_and_(searchable)
    weight = mean(weights)
    few = weight * weight < mean(weights * weights) * LEAST_SHARE
    counting = magnitudes.masked_fill_(weights < (weight * LITTLE).unsqueeze(1), 0).amax(1)
    return unusual.logical_or_(few).logical_or_(counting < peak * 0.5).logical_and_(searchable)


def mean(values: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [n], k a power of two: by halves, so that the bits are those of every device."""
    share = values * (1 / values.shape[1])
    while share.shape[1] > 1:
        half = share.shape[1] // 2
        share = share[:, :half] + share[:, half:]
    return share.squeeze(1)


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
