"""Arithmetic with the rounding of ggml, the same on every device.

Nothing here is fused or reordered: a sum is taken term by term, a square root in float64 and rounded, and a quotient as
that of two tensors on the device, since torch multiplies by the reciprocal of a number.
"""

from collections.abc import Sequence

import torch


def columns(groups: torch.Tensor) -> torch.Tensor:
    """[n, k] -> contiguous [k, n]."""
    return groups.t().contiguous()


def rows(codes: torch.Tensor) -> torch.Tensor:
    """[k, n] -> uint8 [n, k]."""
    return codes.to(torch.uint8).t().contiguous()


def sum_rows(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, added one by one, first to last."""
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


def square_root(values: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, as torch's float32 square root is not."""
    return values.double().sqrt_().float()


def divide(numerator: torch.Tensor | float, denominator: torch.Tensor | float) -> torch.Tensor:
    """Their quotient, correctly rounded; one of them is a tensor, whose device and dtype the other one takes."""
    like = numerator if isinstance(numerator, torch.Tensor) else denominator
    return torch.as_tensor(numerator).to(like) / torch.as_tensor(denominator).to(like)


def finite_quotient(numerator: torch.Tensor | float, denominator: torch.Tensor) -> torch.Tensor:
    """Their quotient, 0 where it is infinite: where a scale is too small to invert, ggml's codes are the lowest."""
    quotient = divide(numerator, denominator)
    return torch.where(quotient.isinf(), 0, quotient)


def largest(values: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [n]: the value farthest from zero, the first of several; never a negative zero.

    This and smallest are fastest where the values are the transposed view of columns.
    """
    high, low = values.amax(1), values.amin(1)
    equal = (high == -low).nonzero().squeeze(1)
    some = values.index_select(0, equal)
    first = some.gather(1, some.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.where(high > -low, high, low).index_copy_(0, equal, first).add_(0.0)


def smallest(values: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [n]: the smallest value, of equal zeros the first, whose sign counts."""
    low = values.amin(1)
    zero = (low == 0).nonzero().squeeze(1)
    some = values.index_select(0, zero)
    return low.index_copy_(0, zero, some.gather(1, (some + 0.0).argmin(1, keepdim=True)).squeeze(1))


def nearest(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest integers (even ones of two) within low ... high, in place."""
    return values.round_().clamp_(low, high)


def with_energy(importance: torch.Tensor, values: torch.Tensor, factor: float) -> torch.Tensor:
    """ggml's weights where importance is given: importance * sqrt(factor * mean square of the row + value ** 2).

    float32 [n, k] each; a row is a block, or in the first generation of formats a row of the tensor.
    """
    squares = values * values
    total = sum_rows(squares.t().contiguous().unbind(0))
    return importance * square_root(divide(total * factor, values.shape[1]).unsqueeze(1) + squares)
