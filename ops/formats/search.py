"""The searches of ggml for scales, minima and codes, each over many groups of values at once.

A group is what shares a scale; the searches turn groups [n, k] into columns [k, n], so that a sum runs over rows in
ggml's order. Functions have the names of ggml-quants.c where it has them. Weights are those of the squared error.
"""

from collections.abc import Callable

import torch

from .codebooks import codebook
from .exact import columns, divide, finite_quotient, largest, nearest, rows, smallest, sum_rows

# Below this greatest magnitude ggml takes a group for zero.
GROUP_MAX_EPS = 1e-15

# rmin, rdelta and nstep of make_qkx2_quants where importance is given; its copy for that is called make_qkx3_quants.
STEPS_WITH_IMPORTANCE = (-0.9, 0.05, 36)


def make_qx_quants(
    groups: torch.Tensor, nmax: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale with least weighted squared error among 19, and the codes that it was found with.

    groups: float32 [n, k]; weights: likewise, or None for the squares of the values -> scale [n], codes [n, k] in
    0 ... 2 nmax - 1, for values scale * (code - nmax).
    """
    x = columns(groups)
    peak = largest(x.t())
    w = x * x if weights is None else columns(weights)
    wx = w * x
    sums, codes = x.new_empty(x.shape[0], 2, x.shape[1]), torch.empty_like(x)
    terms = sums.unbind(0)
    best = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(torch.tensor(0.1) * step + nmax).to(x.device) / peak
        nearest(torch.mul(x, inverse, out=codes), -nmax, nmax - 1)
        torch.mul(wx, codes, out=sums[:, 0])
        torch.mul(torch.mul(w, codes, out=sums[:, 1]), codes, out=sums[:, 1])
        sumlx, suml2 = sum_rows(terms)
        scale = torch.where(suml2 > 0, sumlx / suml2, 0)
        new = scale, scale * sumlx, inverse
        if best:
            better = (suml2 > 0) & (sumlx * sumlx > best[1] * suml2)
            new = tuple(torch.where(better, *pair) for pair in zip(new, best, strict=True))
        best = new
    scale, _, inverse = best
    empty = peak.abs() < GROUP_MAX_EPS
    codes = nearest(torch.mul(x, inverse, out=codes), -nmax, nmax - 1).add_(nmax)
    return scale.masked_fill_(empty, 0), rows(codes.masked_fill_(empty, 0))


def make_q3_quants(groups: torch.Tensor, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of codes found by coordinate descent. The weights are the squares of the values.

    Arguments and result as of make_qx_quants.
    """
    x = columns(groups)
    peak = largest(x.t())
    codes = nearest(x * finite_quotient(-nmax, peak), -nmax, nmax - 1)
    scale = descend(x, x * x, codes, -nmax, nmax - 1, rest_above=float("-inf"))
    empty = peak.abs() < GROUP_MAX_EPS
    return scale.masked_fill_(empty, 0), rows(codes.add_(nmax).masked_fill_(empty, 0))


def make_qp_quants(groups: torch.Tensor, weights: torch.Tensor, nmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale with least weighted squared error among 9 for values that are not negative, then coordinate descent.

    groups, weights: float32 [n, k] -> scale [n], codes [n, k] in 0 ... nmax.
    """
    x, w = columns(groups), columns(weights)
    peak = x.amax(0)
    best_inverse = best_error = None
    for step in (0, *range(-4, 0), *range(1, 5)):
        inverse = finite_quotient((torch.tensor(0.1) * step + nmax).to(x.device), peak)
        difference = x - nearest(x * inverse, 0, nmax).mul_(divide(1, inverse))
        error = sum_rows((w * difference * difference).unbind(0))
        if step:
            better = error < best_error
            inverse, error = torch.where(better, inverse, best_inverse), torch.where(better, error, best_error)
        best_inverse, best_error = inverse, error
    codes = nearest(x * best_inverse, 0, nmax)
    scale = descend(x, w, codes, 0, nmax, rest_above=0.0)
    empty = peak < GROUP_MAX_EPS
    return scale.masked_fill_(empty, 0), rows(codes.masked_fill_(empty, 0))


def descend(
    x: torch.Tensor, w: torch.Tensor, codes: torch.Tensor, low: int, high: int, rest_above: float
) -> torch.Tensor:
    """Move each code in turn to where the scale of the others puts it, five rounds at most, in place -> scale [n].

    [k, n] each; a code stays where the weighted squares of the others sum up to `rest_above` or less.
    """
    terms = x.new_empty(len(x), 2, x.shape[1])
    wx, slx, sl2 = w * x, *terms.unbind(1)
    torch.mul(wx, codes, out=slx)
    torch.mul(w, codes, out=sl2).mul_(codes)
    sums = sumlx, suml2 = sum_rows(terms.unbind(0))
    # Most groups stay as they are: those where no code would move by the sums of before the first round.
    torch.sub(sums, terms, out=terms)
    going = (nearest(sl2.mul_(x).div_(slx), low, high) != codes).any(0).nonzero().squeeze(1)
    for _ in range(5):
        if not len(going):
            break
        moved = tuple(item.index_select(-1, going) for item in (codes, sumlx, suml2))
        fixed = tuple(item.index_select(-1, going) for item in (x, w, wx))
        changed = descend_once(*fixed, *moved, low, high, rest_above)
        for item, part in zip((codes, sumlx, suml2), moved, strict=True):
            item.index_copy_(-1, going, part)
        going = going[changed]
    return torch.where(suml2 > 0, sumlx / suml2, 0)


def descend_once(
    x: torch.Tensor,
    w: torch.Tensor,
    wx: torch.Tensor,
    codes: torch.Tensor,
    sumlx: torch.Tensor,
    suml2: torch.Tensor,
    low: int,
    high: int,
    rest_above: float,
) -> torch.Tensor:
    """One round over the codes [k, n], which change in place as their sums [n] do -> bool [n]: which groups changed."""
    changed = torch.zeros_like(suml2, dtype=torch.bool)
    slx, sl2, new, term, square = (torch.empty_like(suml2) for _ in range(5))
    better, holds = torch.empty_like(changed), torch.empty_like(changed)
    for value, weight, weighted, code in zip(x, w, wx, codes, strict=True):
        torch.sub(sumlx, torch.mul(weighted, code, out=term), out=slx)
        torch.sub(suml2, torch.mul(weight, code, out=term).mul_(code), out=sl2)
        nearest(torch.mul(value, sl2, out=new).div_(slx), low, high)
        torch.gt(slx, 0, out=better).logical_and_(torch.gt(sl2, rest_above, out=holds))
        better.logical_and_(torch.ne(new, code, out=holds))
        slx.add_(torch.mul(weighted, new, out=term))
        sl2.add_(torch.mul(weight, new, out=term).mul_(new))
        better.logical_and_(torch.gt(sl2, 0, out=holds))
        rest = torch.mul(sumlx, sumlx, out=term).mul_(sl2)
        better.logical_and_(torch.gt(torch.mul(slx, slx, out=square).mul_(suml2), rest, out=holds))
        for old, found in ((code, new), (sumlx, slx), (suml2, sl2)):
            torch.where(better, found, old, out=old)
        changed.logical_or_(better)
    return changed


def make_qkx2_quants(
    groups: torch.Tensor,
    weights: torch.Tensor,
    nmax: int,
    steps: tuple[float, float, int],
    penalty: Callable[..., torch.Tensor] = torch.square,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scale and minimum with least weighted error; each try fits both to the codes that its inverse scale gives.

    groups, weights: float32 [n, k]; steps: (rmin, rdelta, nstep), the tries being (nmax + rmin + rdelta * i) / range;
    penalty: of a difference -> scale [n], min [n] (of which the negative is added), codes [n, k] in 0 ... nmax.
    """
    x, w = columns(groups), columns(weights)
    low, high = smallest(x.t()), x.amax(0)
    low = torch.where(low > 0, 0, low)
    inverse = divide(nmax, (high - low).add_(0.0))
    scale, inverse = divide(1, inverse), torch.where(inverse.isinf(), 0, inverse)
    codes = nearest((x - low).mul_(inverse), 0, nmax)
    sums = x.new_empty(len(x), 3, x.shape[1])
    terms, errors = sums.unbind(0), codes.unbind(0)
    penalty(codes.mul_(scale).add_(low).sub_(x), out=codes).mul_(w)
    best = scale, low, sum_rows(errors), inverse, low
    sum_w, sum_x = sum_rows(w.unbind(0)), sum_rows((w * x).unbind(0))
    rmin, rdelta, nstep = steps
    for number in (torch.arange(nstep + 1, dtype=torch.float32) * rdelta + rmin + nmax).to(x.device):
        scale, low, error, *_ = best
        inverse = finite_quotient(number, high - low)
        nearest(torch.sub(x, low, out=codes).mul_(inverse), 0, nmax)
        torch.mul(w, codes, out=sums[:, 0])
        torch.mul(sums[:, 0], codes, out=sums[:, 1])
        torch.mul(sums[:, 0], x, out=sums[:, 2])
        new_scale, new_low, exists = fit_line(sum_w, sum_x, *sum_rows(terms))
        penalty(codes.mul_(new_scale).add_(new_low).sub_(x), out=codes).mul_(w)
        new = new_scale, new_low, sum_rows(errors), inverse, low
        better = exists & (new[2] < error)
        best = tuple(torch.where(better, *pair) for pair in zip(new, best, strict=True))
    scale, low, _, inverse, offset = best
    codes = nearest(torch.sub(x, offset, out=codes).mul_(inverse), 0, nmax)
    return scale, -low, rows(codes)


def fit_line(
    sum_w: torch.Tensor, sum_x: torch.Tensor, sum_l: torch.Tensor, sum_l2: torch.Tensor, sum_xl: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From weighted sums [n], the scale and the minimum (not above 0) for given codes, and whether there are any."""
    determinant = sum_w * sum_l2 - sum_l * sum_l
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    above = low > 0
    return torch.where(above, sum_xl / sum_l2, scale), torch.where(above, 0, low), determinant > 0


def search_codebook(groups: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [n, k] -> the scale [n] with least weighted squared error for the values of IQ4_NL, among 16.

    The weights are the squares of the values if None. ggml's name for it is quantize_row_iq4_nl_impl.
    """
    x = columns(groups)
    peak = largest(x.t())
    w = x * x if weights is None else columns(weights)
    sums = x.new_empty(x.shape[0], 2, x.shape[1])
    terms = sums.unbind(0)
    scale, best = torch.zeros_like(peak), torch.zeros_like(peak)
    first = finite_quotient(1, divide(peak, 127))
    for inverse in (first, *(finite_quotient(step - 127, peak) for step in range(-7, 8))):
        q = look_up_halves("IQ4_NL_VALUE_OF_HALF", x * inverse)
        torch.mul(w, q, out=sums[:, 1])
        torch.mul(sums[:, 1], x, out=sums[:, 0])
        sums[:, 1].mul_(q)
        sumqx, sumq2 = sum_rows(terms)
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2) if inverse is not first else sumq2 > 0
        scale = torch.where(better, sumqx / sumq2, scale)
        best = torch.where(better, scale * sumqx, best)
    return scale.masked_fill_(peak.abs() < GROUP_MAX_EPS, 0)


def nearest_codes(values: torch.Tensor) -> torch.Tensor:
    """float32 [...] in units of the scale -> the nearest codes of IQ4_NL, uint8."""
    return look_up_halves("IQ4_NL_CODE_OF_HALF", values)


def look_up_halves(name: str, values: torch.Tensor) -> torch.Tensor:
    """The entries of a table by the half below each value, from -128 on; values are overwritten."""
    index = values.mul_(2).floor_().clamp_(-256, 255).add_(256).int()
    return codebook(name, values.device).index_select(0, index.flatten()).view(values.shape)
