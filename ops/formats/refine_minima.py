"""Refinement of the types with a minimum: a line for each block, or integer scales and minima that share two factors.

A trial is a scale and a minimum with the codes nearest for them. Values are moved to the middle of their group first,
so that sums do not lose what they differ in; `offset` is the minimum for moved values: they are scale * code - offset.
"""

from itertools import product
from typing import NamedTuple

import torch

from .refine_columns import SMALL, Columns, chosen, for_trials, in_half, number_of_least


class IntegerMinima(NamedTuple):
    """How the integer scales and minima of a type, both up to `top`, are sought.

    A group's range is laid over the codes from 0 on and so many more as `margins` say, at either end. d and dmin give
    the greatest scale and minimum an integer of `top` less one of their spares. All integers are moved by each of the
    `moves`; then d and dmin are fitted to the codes, and all moved by each of the `last_moves`.
    """

    top: int
    margins: tuple[float, ...]
    scale_spares: tuple[int, ...]
    minimum_spares: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]
    last_moves: tuple[tuple[int, int], ...]


class Range(NamedTuple):
    """Where the values of the columns lie, [columns] each: middle, width, the least offset, and weighted sums."""

    middle: torch.Tensor
    width: torch.Tensor
    least_offset: torch.Tensor
    energy: torch.Tensor
    sum_w: torch.Tensor
    sum_x: torch.Tensor
    sum_xx: torch.Tensor


class Line(NamedTuple):
    """Fits of codes to values, [columns] or [trials, columns]; the sums are those of codes and of their squares."""

    error: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    sum_q: torch.Tensor
    sum_qq: torch.Tensor


class Shared(NamedTuple):
    """d and dmin [n], which float16 can hold, and integer scales and minima [groups, n]; or [trials, ...] of them."""

    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def refine_lines(columns: Columns, margins: tuple[tuple[float, float], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the least value [n] of each block, which float16 can hold and the columns are encoded with."""
    over = move_to_middle(columns, float("inf"))
    trials = halves(over, laid(columns, over, margins))
    number, error = number_of_least(columns.errors(*of_halves(over, *trials)))
    best = tuple(chosen(of_trials, number) for of_trials in trials)
    again = halves(over, fit_line(columns, over, *of_halves(over, *best)))
    new_error = columns.error(*of_halves(over, *again))
    d, m = (torch.where(new_error < error, *pair) for pair in zip(again, best, strict=True))
    columns.encode(*of_halves(over, d, m))
    useless = torch.minimum(error, new_error) >= over.energy
    return d.masked_fill_(useless, 0), m.masked_fill_(useless, 0)


def halves(over: Range, line: Line) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the least value of a line, as float16 can hold them."""
    return in_half(line.scale), in_half(over.middle - line.offset)


def of_halves(over: Range, d: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the offset for moved values."""
    return d, over.middle - m


def refine_integer_minima(columns: Columns, how: IntegerMinima) -> Shared:
    """d, dmin, and the integer scales and minima that the columns are encoded with."""
    over = move_to_middle(columns, 0.0)
    line = best_line(columns, over, tuple(product(how.margins, repeat=2)))
    best = rounded(columns, over, line, how)
    best, error = best_move(columns, over, best, how.moves, how.top)
    d, dmin = refitted(columns, over, best)
    new, new_error = best_move(columns, over, best._replace(d=d, dmin=dmin), how.last_moves, how.top)
    better = columns.over_groups(new_error) < columns.over_groups(error)
    best = Shared(*(torch.where(better, *pair) for pair in zip(new, best, strict=True)))
    useless = columns.blocks(columns.error(*of_columns(over, best)) >= over.energy)
    scale, minimum = best.scale.masked_fill(useless, 0), best.minimum.masked_fill(useless, 0)
    d, dmin = best.d.masked_fill(scale.amax(0) == 0, 0), best.dmin.masked_fill(minimum.amax(0) == 0, 0)
    return Shared(d, dmin, scale, minimum)


def move_to_middle(columns: Columns, least: float) -> Range:
    """Subtract from each column the middle of its range, which `least` may extend downwards."""
    columns.limit()
    energy = columns.total(columns.x, columns.x)
    low, high = columns.x.amin(0).clamp_(max=least), columns.x.amax(0)
    middle, width = low * 0.5 + high * 0.5, high - low
    columns.x.sub_(middle)
    sum_w = torch.full_like(width, len(columns.x)) if columns.w is None else columns.total()
    sums = columns.total(columns.x), columns.total(columns.x, columns.x)
    return Range(middle, width, middle - least, energy, sum_w, *sums)


def best_line(columns: Columns, over: Range, margins: tuple[tuple[float, float], ...]) -> Line:
    """The line with least error among those that the margins give."""
    lines = laid(columns, over, margins)
    number, _ = number_of_least(lines.error.clone())
    return Line(*(chosen(of_lines, number) for of_lines in lines))


def laid(columns: Columns, over: Range, margins: tuple[tuple[float, float], ...]) -> Line:
    """The lines for the codes that the range of the values gives, laid over so many more codes at either end."""
    q_max = columns.codes.high
    widths = for_trials(tuple(1 / (at_low + at_high + q_max) for at_low, at_high in margins), over.width)
    middles = for_trials(tuple((at_high - at_low + q_max) * 0.5 for at_low, at_high in margins), over.width)
    scales = (over.width * widths).clamp_(min=SMALL)
    return fit_lines(columns, over, scales, scales * middles)


def fit_line(columns: Columns, over: Range, scale: torch.Tensor, offset: torch.Tensor) -> Line:
    """The line with least error for the codes that another one gives."""
    (lines,) = zip(*fit_lines(columns, over, scale.unsqueeze(0), offset.unsqueeze(0)), strict=True)
    return Line(*lines)


def fit_lines(columns: Columns, over: Range, scales: torch.Tensor, offsets: torch.Tensor) -> Line:
    """The same for each trial of [trials, columns]."""
    sums = scales.new_empty(len(scales), 3, scales.shape[1])
    x, q = columns.x, columns.q
    for inverse, offset, (sum_q, sum_qq, sum_xq) in zip(scales.reciprocal(), offsets, sums.unbind(), strict=True):
        columns.encode_by(inverse, offset)
        columns.total(q, out=sum_q)
        columns.total(q, q, out=sum_qq)
        columns.total(q, x, out=sum_xq)
    sum_q, sum_qq, sum_xq = sums.unbind(1)
    both = over.sum_w * sum_qq
    determinant = both - sum_q * sum_q
    determinant.masked_fill_(determinant <= both * 1e-6, float("inf"))
    offset = (sum_q * sum_xq - sum_qq * over.sum_x).div_(determinant)
    offset = torch.maximum(offset, over.least_offset)
    along = offset * sum_q + sum_xq
    scale = along / sum_qq.clamp(min=SMALL)
    error = (offset * over.sum_w + over.sum_x * 2).mul_(offset).add_(over.sum_xx) - along * scale
    return Line(error.clamp_(min=0), scale.clamp(min=0), offset, sum_q, sum_qq)


def rounded(columns: Columns, over: Range, line: Line, how: IntegerMinima) -> Shared:
    """Shared for the lines; of the d and dmin that the spares give, those with the least error."""
    scale, minimum = columns.blocks(line.scale), columns.blocks(line.offset - over.middle)
    slope, sum_qq, sum_w = (columns.blocks(of) for of in (line.sum_q / over.sum_w, line.sum_qq, over.sum_w))
    tops, energy = (scale.amax(0), minimum.amax(0)), columns.blocks(over.energy)

    pairs = tuple(product(how.scale_spares, how.minimum_spares))
    shares = zip(*((1 / (how.top - spare) for spare in pair) for pair in pairs), strict=True)
    d, dmin = (in_half(top * for_trials(of_top, top)) for top, of_top in zip(tops, shares, strict=True))
    steps, minimum_steps = d.unsqueeze(1), dmin.unsqueeze(1)
    a = (scale / steps).round_().clamp_(1, how.top)
    too_steep = a * steps - scale
    b = (slope * too_steep).add_(minimum).div_(minimum_steps).round_().clamp_(0, how.top)
    too_low = b * minimum_steps - minimum
    # The error added to the line's: a quadratic form of what its two numbers are off by, or that of zeros.
    below = (too_low - slope * too_steep).square_().mul_(sum_w)
    tilted = (sum_qq - slope * slope * sum_w).clamp_(min=0) * too_steep * too_steep
    number, _ = number_of_least(columns.over_groups(torch.minimum(below.add_(tilted), energy)))
    of_groups = number.expand(columns.groups, -1)
    return Shared(chosen(d, number), chosen(dmin, number), chosen(a, of_groups), chosen(b, of_groups))


def of_columns(over: Range, shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and offsets [..., columns] that integers stand for."""
    d, dmin, scale, minimum = shared
    return (d * scale).flatten(-2), (dmin * minimum).flatten(-2).add_(over.middle)


def best_move(
    columns: Columns, over: Range, start: Shared, moves: tuple[tuple[int, int], ...], top: int
) -> tuple[Shared, torch.Tensor]:
    """The integers with least error among those moved, and this error [groups, n]."""
    of_scale, of_minimum = (for_trials(move, start.scale) for move in zip(*moves, strict=True))
    scales, minima = (start.scale + of_scale).clamp_(1, top), (start.minimum + of_minimum).clamp_(0, top)
    moved = start._replace(scale=scales, minimum=minima)
    least = number_of_least(columns.errors(*of_columns(over, moved)))
    number, error = map(columns.blocks, least)
    return start._replace(scale=chosen(scales, number), minimum=chosen(minima, number)), error


def refitted(columns: Columns, over: Range, best: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin with least error for the codes of whole blocks."""
    scale, offset = of_columns(over, best)
    columns.encode(scale, offset)
    rest, q = columns.t.sub_(columns.q), columns.q
    level, along, sum_q, sum_qq = (
        columns.blocks(columns.total(*factors)) for factors in ((rest,), (rest, q), (q,), (q, q))
    )
    d, dmin, a, b = best
    scale = d * a
    aa, ab, bb, rest_a, rest_b = (
        columns.over_groups(terms)
        for terms in (
            sum_qq * a * a,
            sum_q * a * b,
            columns.blocks(over.sum_w) * b * b,
            along * scale * a,
            level * scale * b,
        )
    )
    bb.masked_fill_(bb == 0, 1)
    determinant = aa * bb - ab * ab
    determinant.masked_fill_(determinant <= aa * bb * 1e-6, float("inf"))
    return (
        in_half(d + (rest_a * bb - rest_b * ab) / determinant),
        in_half(dmin + (rest_a * ab - rest_b * aa) / determinant),
    )
