"""The one training loop: Muon and Adam for so many seconds, the rates by the clock, a running mean of the weights."""

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import distributed

LOG = logging.getLogger("training")
WARM_UP = 0.03
# The running mean is over about the last twentieth of the steps, and over no more than this share of one each.
MEAN_SHARE, MEAN_LEAST = 20, 0.001
LARGEST_GRADIENT = 1.0
LOG_SECONDS = 20.0
# Parts of the time after which the running mean is looked at and kept.
LOOKS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)
# Muon's coefficients: five rounds bring every singular value near one.
ROUNDS, LINEAR, CUBIC, QUINTIC = 5, 3.4445, -4.7750, 2.0315
MOMENTUM = 0.95


def rate_at(part: float) -> float:
    """Of the highest rate, after that part of the time: up in a line, then down along a cosine."""
    return min(part / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The same directions with singular values near one (Newton-Schulz, in bfloat16), for a matrix of any shape."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = wide.bfloat16() / (wide.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = values @ values.T
        values = LINEAR * values + (CUBIC * square + QUINTIC * square @ square) @ values
    return (values if wide is matrix else values.T).to(matrix.dtype)


@torch.no_grad()
def muon_step(weight: torch.nn.Parameter, momentum: torch.Tensor, rate: float) -> None:
    """Muon with Nesterov's momentum; a kernel of a convolution counts as a matrix of its outputs."""
    momentum.lerp_(weight.grad, 1 - MOMENTUM)
    ahead = torch.lerp(weight.grad, momentum, MOMENTUM).flatten(1)
    rows, columns = ahead.shape
    step = orthogonal(ahead).view_as(weight)
    weight.sub_(step, alpha=rate * max(1, rows / columns) ** 0.5)


def exchange(weights: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


def averaged(parameters: list[torch.nn.Parameter], part: float) -> float:
    """Mean of the gradients, and of the part of the time that is over, among all processes; each has one thread."""
    if not distributed.is_initialized():
        return part
    gradients = [parameter.grad for parameter in parameters]
    both = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([part])])
    distributed.all_reduce(both)
    both /= distributed.get_world_size()
    for gradient, mean in zip(gradients, both[:-1].split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return both[-1].item()


def process() -> int:
    """The number of this one of the processes that train together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def optimise(
    name: str,
    matrices: Iterable[torch.nn.Parameter],
    others: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    seconds: float,
    rates: tuple[float, float],
    look: Callable[[], str],
) -> None:
    """Train for so many seconds and leave the mean of the weights; `look` keeps it and says how good it is.

    rates: of Muon, which has the matrices, and of Adam, which has the others.
    """
    matrices, others = list(matrices), list(others)
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    adam = torch.optim.Adam(others, lr=rates[1], betas=(0.9, 0.98), fused=True)
    weights = [parameter.detach() for parameter in (*matrices, *others)]
    means = [weight.clone() for weight in weights]
    start = logged = time.monotonic()
    looks, step, part, recent = list(LOOKS), 0, 0.0, None
    while looks:
        loss = loss_of_step()
        loss.backward()
        part = averaged([*matrices, *others], (time.monotonic() - start) / seconds)
        torch.nn.utils.clip_grad_norm_(others, LARGEST_GRADIENT)
        for matrix, momentum in zip(matrices, momenta, strict=True):
            muon_step(matrix, momentum, rates[0] * rate_at(part))
            matrix.grad = None
        adam.param_groups[0]["lr"] = rates[1] * rate_at(part)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(means, weights, max(MEAN_LEAST, min(0.5, MEAN_SHARE / step)))
        recent = loss.detach() if recent is None else torch.lerp(recent, loss.detach(), max(0.02, 1 / step))
        now = time.monotonic()
        if now - logged > LOG_SECONDS:
            logged = now
            LOG.info("%s: %6.1f s, step %5d, loss %.5f", name, now - start, step, recent.item())
        if part >= looks[0]:
            looks = [later for later in looks if later > part]
            exchange(weights, means)
            if process() == 0:
                LOG.info("%s: %6.1f s, step %5d, mean of the weights: %s", name, now - start, step, look())
            if looks:
                exchange(weights, means)
