"""Refinement of the types without a minimum: a scale for each block, or integer scales that share one.

A trial is a scale with the codes nearest for it. Which one is best is mostly luck of the rounding, so there are many,
and of both signs, since codes reach farther below zero than above.
"""

from typing import NamedTuple

import torch

from .refine_columns import SMALL, CodebookCodes, Columns, IntegerCodes, chosen, in_half, number_of_least


class IntegerScales(NamedTuple):
    """How the integer scales of a type, from -top to top - 1, are sought for groups of `group_size` values.

    `stored_zero` is added to them in the file. d puts the value farthest from zero in the block on the code -peak with
    the scale -top / room. The scale that does so with that of a group starts its trials: steps are added to its size,
    with the same or the opposite sign. Then the best scale is tried again, with the `last_steps`, for d fitted to the
    codes and for d of no room.
    """

    group_size: int
    codes: IntegerCodes | CodebookCodes
    peak: int
    top: int
    stored_zero: int
    room: float
    steps: tuple[int, ...]
    opposite_steps: tuple[int, ...]
    last_steps: tuple[int, ...]


def refine_scale(
    values: torch.Tensor,
    weights: torch.Tensor | None,
    codes: IntegerCodes | CodebookCodes,
    trials: tuple[float, ...],
) -> tuple[torch.Tensor, Columns]:
    """The scale [n] of each block, which float16 can hold, and the columns encoded with it.

    Each trial puts the value farthest from zero on a code, or its negative on that of the other sign; the best one is
    fitted to the codes that it gives.
    """
    columns = Columns(values, weights, values.shape[1], codes)
    peak = farthest(columns.x.amin(0), columns.x.amax(0))
    number, error = number_of_least(columns.error(in_half(peak / trial)) for trial in trials)
    scale = in_half(peak / chosen(trials, number))
    for _ in range(2):
        fitted = in_half(fit(columns, scale))
        new_error = columns.error(fitted)
        better = new_error < error
        scale, error = torch.where(better, fitted, scale), torch.where(better, new_error, error)
    columns.encode(scale)
    return scale.masked_fill_(error >= columns.total(columns.x, columns.x), 0), columns


def fit(columns: Columns, scale: torch.Tensor) -> torch.Tensor:
    """The scale [columns] with least error for the codes that another one gives."""
    columns.encode(scale)
    rest, q = columns.t.sub_(columns.q), columns.q
    return scale * (columns.total(rest, q) / columns.total(q, q).clamp_(min=SMALL) + 1)


def refine_integer_scales(
    values: torch.Tensor, weights: torch.Tensor | None, how: IntegerScales
) -> tuple[torch.Tensor, torch.Tensor, Columns]:
    """d [n], which float16 can hold, the integer scales [groups, n] and the columns encoded with them."""
    columns = Columns(values, weights, how.group_size, how.codes)
    low, high = columns.blocks(columns.x.amin(0)), columns.blocks(columns.x.amax(0))
    plain = in_half(farthest(low.amin(0), high.amax(0)) * (1 / (how.peak * how.top)))
    d = in_half(plain * how.room)
    start = farthest(low, high).div(d * -how.peak).round_()
    size, sign = start.abs(), torch.ones_like(start).copysign(start)
    steps = how.steps + how.opposite_steps
    signs = (1,) * len(how.steps) + (-1,) * len(how.opposite_steps)
    number, error = number_of_least(
        columns.error((d * moved(size, step, sign * same, how.top)).flatten())
        for step, same in zip(steps, signs, strict=True)
    )
    step, same = (columns.blocks(chosen(table, number)) for table in (steps, signs))
    scale = moved(size, step, sign * same, how.top)
    d, scale, error = retried(columns, d, scale, error, fitted(columns, d, scale), scale.sign(), how)
    d, scale, _ = retried(columns, d, scale, error, plain, sign, how)
    useless = columns.error((d * scale).flatten()) >= columns.total(columns.x, columns.x)
    scale = scale.masked_fill(columns.blocks(useless), 0)
    return d.masked_fill(scale.abs().amax(0) == 0, 0), scale, columns


def moved(size: torch.Tensor, step: torch.Tensor | float, sign: torch.Tensor, top: int) -> torch.Tensor:
    """Integer scales not 0: of a size so many steps more, with a sign."""
    return ((size + step).clamp_(1, top) * sign).clamp_(-top, top - 1)


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
    sign: torch.Tensor,
    how: IntegerScales,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d, scale and error as they are, or where that is less with a new d, signs and the best scales near by."""
    size = (scale * (d / new_d)).abs().round_()
    number, new_error = number_of_least(
        columns.error((new_d * moved(size, step, sign, how.top)).flatten()) for step in how.last_steps
    )
    new_scale = moved(size, columns.blocks(chosen(how.last_steps, number)), sign, how.top)
    better = columns.over_groups(new_error) < columns.over_groups(error)
    error = torch.where(better, columns.blocks(new_error), columns.blocks(error))
    return torch.where(better, new_d, d), torch.where(better, new_scale, scale), error


def farthest(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The one farther from zero of the least and the greatest values."""
    return torch.where(high > -low, high, low)
