"""Refinement of the types without a minimum: a scale for each block, or integer scales that share one.

A trial is a scale with the codes nearest for it. Which one is best is mostly luck of the rounding, so there are many,
and of both signs, since codes reach farther below zero than above.
"""

from typing import NamedTuple

import torch

from .refine_columns import SMALL, Columns, chosen, for_trials, in_half, number_of_least


class IntegerScales(NamedTuple):
    """How the integer scales of a type, from -top to top - 1, are sought.

    `stored_zero` is added to them in the file. d puts the value farthest from zero in the block on the code -peak with
    the scale -top / room. The scale that does so with that of a group starts its trials: steps are added to its size,
    with the same or the opposite sign. A far smaller size suits a group whose farthest value weighs little. Then the
    best scale is tried again, with the `last_steps`, for d fitted to the codes.
    """

    peak: int
    top: int
    stored_zero: int
    room: float
    steps: tuple[int, ...]
    opposite_steps: tuple[int, ...]
    last_steps: tuple[int, ...]


def refine_scale(columns: Columns, trials: tuple[float, ...]) -> torch.Tensor:
    """The scale [n] of each block, which float16 can hold and the columns are encoded with.

    Each trial puts the value farthest from zero on a code, or its negative on that of the other sign; the best one is
    fitted to the codes that it gives.
    """
    columns.limit()
    peak = farthest(columns.x.amin(0), columns.x.amax(0))
    scales = in_half(peak / for_trials(trials, peak))
    number, error = number_of_least(columns.errors(scales))
    scale = chosen(scales, number)
    for _ in range(2):
        fitted = in_half(fit(columns, scale))
        new_error = columns.error(fitted)
        better = new_error < error
        scale, error = torch.where(better, fitted, scale), torch.where(better, new_error, error)
    columns.encode(scale)
    return scale.masked_fill_(error >= columns.total(columns.x, columns.x), 0)


def fit(columns: Columns, scale: torch.Tensor) -> torch.Tensor:
    """The scale [columns] with least error for the codes that another one gives."""
    columns.encode(scale)
    rest, q = columns.t.sub_(columns.q), columns.q
    return scale * (columns.total(rest, q) / columns.total(q, q).clamp_(min=SMALL) + 1)


def refine_integer_scales(columns: Columns, how: IntegerScales) -> tuple[torch.Tensor, torch.Tensor]:
    """d [n], which float16 can hold, and the integer scales [groups, n] that the columns are encoded with."""
    columns.limit()
    low, high = columns.blocks(columns.x.amin(0)), columns.blocks(columns.x.amax(0))
    d = in_half(farthest(low.amin(0), high.amax(0)) * (how.room / (how.peak * how.top)))
    start = farthest(low, high).div(d * -how.peak).round_()
    size, sign = start.abs(), torch.ones_like(start).copysign(start)
    steps = for_trials(how.steps + how.opposite_steps, size)
    signs = for_trials((1,) * len(how.steps) + (-1,) * len(how.opposite_steps), size)
    scale, error = best_of(columns, d, moved(size, steps, sign * signs, how.top))
    d, scale, error = retried(columns, d, scale, error, fitted(columns, d, scale), how)
    columns.encode((d * scale).flatten())
    useless = error >= columns.blocks(columns.total(columns.x, columns.x))
    scale.masked_fill_(useless, 0)
    return d.masked_fill_(scale.abs().amax(0) == 0, 0), scale


def best_of(columns: Columns, d: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer scales with least error among [trials, groups, n], and this error, [groups, n] each."""
    number, error = map(columns.blocks, number_of_least(columns.errors((d * scales).flatten(1))))
    return chosen(scales, number), error


def moved(size: torch.Tensor, step: torch.Tensor, sign: torch.Tensor, top: int) -> torch.Tensor:
    """Integer scales not 0: of a size so many steps more, with a sign."""
    return (size + step).clamp_(1, top).mul_(sign).clamp_(-top, top - 1)


def fitted(columns: Columns, d: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """d with least error for the codes of the whole block."""
    columns.encode((d * scale).flatten())
    rest, q = columns.t.sub_(columns.q), columns.q
    along, norm = columns.blocks(columns.total(rest, q)), columns.blocks(columns.total(q, q))
    squares = scale * scale
    moved_by = columns.over_groups(squares * along) / columns.over_groups(squares * norm).clamp_(min=SMALL)
    return in_half(d * (moved_by + 1))


def retried(
    columns: Columns,
    d: torch.Tensor,
    scale: torch.Tensor,
    error: torch.Tensor,
    new_d: torch.Tensor,
    how: IntegerScales,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d, scale and error as they are, or where that is less with a new d and the best scales near by."""
    size = (scale * (d / new_d)).abs().round_()
    steps = for_trials(how.last_steps, size)
    new_scale, new_error = best_of(columns, new_d, moved(size, steps, scale.sign(), how.top))
    better = columns.over_groups(new_error) < columns.over_groups(error)
    return tuple(torch.where(better, *pair) for pair in ((new_d, d), (new_scale, scale), (new_error, error)))


def farthest(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The one farther from zero of the least and the greatest values."""
    return torch.where(high > -low, high, low)
