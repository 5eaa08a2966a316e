"""What a refinement works on: groups of values as columns, the error of a trial, the best of many trials.

Only additions, multiplications, divisions and roundings, each by itself, and sums by halves in a fixed order: a column
does not depend on its neighbours, nor the bits on the device or the number of threads.
"""

from functools import cache, partial
from itertools import repeat
from typing import NamedTuple

import torch

from .codebooks import VALUES_OF_CODE

# Squares of values and sums of them must fit float32. No type but MXFP4 comes near with a scale in float16.
GREATEST_VALUE = 2.0**60
SMALLEST_HALF, GREATEST_HALF = 2.0**-24, 65504.0

# For denominators that may be 0 where the numerator is 0 too.
SMALL = 1e-30

# The last bits of an error hold the number of its trial.
TRIALS = 32


class IntegerCodes(NamedTuple):
    """Codes for the integers from low to high; 0 is stored as `zero`."""

    low: int
    high: int
    zero: int = 0

    def nearest(self, t: torch.Tensor, out: torch.Tensor) -> None:
        torch.round(t, out=out).clamp_(self.low, self.high)

    def stored(self, q: torch.Tensor) -> torch.Tensor:
        return q.to(torch.int8).add_(self.zero)


class CodebookCodes(NamedTuple):
    """Codes for the values of a codebook, integers of which the middles are multiples of a half."""

    name: str

    def nearest(self, t: torch.Tensor, out: torch.Tensor) -> None:
        index = torch.mul(t, 2, out=out).floor_().clamp_(-256, 255).add_(256).int().flatten()
        torch.index_select(nearest_of_half(self.name, t.device), 0, index, out=out.view(-1))

    def stored(self, q: torch.Tensor) -> torch.Tensor:
        index = q.add(128).int().flatten()
        return code_of_value(self.name, q.device).index_select(0, index).view(q.shape)


class Columns:
    """Groups of `group_size` values as columns x [group_size, groups of a block * n], and room for codes of them.

    One pass over n blocks of `block_size` values after another has its memory; w are weights, or None for 1.
    After `encode`, t holds the values in units of their scales, and q what the nearest codes stand for.
    """

    def __init__(
        self,
        n: int,
        block_size: int,
        group_size: int,
        codes: IntegerCodes | CodebookCodes,
        is_weighted: bool,
        device: torch.device,
    ) -> None:
        self.n, self.groups, self.codes = n, block_size // group_size, codes
        empty = partial(torch.empty, device=device)
        shape = group_size, self.groups * n
        self.x, self.t, self.q, self.product = (empty(shape) for _ in range(4))
        self.w = empty(shape) if is_weighted else None
        # A view takes as long to make as a sum of thousands of values: those that every trial needs are made here.
        matrices = [rows for rows in (self.x, self.t, self.q, self.product, self.w) if rows is not None]
        self.halves = {rows: rows.chunk(2) for rows in matrices}
        sums = self.sums = empty(group_size // 2, shape[1])
        self.foldings, self.last_two = [], sums[:2].unbind()
        while len(sums) > 2:
            self.foldings.append(sums.chunk(2))
            sums = sums[: len(sums) // 2]

    def take(self, values: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Fill x and w with those of a pass, float32 [n, block_size] each."""
        for rows, given in ((self.x, values), (self.w, weights)):
            if rows is not None:
                rows.view(-1, self.groups, self.n).copy_(given.view(self.n, self.groups, -1).permute(2, 1, 0))

    def limit(self) -> None:
        """Bring x to where squares are finite."""
        self.x.clamp_(-GREATEST_VALUE, GREATEST_VALUE)

    def encode(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> None:
        """Set t to (x + offset) / scale, or x / scale, and q to what is nearest. [columns] each, no scale is 0."""
        self.encode_by(scale.reciprocal(), offset)

    def encode_by(self, inverse: torch.Tensor, offset: torch.Tensor | None) -> None:
        """The same, given 1 / scale."""
        if offset is None:
            torch.mul(self.x, inverse, out=self.t)
        else:
            torch.add(self.x, offset, out=self.t).mul_(inverse)
        self.codes.nearest(self.t, self.q)

    def total(self, *factors: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum [columns] of a product."""
        product, *others = factors if self.w is None else (self.w, *factors)
        for factor in others:
            product = torch.mul(product, factor, out=self.product)
        return self.sum(product, out)

    def sum(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum [columns] of rows, x, t, q, w or product."""
        torch.add(*self.halves[rows], out=self.sums)
        for first, second in self.foldings:
            first.add_(second)
        return torch.add(*self.last_two, out=out)

    def errors(self, scales: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted squared errors of the codes nearest for scales and offsets, [trials, columns] each."""
        errors = torch.empty_like(scales)
        trials = zip(scales.reciprocal(), repeat(None) if offsets is None else offsets, errors, strict=False)
        for inverse, offset, error in trials:
            self.encode_by(inverse, offset)
            self.sum(self.squares(), error)
        return errors.mul_(scales).mul_(scales)

    def squares(self) -> torch.Tensor:
        """The weighted squares of what the codes are off by, in place of t, which is in the cache."""
        rest = self.t.sub_(self.q)
        squares = rest.mul_(rest)
        return squares if self.w is None else squares.mul_(self.w)

    def error(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """That of a single trial, [columns] each."""
        return self.errors(scale.unsqueeze(0), None if offset is None else offset.unsqueeze(0)).squeeze(0)

    def blocks(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., groups, n]."""
        return of_groups.unflatten(-1, (self.groups, self.n))

    def over_groups(self, of_groups: torch.Tensor) -> torch.Tensor:
        """The sums [..., n] over the groups [..., groups, n] of a block."""
        while of_groups.shape[-2] > 1:
            first, second = of_groups.chunk(2, -2)
            of_groups = first + second
        return of_groups.squeeze(-2)

    def stored(self) -> torch.Tensor:
        """The codes as the blocks hold them, uint8 [n, block_size]; those of one place in all blocks lie together."""
        codes = self.codes.stored(self.q).view(-1, self.groups, self.n)
        return codes.transpose(0, 1).flatten(0, 1).t().view(torch.uint8)


@cache
def nearest_of_half(name: str, device: torch.device) -> torch.Tensor:
    """float32 [512]: the value of a codebook nearest to a number from k / 2 - 128 on, up to the next half."""
    values = torch.tensor(sorted(set(VALUES_OF_CODE[name])), dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2
    with torch.inference_mode(False):
        return values[torch.bucketize(torch.arange(-256, 256) / 2, middles, right=True)].to(device)


@cache
def code_of_value(name: str, device: torch.device) -> torch.Tensor:
    """int8 [256]: the first code of a value of a codebook, from -128 on."""
    codes = {value: code for code, value in reversed(list(enumerate(VALUES_OF_CODE[name])))}
    with torch.inference_mode(False):
        return torch.tensor([codes.get(value, 0) for value in range(-128, 128)], dtype=torch.int8).to(device)


@cache
def entries(table: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [len(table)] on `device`, moved there once."""
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.float32).to(device)


def for_trials(table: tuple[float, ...], of_blocks: torch.Tensor) -> torch.Tensor:
    """A trial for each entry: float32 [trials, 1, ...], with as many ones as of_blocks has dimensions."""
    return entries(table, of_blocks.device).view(-1, *(1,) * of_blocks.ndim)


def number_of_least(errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of up to 32 errors [trials, columns], not negative, the number of the least (int64) and it itself, to 18 bits.

    The bits of floats that are not negative are ordered as integers. The errors are overwritten.
    """
    numbers = torch.arange(len(errors), dtype=torch.int32, device=errors.device).unsqueeze(1)
    best = errors.view(torch.int32).bitwise_and_(-TRIALS).bitwise_or_(numbers).amin(0)
    return (best & TRIALS - 1).long(), (best & -TRIALS).view(torch.float32)


def chosen(trials: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Of trials [trials, ...] those with a number [...]."""
    return trials.gather(0, number.unsqueeze(0)).squeeze(0)


def in_half(scale: torch.Tensor) -> torch.Tensor:
    """A scale as float16 can hold it, not zero nor infinite, in float32."""
    return scale.abs().clamp_(SMALLEST_HALF, GREATEST_HALF).half().float().copysign(scale)
