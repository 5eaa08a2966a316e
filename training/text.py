"""What a random text encoder's features say, read by least squares: how the Flux's two text layers are set.

Features of different words are nearly parallel, and a model would spend most of its steps on telling them apart. A
linear map does it at once: it reads each token's word, its place in the grammar and what is said of its thing so far,
and from the pooled vector all that the caption says.
"""

import math

import torch
from comfy.ldm.flux.model import Flux

from . import engine
from .scenes import COLOURS, RELATIONS, SHAPES, SIZES, Caption, Thing, in_new_colour, random_captions

# Captions that the maps are fitted on; of every eighth, one thing has the new colour, so that its word is a word too.
FITTED, NEW_EVERY, RIDGE = 4096, 8, 1e-3
# Tokens that a caption's words and its end need; all later ones say no more.
TOKENS = 16
ROLES = (
    "start",
    *(f"{word} {number}" for number in (1, 2) for word in ("a", "size", "colour", "shape")),
    "relation",
    "of",
    "on",
    "a",
    "background",
    "the word background",
    "end",
)
WORDS = ("a", *SIZES, *COLOURS, *SHAPES, *dict.fromkeys(word for name in RELATIONS for word in name.split()), "on")
LISTS = (tuple(SIZES), tuple(COLOURS), tuple(SHAPES))
# What is fitted is not trained.
LAYERS = ("txt_in.", "vector_in.in_layer.")
# Lengths of a token's vector and of a modulation's, per value.
TOKEN_SIZE, POOLED_SIZE = 1.0, 2.0


def one_hot(name: str | None, names) -> list[float]:
    return [float(name == one) for one in names]


def said_of(thing: Thing | None, words: int = 3) -> list[float]:
    """Size, colour and shape, of which only so many are said yet."""
    parts = (thing.size, thing.colour, thing.shape) if thing else (None, None, None)
    known = [part if number < words else None for number, part in enumerate(parts)]
    return [value for part, names in zip(known, LISTS, strict=True) for value in one_hot(part, names)]


def token_targets(caption: Caption) -> list[list[float]]:
    """Of each of TOKENS: its word, its place, and what is said of its thing so far."""
    tokens = [(None, "start", None, 0)]
    for number, thing in enumerate(caption.things, 1):
        words = ("a", thing.size, thing.colour, thing.shape)
        roles = (f"{role} {number}" for role in ("a", "size", "colour", "shape"))
        tokens += [(word, role, thing, said) for said, (word, role) in enumerate(zip(words, roles, strict=True))]
        if number == 1 and caption.relation:
            tokens += [(w, r, None, 0) for w, r in zip(caption.relation.split(), ("relation", "of"), strict=False)]
    ending = (("on", "on"), ("a", "a"), (caption.background, "background"), ("background", "the word background"))
    tokens += [(word, role, None, 0) for word, role in ending]
    tokens += [(None, "end", None, 0)] * (TOKENS - len(tokens))
    return [one_hot(w, WORDS) + one_hot(role, ROLES) + said_of(thing, said) for w, role, thing, said in tokens]


def pooled_targets(caption: Caption) -> list[float]:
    things = (*caption.things, None)[:2]
    parts = one_hot(caption.relation, RELATIONS) + one_hot(caption.background, COLOURS)
    return parts + [value for thing in things for value in said_of(thing)]


def least_squares(features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the ridge regression of targets, [N, outputs], onto features, [N, inputs]."""
    middle, means = features.mean(0), targets.mean(0)
    centred = features - middle
    products = (centred.T @ centred / len(features)).double()
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    solved = torch.linalg.solve(products, (centred.T @ (targets - means) / len(features)).double())
    weight = solved.T.to(features.dtype)
    return weight, means - weight @ middle


def whole(directions: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, middle: torch.Tensor):
    """`weight` and `bias` along directions, as they are saved; the bias makes up for the rounded weight's mean."""
    rounded = (directions @ weight).bfloat16().to(weight.dtype)
    return rounded, directions @ (bias + weight @ middle) - rounded @ middle


@torch.no_grad()
def set_text_layers(model: Flux, clip, device: torch.device, count: int = FITTED) -> None:
    """Set LAYERS by that many captions."""
    captions = random_captions(count, seed=51)
    captions[::NEW_EVERY] = in_new_colour(captions[::NEW_EVERY], seed=52)
    context, pooled = engine.encode(clip, [str(caption) for caption in captions], device, TOKENS)
    # The later tokens, which all say that the caption has ended.
    few = captions[:32]
    later = engine.encode(clip, [str(caption) for caption in few], device)[0][:, TOKENS:].flatten(0, 1).float()
    features = torch.cat((context.flatten(0, 1).float(), later))
    targets = torch.tensor([token for caption in captions for token in token_targets(caption)], device=device)
    targets = torch.cat((targets, targets.new_tensor([token_targets(few[0])[-1]]).expand(len(later), -1)))
    generator = torch.Generator().manual_seed(53)
    hidden = model.hidden_size

    weight, bias = least_squares(features, targets)
    report("tokens", features @ weight.T + bias, targets)
    directions = torch.linalg.qr(torch.randn(hidden, len(weight), generator=generator))[0].to(device)
    scale = TOKEN_SIZE * math.sqrt(hidden) / targets.norm(dim=1).mean()
    rows, offset = whole(scale * directions, weight, bias, features.mean(0))
    model.txt_in.weight.copy_(rows)
    model.txt_in.bias.copy_(offset)

    pooled, targets = pooled.float(), torch.tensor([pooled_targets(caption) for caption in captions], device=device)
    weight, bias = least_squares(pooled, targets)
    report("pooled text", pooled @ weight.T + bias, targets)
    directions = POOLED_SIZE * torch.randn(hidden, len(weight), generator=generator).to(device)
    rows, offset = whole(directions, weight, bias - targets.mean(0), pooled.mean(0))
    first = model.vector_in.in_layer
    first.weight.copy_(rows)
    first.bias.copy_(offset)


def report(name: str, read: torch.Tensor, targets: torch.Tensor) -> None:
    unexplained = (read - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    engine.LOG.info("%s: %.1f%% of what is said is read linearly", name, 100 * (1 - unexplained))
