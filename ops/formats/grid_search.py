"""The search of the I-quants whose groups of values are points of a grid: scales and points with least weighted error.

Every point is tried for every group, by a product of matrices of whole numbers so small that all its sums are exact:
the bytes do not depend on the machine as long as float32 products are not left to TF32 or bfloat16. Values are turned
into columns [coordinates, groups of a sub-block, sub-blocks], so that a sum runs over rows.
"""

from functools import cache
from typing import NamedTuple

import torch

from .base import BlockFormat, pack_fields
from .codebooks import LEVELS_OF_GRID, codebook
from .exact import nearest, square_root, sum_rows

# What is worked on at once, on the CPU in its cache; elsewhere memory is the limit.
VALUES_PER_PASS = {"cpu": 1 << 17}
DISTANCES_PER_PASS = {"cpu": 1 << 20}

# The greatest sum of products: with what rounding adds, below the 2^24 up to which float32 holds every whole number.
GREATEST_SUM = float(1 << 23)

# Below this magnitude a block is zero in float16.
ZERO_BELOW = 1e-30

# Steps that are tried for a sub-block before its points are searched.
FIRST_STEPS = 8

# Distances of a group of which only the least is compared with others.
RUN = 64


class Columns(NamedTuple):
    """Magnitudes, their weights and the products of both, float32 [coordinates, groups, n]."""

    a: torch.Tensor
    w: torch.Tensor
    wa: torch.Tensor


class Fit(NamedTuple):
    """Sub-blocks with given scales [blocks, sub-blocks]: weighted sums likewise, and points.

    With points p in units of d: sumlx and suml2 are the sums of w * a * p and w * p * p; index: int64 [groups, n].
    """

    scale: torch.Tensor
    sumlx: torch.Tensor
    suml2: torch.Tensor
    index: torch.Tensor


def search_grid(
    cls: type[BlockFormat], values: torch.Tensor, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find what blocks of a type hold for values [n, 256], with squared errors weighted by importance, or all alike.

    The class says how: the grid of its name, group_size values to a sub-block whose step is unit * d * (2 * scale + 1),
    whether the minus signs of 8 values must be even in number, and how many scales of a sub-block are searched.
    -> d float16 [n, 1], scales uint8 [n, sub-blocks], grid indices int64 [n, groups], sign bits uint8 [n, 32].
    """
    weights = torch.ones_like(values) if importance is None else relative(importance)
    blocks = VALUES_PER_PASS.get(values.device.type, 1 << 22) // cls.block_size
    parts = [search_blocks(cls, *pair) for pair in zip(values.split(blocks), weights.split(blocks), strict=True)]
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def relative(importance: torch.Tensor) -> torch.Tensor:
    """[n, k] over the greatest of each row; ones where that is zero."""
    top = importance.amax(1, keepdim=True)
    return torch.where(top > 0, importance / top, 1)


def search_blocks(
    cls: type[BlockFormat], values: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As search_grid for weights up to 1, all blocks at once.

    d makes the greatest step that of scale 15; at last it fits the points best. From the nearest one on, the scale of a
    sub-block goes where the step that fits its points best lies.
    """
    top = values.abs().amax(1, keepdim=True).clamp_(min=ZERO_BELOW)
    magnitudes, signs = split_signs(values / top, weights, cls.even_signs)
    columns = columns_of(cls, magnitudes, weights)
    steps = first_steps(columns, LEVELS_OF_GRID[cls.__name__]).view(-1, cls.block_size // cls.group_size)
    _, d = half_and_relative(steps.amax(1, keepdim=True) / (31 * cls.unit), top)
    scale = nearest((steps / (d * cls.unit)).sub_(1).div_(2), 0, 15)
    best = fit(cls, columns, d, scale)
    for _ in range(cls.searches - 1):
        _, d = half_and_relative(fitted(best), top)
        further = torch.where(best.sumlx > best.suml2 * d, best.scale + 1, best.scale - 1).clamp_(0, 15)
        best = better_of(best, fit(cls, columns, d, further), d)
    d, _ = half_and_relative(fitted(best), top)
    index = best.index.t().reshape(len(values), len(best.index) * best.scale.shape[1])
    return d, best.scale.to(torch.uint8), index, signs


def split_signs(values: torch.Tensor, weights: torch.Tensor, even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, 256] -> magnitudes, sign bits uint8 [n, 32].

    Where the minus signs of 8 values must be even in number and are not, the value that matters least has the wrong
    sign: its magnitude is negative.
    """
    negative, magnitudes = (values < 0).unflatten(1, (-1, 8)), values.abs().unflatten(1, (-1, 8))
    if even:
        least = (magnitudes * weights.view_as(magnitudes)).argmin(2, keepdim=True)
        odd = negative.sum(2, keepdim=True) % 2 == 1
        wrong = torch.zeros_like(negative).scatter_(2, least, odd)
        negative, magnitudes = negative ^ wrong, torch.where(wrong, -magnitudes, magnitudes)
    return magnitudes.flatten(1), pack_fields(negative.flatten(1).to(torch.uint8), 1)


def columns_of(cls: type[BlockFormat], magnitudes: torch.Tensor, weights: torch.Tensor) -> Columns:
    """Of [blocks, 256] each."""
    coordinates = codebook(cls.__name__, magnitudes.device).shape[1]
    groups = (item.reshape(-1, cls.group_size // coordinates, coordinates) for item in (magnitudes, weights))
    a, w = (item.permute(2, 1, 0).contiguous() for item in groups)
    return Columns(a, w, w * a)


def sum_all(values: torch.Tensor) -> torch.Tensor:
    """[coordinates, groups, n] -> [n]."""
    return sum_rows(values.flatten(0, 1).unbind(0))


def first_steps(columns: Columns, levels: tuple[int, ...]) -> torch.Tensor:
    """The best of some steps [n] of sub-blocks, as if each value could have any level, and the levels were even."""
    a, w, wa = columns
    distance = (levels[-1] - levels[0]) / (len(levels) - 1)
    start, end = levels[0] / distance, levels[-1] / distance
    low = square_root(sum_all(wa * a) / sum_all(w)).mul_(0.9 / end)
    high = torch.where(w > 0, a, 0).amax((0, 1)).mul_(1.05 / end)
    best_step, best, y = torch.zeros_like(low), torch.zeros_like(low), torch.empty_like(a)
    for part in range(FIRST_STEPS):
        step = low + (high - low) * (part / (FIRST_STEPS - 1))
        nearest(torch.div(a, step, out=y).sub_(start), 0, len(levels) - 1).add_(start)
        sumlx, suml2 = sum_all(wa * y), sum_all(y.square_().mul_(w))
        step = sumlx / suml2
        better = step * sumlx > best
        best_step, best = torch.where(better, step, best_step), torch.where(better, step * sumlx, best)
    return best_step / distance


def half_and_relative(d: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d [n, 1] in units of top -> d as float16, and that in units of top (1 where it is zero)."""
    rounded = (d * top).clamp_(max=torch.finfo(torch.float16).max).half()
    return rounded, torch.where(rounded > 0, rounded.float() / top, 1)


def fit(cls: type[BlockFormat], columns: Columns, d: torch.Tensor, scale: torch.Tensor) -> Fit:
    """The best points for d [blocks, 1] and scales [blocks, sub-blocks]."""
    multiple = (scale * 2 + 1) * cls.unit
    index = nearest_points(cls.__name__, columns.a / (d * multiple).flatten(), columns.w)
    points = codebook(cls.__name__, index.device).float().t().contiguous()
    points = points.index_select(1, index.flatten()).view_as(columns.a)
    sumlx = sum_all(columns.wa * points).view_as(scale).mul_(multiple)
    suml2 = sum_all(points.square_().mul_(columns.w)).view_as(scale).mul_(multiple * multiple)
    return Fit(scale, sumlx, suml2, index)


def fitted(found: Fit) -> torch.Tensor:
    """The d [blocks, 1] with least error."""
    return (sum_rows(found.sumlx.unbind(1)) / sum_rows(found.suml2.unbind(1))).unsqueeze(1)


def better_of(old: Fit, new: Fit, d: torch.Tensor) -> Fit:
    """Of each sub-block the fit with less error for d, of which d * (2 * sumlx - d * suml2) is taken away."""
    better = new.sumlx * 2 - new.suml2 * d > old.sumlx * 2 - old.suml2 * d
    by_sub_block = (torch.where(better, *pair) for pair in zip(new[:-1], old[:-1], strict=True))
    return Fit(*by_sub_block, torch.where(better.view(-1), new.index, old.index))


def nearest_points(grid: str, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The points with the least weighted squared distance: [coordinates, groups, n] each -> indices int64 [groups, n].

    Of w * (p - t) ** 2, the part p ** 2 * w - 2 * p * t * w depends on the point. Both factors w and -2 * t * w are
    rounded to whole numbers, as great as exact sums allow; p and t count from the grid's centre.
    """
    features, centre, reach = features_of(grid, targets.device)
    t, w = (targets - centre).flatten(1), weights.flatten(1)
    greatest = sum_rows(t.abs().mul_(2).add_(reach).mul_(reach).mul_(w).unbind(0)).clamp_(min=ZERO_BELOW)
    w = w * (torch.full_like(greatest, GREATEST_SUM) / greatest)
    factors = torch.cat((w, t.mul_(w).mul_(-2))).round_()
    index = torch.empty(t.shape[1], dtype=torch.int64, device=t.device)
    groups = DISTANCES_PER_PASS.get(t.device.type, 1 << 28) // features.shape[1]
    distances = t.new_empty(min(groups, t.shape[1]), features.shape[1])
    for some, found in zip(factors.split(groups, 1), index.split(groups), strict=True):
        found.copy_(argmin(torch.mm(some.t(), features, out=distances[: len(found)])))
    return index.view(targets.shape[1:])


@cache
def features_of(grid: str, device: torch.device) -> tuple[torch.Tensor, int, int]:
    """The squares and the values of the points, float32 [2 * coordinates, points], counted from a centre.

    -> features, the centre, and how far a coordinate can be from it; whole numbers all of them.
    """
    levels = LEVELS_OF_GRID[grid]
    centre = (levels[0] + levels[-1]) // 2
    with torch.inference_mode(False):
        points = codebook(grid, device).float().t() - centre
        return torch.cat((points * points, points)), centre, max(levels[-1] - centre, centre - levels[0])


def argmin(distances: torch.Tensor) -> torch.Tensor:
    """[n, RUN * k] -> int64 [n]: where the first of the least is, found by runs, since torch searches one by one."""
    k = distances.shape[1] // RUN
    runs = distances.view(-1, RUN)
    run = runs.amin(1).view(-1, k).argmin(1)
    start = torch.arange(0, len(runs), k, device=run.device)
    return runs.index_select(0, run + start).argmin(1).add_(run, alpha=RUN)
