"""Refinement of the types with a minimum: a line for each block, or integer scales and minima that share two factors.

A trial is a scale and a minimum with the codes nearest for them. Values are moved to the middle of their group first,
so that sums do not lose what they differ in; `offset` is the minimum for moved values: they are scale * code - offset.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

from .refine_columns import SMALL, Columns, IntegerCodes, chosen, in_half, number_of_least


class IntegerMinima(NamedTuple):
    """How the integer scales and minima of a type, both up to `top`, are sought for groups of `group_size` values.

    A group's range is laid over the codes 0 to q_max and so many more as `margins` say, at either end. d and dmin give
    the greatest scale and minimum an integer of `top` less one of their spares. All integers are moved by each of the
    `moves`; then d and dmin are fitted to the codes, and all moved by each of the `last_moves`.
    """

    group_size: int
    q_max: int
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
    """A fit of codes to values, [columns] each; the sums are those of the codes and of their squares."""

    error: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    sum_q: torch.Tensor
    sum_qq: torch.Tensor


class Shared(NamedTuple):
    """d and dmin [n], which float16 can hold, and integer scales and minima [groups, n]."""

    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def refine_lines(
    values: torch.Tensor, weights: torch.Tensor | None, q_max: int, margins: tuple[tuple[float, float], ...]
) -> tuple[torch.Tensor, torch.Tensor, Columns]:
    """The scale and the least value [n] of each block, which float16 can hold, and the columns encoded with them."""
    columns = Columns(values, weights, values.shape[1], IntegerCodes(0, q_max))
    over = move_to_middle(columns, float("inf"))
    number, error = number_of_least(
        columns.error(*of_halves(over, *halves(over, laid(columns, over, q_max, *pair)))) for pair in margins
    )
    ends = (chosen(ends, number) for ends in zip(*margins, strict=True))
    best = halves(over, laid(columns, over, q_max, *ends))
    columns.encode(*of_halves(over, *best))
    again = halves(over, fit_line(columns, over))
    new_error = columns.error(*of_halves(over, *again))
    d, m = (torch.where(new_error < error, *pair) for pair in zip(again, best, strict=True))
    columns.encode(*of_halves(over, d, m))
    useless = torch.minimum(error, new_error) >= over.energy
    return d.masked_fill_(useless, 0), m.masked_fill_(useless, 0), columns


def halves(over: Range, line: Line) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the least value of a line, as float16 can hold them."""
    return in_half(line.scale), in_half(over.middle - line.offset)


def of_halves(over: Range, d: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the offset for moved values."""
    return d, over.middle - m


def refine_integer_minima(
    values: torch.Tensor, weights: torch.Tensor | None, how: IntegerMinima
) -> tuple[Shared, Columns]:
    """d, dmin, the integer scales and minima, and the columns encoded with them."""
    columns = Columns(values, weights, how.group_size, IntegerCodes(0, how.q_max))
    over = move_to_middle(columns, 0.0)
    line = best_line(columns, over, how.q_max, how.margins)
    best = rounded(columns, over, line, how)
    best, error = best_move(columns, over, best, how.moves, how.top)
    d, dmin = refitted(columns, over, best)
    new, new_error = best_move(columns, over, best._replace(d=d, dmin=dmin), how.last_moves, how.top)
    better = columns.over_groups(new_error) < columns.over_groups(error)
    best = Shared(*(torch.where(better, *pair) for pair in zip(new, best, strict=True)))
    useless = columns.blocks(columns.error(*of_columns(over, best)) >= over.energy)
    scale, minimum = best.scale.masked_fill(useless, 0), best.minimum.masked_fill(useless, 0)
    d, dmin = best.d.masked_fill(scale.amax(0) == 0, 0), best.dmin.masked_fill(minimum.amax(0) == 0, 0)
    return Shared(d, dmin, scale, minimum), columns


def move_to_middle(columns: Columns, least: float) -> Range:
    """Subtract from each column the middle of its range, which `least` may extend downwards."""
    energy = columns.total(columns.x, columns.x)
    low, high = columns.x.amin(0).clamp_(max=least), columns.x.amax(0)
    middle, width = low * 0.5 + high * 0.5, high - low
    columns.x.sub_(middle)
    sum_w = torch.full_like(width, len(columns.x)) if columns.w is None else columns.total()
    sums = columns.total(columns.x), columns.total(columns.x, columns.x)
    return Range(middle, width, middle - least, energy, sum_w, *sums)


def best_line(columns: Columns, over: Range, q_max: int, margins: tuple[float, ...]) -> Line:
    """The line with least error among those that the margins give."""
    pairs = tuple(product(margins, repeat=2))
    number, _ = number_of_least(laid(columns, over, q_max, *pair).error for pair in pairs)
    return laid(columns, over, q_max, *(chosen(ends, number) for ends in zip(*pairs, strict=True)))


def laid(
    columns: Columns, over: Range, q_max: int, at_low: torch.Tensor | float, at_high: torch.Tensor | float
) -> Line:
    """The line for the codes that the range of the values gives, laid over so many more codes at either end."""
    scale = (over.width * (1 / (at_low + at_high + q_max))).clamp_(min=SMALL)
    columns.encode(scale, scale * ((at_high - at_low + q_max) * 0.5))
    return fit_line(columns, over)


def fit_line(columns: Columns, over: Range) -> Line:
    """The line with least error for the codes of the columns."""
    q = columns.q
    sum_q, sum_qq, sum_xq = columns.total(q), columns.total(q, q), columns.total(q, columns.x)
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

    def fitting(*spares: torch.Tensor | float) -> Shared:
        d, dmin = (in_half(top * (1 / (how.top - spare))) for top, spare in zip(tops, spares, strict=True))
        a = (scale / d).round_().clamp_(1, how.top)
        b = (slope * (a * d - scale)).add_(minimum).div_(dmin).round_().clamp_(0, how.top)
        return Shared(d, dmin, a, b)

    def error(*spares: float) -> torch.Tensor:
        d, dmin, a, b = fitting(*spares)
        too_steep, too_low = a * d - scale, b * dmin - minimum
        # The error added to the line's: a quadratic form of what its two numbers are off by, or that of zeros.
        below = (too_low - slope * too_steep).square_().mul_(sum_w)
        tilted = (sum_qq - slope * slope * sum_w).clamp_(min=0).mul_(too_steep).mul_(too_steep)
        return columns.over_groups(torch.minimum(below.add_(tilted), energy))

    pairs = tuple(product(how.scale_spares, how.minimum_spares))
    number, _ = number_of_least(error(*pair) for pair in pairs)
    return fitting(*(chosen(spares, number) for spares in zip(*pairs, strict=True)))


def of_columns(over: Range, shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and offsets [columns] that integers stand for."""
    d, dmin, scale, minimum = shared
    return (d * scale).flatten(), (dmin * minimum).flatten().add_(over.middle)


def moved(shared: Shared, at_scale: torch.Tensor | int, at_minimum: torch.Tensor | int, top: int) -> Shared:
    scale, minimum = (shared.scale + at_scale).clamp_(1, top), (shared.minimum + at_minimum).clamp_(0, top)
    return shared._replace(scale=scale, minimum=minimum)


def best_move(
    columns: Columns, over: Range, start: Shared, moves: Sequence[tuple[int, int]], top: int
) -> tuple[Shared, torch.Tensor]:
    """The integers with least error among those moved, and this error [columns]."""
    number, error = number_of_least(
        columns.error(*of_columns(over, moved(start, at_scale, at_minimum, top))) for at_scale, at_minimum in moves
    )
    best = (columns.blocks(chosen(move, number)) for move in zip(*moves, strict=True))
    return moved(start, *best, top), error


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
