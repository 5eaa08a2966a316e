"""Captions of a small grammar, and pictures of them drawn from signed distances.

"a large red circle left of a small blue square on a green background", or one thing alone on its background.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

# Pixels of a picture's side.
SIDE = 128

# Red, green and blue of 255.
COLOURS = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 30),
    "green": (30, 160, 50),
    "cyan": (60, 215, 230),
    "blue": (30, 60, 215),
    "purple": (130, 40, 170),
    "pink": (255, 150, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "brown": (120, 70, 30),
}
# The model never sees it; the LoRA teaches it.
NEW_COLOUR = "brown"
BASE_COLOURS = tuple(colour for colour in COLOURS if colour != NEW_COLOUR)

# Radius in pixels of a circle of that size.
SIZES = {"small": 12.0, "medium": 17.0, "large": 24.0}

# Where the second thing is, seen from the first: steps to the right and down.
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}

# Pixels from the middle of the picture to the things of a pair, and how far anything strays from its place.
PAIR_OFFSET, PAIR_STRAY, CROSS_STRAY, LONE_STRAY = 32.0, 2.0, 4.0, 6.0
RADIUS_STRAY = 0.03
LONE_SHARE = 0.25


def circle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 1


def square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88


def triangle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Upright and equilateral, around its centroid."""
    return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.575


def star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Five points, one of them up; every half point is folded onto the same one."""
    outer, inner, sector = 1.15, 0.5, 2 * math.pi / 5
    angle = ((torch.atan2(x, -y) + sector / 2) % sector - sector / 2).abs()
    distance = torch.hypot(x, y)
    edge_x, edge_y = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    along, across = distance * angle.cos() - outer, distance * angle.sin()
    return (edge_y * along - edge_x * across) / math.hypot(edge_x, edge_y)


def cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    longer, shorter = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(longer - 1, shorter - 0.36)


# Each takes coordinates from the centre, y down, in units of the radius; negative inside.
SHAPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
}


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """One thing and no relation, or two things; str() is the sentence."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def __str__(self) -> str:
        subject = f" {self.relation} ".join(map(str, self.things))
        return f"{subject} on a {self.background} background"


def any_of(words: Sequence[str]) -> str:
    return f"({'|'.join(words)})"


THING = f"a {any_of(SIZES)} {any_of(COLOURS)} {any_of(SHAPES)}"
SENTENCE = re.compile(f"{THING}(?: {any_of(RELATIONS)} {THING})? on a {any_of(COLOURS)} background")


def parse(text: str) -> Caption:
    """The caption that a sentence is; ValueError if it is none of this grammar."""
    found = SENTENCE.fullmatch(text)
    if not found:
        raise ValueError(f"'{text}' is no caption of training/scenes.py. Write one like '{EXAMPLE}'.")
    *first, relation, size, colour, shape, background = found.groups()
    things = (Thing(*first), Thing(size, colour, shape)) if relation else (Thing(*first),)
    return Caption(things, relation, background)


def random_thing(choose: random.Random, colours: Sequence[str]) -> Thing:
    return Thing(choose.choice(tuple(SIZES)), choose.choice(colours), choose.choice(tuple(SHAPES)))


def random_caption(choose: random.Random) -> Caption:
    """Of the base colours; a thing never has its background's."""
    background = choose.choice(BASE_COLOURS)
    colours = [colour for colour in BASE_COLOURS if colour != background]
    if choose.random() < LONE_SHARE:
        return Caption((random_thing(choose, colours),), None, background)
    things = (random_thing(choose, colours), random_thing(choose, colours))
    return Caption(things, choose.choice(tuple(RELATIONS)), background)


def random_captions(count: int, seed: int) -> list[Caption]:
    choose = random.Random(seed)
    return [random_caption(choose) for _ in range(count)]


def in_new_colour(captions: Sequence[Caption], seed: int) -> list[Caption]:
    """The same captions with one thing of each in the colour that the LoRA teaches."""
    choose = random.Random(seed)
    changed = []
    for caption in captions:
        things = list(caption.things)
        place = choose.randrange(len(things))
        things[place] = replace(things[place], colour=NEW_COLOUR)
        changed.append(replace(caption, things=tuple(things)))
    return changed


EXAMPLE = Caption((Thing("large", "red", "circle"), Thing("small", "blue", "square")), "left of", "green")


def stray(shape: tuple[int, ...], most: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform between -most and most, on the CPU, so that all devices draw the same."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * most


def place(captions: Sequence[Caption], generator: torch.Generator) -> torch.Tensor:
    """Centres of the first and the second thing in pixels: float32 [N, 2 things, (x, y)]."""
    steps = torch.tensor([RELATIONS.get(caption.relation, (0, 0)) for caption in captions], dtype=torch.float32)
    count, is_pair = len(captions), steps.abs().sum(1).bool()[:, None, None]
    along = steps.abs()[:, None, :]
    pair = stray((count, 2, 2), PAIR_STRAY, generator) * along + stray((count, 2, 2), CROSS_STRAY, generator) * (
        1 - along
    )
    pair += torch.stack((-steps, steps), 1) * PAIR_OFFSET
    return SIDE / 2 + torch.where(is_pair, pair, stray((count, 2, 2), LONE_STRAY, generator))


def coverage(shape: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of each pixel a shape covers: [N, SIDE, SIDE] of 0 to 1.

    shape: int64 [N], the place in SHAPES. centre: [N, 2] and radius: [N], in pixels.
    """
    pixels = torch.arange(SIDE, device=centre.device) + 0.5
    x = ((pixels - centre[:, :1]) / radius[:, None])[:, None, :].expand(-1, SIDE, -1)
    y = ((pixels - centre[:, 1:]) / radius[:, None])[:, :, None].expand(-1, -1, SIDE)
    distance = torch.empty_like(x, memory_format=torch.contiguous_format)
    for number, signed_distance in enumerate(SHAPES.values()):
        chosen = shape == number
        distance[chosen] = signed_distance(x[chosen], y[chosen])
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1)


def rgb(names: Sequence[str]) -> torch.Tensor:
    """float32 [N, 3] of 0 to 1."""
    return torch.tensor([COLOURS[name] for name in names]) / 255


def draw(captions: Sequence[Caption], generator: torch.Generator, device: str | torch.device = "cpu") -> torch.Tensor:
    """One picture of each caption, things at random places within it: float32 [N, 3, SIDE, SIDE] of 0 to 1."""
    centres = place(captions, generator).to(device)
    strays = 1 + stray((len(captions), 2), RADIUS_STRAY, generator)
    pictures = rgb([caption.background for caption in captions]).to(device)[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    for number in range(2):
        rows = [row for row, caption in enumerate(captions) if len(caption.things) > number]
        things = [captions[row].things[number] for row in rows]
        if not things:
            continue
        radii = torch.tensor([SIZES[thing.size] for thing in things]) * strays[rows, number]
        shapes = torch.tensor([list(SHAPES).index(thing.shape) for thing in things])
        at = torch.tensor(rows, device=device)
        cover = coverage(shapes.to(device), centres[at, number], radii.to(device))[:, None]
        colour = rgb([thing.colour for thing in things]).to(device)[:, :, None, None]
        pictures[at] = torch.lerp(pictures[at], colour.expand(-1, -1, SIDE, SIDE), cover.expand(-1, 3, -1, -1))
    return pictures
