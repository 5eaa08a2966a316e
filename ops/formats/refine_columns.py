"""What a refinement works on: groups of values as columns, the error of a trial, the best of many trials.

Only additions, multiplications, divisions and roundings, each by itself, and sums by halves in a fixed order: a column
does not depend on its neighbours, nor the bits on the device or the number of threads.
"""

from collections.abc import Iterable
from functools import cache
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
        return q.add(self.zero).to(torch.int8)


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

    values: float32 [n, block_size]; weights: likewise, or None for 1. After `encode`, t holds the values in units of
    their scales, and q what the nearest codes stand for.
    """

    def __init__(
        self,
        values: torch.Tensor,
        weights: torch.Tensor | None,
        group_size: int,
        codes: IntegerCodes | CodebookCodes,
    ) -> None:
        n = len(values)
        columns = values.view(n, -1, group_size).permute(2, 1, 0)
        self.groups, self.codes = columns.shape[1], codes
        self.x = columns.clone(memory_format=torch.contiguous_format).flatten(1).clamp_(-GREATEST_VALUE, GREATEST_VALUE)
        self.w = None if weights is None else weights.view(n, -1, group_size).permute(2, 1, 0).reshape(self.x.shape)
        self.t, self.q, self.product = (torch.empty_like(self.x) for _ in range(3))
        self.sums = values.new_empty(group_size // 2, self.x.shape[1])

    def encode(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> None:
        """Set t to (x + offset) / scale, or x / scale, and q to what is nearest. [columns] each, no scale is 0."""
        if offset is None:
            torch.mul(self.x, scale.reciprocal(), out=self.t)
        else:
            torch.add(self.x, offset, out=self.t).mul_(scale.reciprocal())
        self.codes.nearest(self.t, self.q)

    def total(self, *factors: torch.Tensor) -> torch.Tensor:
        """The weighted sum [columns] of a product."""
        product, *others = factors if self.w is None else (self.w, *factors)
        for factor in others:
            product = torch.mul(product, factor, out=self.product)
        half = len(self.sums)
        sums = torch.add(product[:half], product[half:], out=self.sums)
        while half > 2:
            half //= 2
            sums[:half].add_(sums[half : 2 * half])
        return sums[0] + sums[1]

    def error(self, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted squared error [columns] of the codes nearest for a scale and an offset, which q holds then."""
        self.encode(scale, offset)
        rest = self.t.sub_(self.q)
        return self.total(rest, rest).mul_(scale).mul_(scale)

    def blocks(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[columns] -> [groups, n]."""
        return of_groups.reshape(self.groups, -1)

    def over_groups(self, of_groups: torch.Tensor) -> torch.Tensor:
        """The sums [n] over the groups of a block."""
        sums = self.blocks(of_groups)
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        return sums[0]

    def stored(self) -> torch.Tensor:
        """The codes as the blocks hold them, uint8 [n, block_size]."""
        codes = self.codes.stored(self.q).unflatten(1, (self.groups, -1))
        return codes.permute(2, 1, 0).flatten(1).view(torch.uint8)


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


def number_of_least(errors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of up to 32 errors, not negative, the number of the least (int32) and it itself, compared to 18 bits.

    The bits of floats that are not negative are ordered as integers.
    """
    best = None
    for number, error in enumerate(errors):
        ranked = error.view(torch.int32).bitwise_and_(-TRIALS).bitwise_or_(number)
        best = ranked if best is None else torch.minimum(best, ranked, out=best)
    return best & TRIALS - 1, (best & -TRIALS).view(torch.float32)


def chosen(table: tuple[float, ...], number: torch.Tensor) -> torch.Tensor:
    """float32, the entry of a table for each number."""
    return torch.tensor(table, dtype=torch.float32).to(number.device).index_select(0, number)


def in_half(scale: torch.Tensor) -> torch.Tensor:
    """A scale as float16 can hold it, not zero nor infinite, in float32."""
    return scale.abs().clamp_(SMALLEST_HALF, GREATEST_HALF).half().float().copysign(scale)
