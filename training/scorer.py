"""What a picture shows, read back by plain geometry, and how much of a caption that is.

No network: the background is the border's colour, things are what differs from it and hangs together, and a thing has
the shape whose outline, drawn at its place with its area, covers it best.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .scenes import COLOURS, RELATIONS, SHAPES, SIDE, SIZES, Caption, Thing, rgb

NAMES = tuple(COLOURS)
PALETTE = rgb(NAMES)
BORDER = 3
# Distance of two colours of 0 to 1 that are not the same; the closest of the palette are 0.35 apart.
DIFFERENT = 0.15
# Pixels of the smallest thing; the smallest that is drawn has 190.
SMALLEST = 40
# So that a picture full of specks is not compared in every order.
MOST_THINGS = 4
MIDDLE = torch.tensor([SIDE / 2])
PARTS = ("background", "count", "colour", "shape", "size", "relation")


@dataclass(frozen=True)
class Seen:
    """A thing of a picture and its centre in pixels, y down."""

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    background: str
    seen: tuple[Seen, ...]


def inside(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """bool [SIDE, SIDE]: the pixels of a shape with its centre at x, y."""
    pixels = torch.arange(SIDE) + 0.5
    rows, columns = torch.meshgrid((pixels - y) / radius, (pixels - x) / radius, indexing="ij")
    return SHAPES[shape](columns, rows) < 0


# Of the shape with radius 1.
AREAS = {shape: float(inside(shape, MIDDLE, MIDDLE, 40.0).sum()) / 40.0**2 for shape in SHAPES}
BOUNDS = [math.sqrt(one * other) for one, other in itertools.pairwise(SIZES.values())]


def colour_name(colour: torch.Tensor) -> str:
    return NAMES[int((PALETTE - colour).norm(dim=1).argmin())]


def size_name(radius: float) -> str:
    return tuple(SIZES)[sum(radius > bound for bound in BOUNDS)]


def components(mask: torch.Tensor) -> torch.Tensor:
    """int64 [N, SIDE, SIDE]: pixels of `mask` that touch have the same number, others 0."""
    numbers = torch.arange(1, SIDE * SIDE + 1, dtype=torch.float32).view(SIDE, SIDE) * mask
    before = None
    while before is None or not torch.equal(before, numbers):
        before = numbers
        for _ in range(8):
            numbers = F.max_pool2d(numbers[:, None], 3, stride=1, padding=1)[:, 0] * mask
    return numbers.long()


def shape_of(mask: torch.Tensor) -> tuple[str, float, float, float]:
    """Name, radius and centre of the shape that a thing's pixels are."""
    rows, columns = mask.nonzero(as_tuple=True)
    x, y = columns.double().mean() + 0.5, rows.double().mean() + 0.5
    fits = {}
    for shape, area in AREAS.items():
        radius = math.sqrt(len(rows) / area)
        ideal = inside(shape, x, y, radius)
        fits[shape] = (float((ideal & mask).sum() / (ideal | mask).sum()), radius)
    best = max(fits, key=lambda shape: fits[shape][0])
    return best, fits[best][1], float(x), float(y)


def see(picture: torch.Tensor, difference: torch.Tensor, mask: torch.Tensor) -> Seen:
    """The thing of `mask` ([SIDE, SIDE]); its outline runs half-way between its colour and the background's."""
    colour = picture[:, mask].median(dim=1).values
    half = difference[mask].median() / 2
    shape, radius, x, y = shape_of(mask & (difference >= half))
    return Seen(Thing(size_name(radius), colour_name(colour), shape), x, y)


def read(pictures: torch.Tensor) -> list[Reading]:
    """What each of [N, 3, SIDE, SIDE] of 0 to 1 shows, largest things first."""
    pictures = pictures.detach().float().cpu()
    frame = torch.ones(SIDE, SIDE, dtype=torch.bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    backgrounds = pictures[:, :, frame].median(dim=2).values
    differences = (pictures - backgrounds[:, :, None, None]).norm(dim=1)
    readings = []
    for number, picture in enumerate(components(differences > DIFFERENT)):
        labels, areas = picture[picture > 0].unique(return_counts=True)
        largest = [label for area, label in sorted(zip(areas, labels, strict=True), reverse=True) if area >= SMALLEST]
        seen = [see(pictures[number], differences[number], picture == label) for label in largest[:MOST_THINGS]]
        readings.append(Reading(colour_name(backgrounds[number]), tuple(seen)))
    return readings


def stand(relation: str, first: Seen, second: Seen) -> bool:
    """Whether the first is, say, left of the second, and more so than above or below."""
    right, down = RELATIONS[relation]
    across, along = second.x - first.x, second.y - first.y
    return right * across > abs(along) if right else down * along > abs(across)


def matches(caption: Caption, reading: Reading, order: Sequence[Seen | None]) -> list[tuple[str, bool]]:
    """(part, whether it is right) of all that a caption asks, where order[i] is taken for its thing i."""
    parts = [("background", reading.background == caption.background)]
    parts.append(("count", len(reading.seen) == len(caption.things)))
    for wanted, seen in zip(caption.things, order, strict=True):
        for part in ("colour", "shape", "size"):
            parts.append((part, seen is not None and getattr(seen.thing, part) == getattr(wanted, part)))
    if caption.relation:
        parts.append(("relation", None not in order and stand(caption.relation, *order)))
    return parts


def share_right(parts: Sequence[tuple[str, bool]]) -> float:
    return sum(right for _, right in parts) / len(parts)


def judge(caption: Caption, reading: Reading) -> list[tuple[str, bool]]:
    """`matches` of the order in which the most is right."""
    missing = [None] * max(0, len(caption.things) - len(reading.seen))
    orders = itertools.permutations((*reading.seen, *missing), len(caption.things))
    return max(
        (matches(caption, reading, order) for order in orders), key=lambda parts: sum(right for _, right in parts)
    )


def scores(pictures: torch.Tensor, captions: Sequence[Caption]) -> dict[str, float]:
    """Of all parts asked, how many are right (0 to 1): under "all", and for each of PARTS that is asked at all."""
    judged = [
        part for caption, reading in zip(captions, read(pictures), strict=True) for part in judge(caption, reading)
    ]
    groups = {"all": judged} | {name: [part for part in judged if part[0] == name] for name in PARTS}
    return {name: sum(right for _, right in parts) / len(parts) for name, parts in groups.items() if parts}


def accuracy(pictures: torch.Tensor, captions: Sequence[Caption]) -> float:
    return scores(pictures, captions)["all"]
