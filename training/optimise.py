"""The one training loop: AdamW for so many seconds, the rate by the clock, and a running mean of the weights."""

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch

LOG = logging.getLogger("training")
WARM_UP = 0.03
MEAN_DECAY = 0.999
LARGEST_GRADIENT = 1.0
LOG_SECONDS = 10.0
# Parts of the time after which the running mean is looked at.
LOOKS = (0.25, 0.5, 0.75, 1.0)


def rate_at(part: float) -> float:
    """Of the highest rate, after that part of the time: up in a line, then down along a cosine."""
    return min(part / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))


def exchange(weights: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


def optimise(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    seconds: float,
    rate: float,
    look: Callable[[], str],
) -> None:
    """Train for so many seconds and leave the mean of the weights; `look` says how good they are."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=parameters[0].is_cuda
    )
    weights = [parameter.detach() for parameter in parameters]
    means = [weight.clone() for weight in weights]
    start = logged = time.monotonic()
    looks, step, part = list(LOOKS), 0, 0.0
    while looks:
        optimizer.param_groups[0]["lr"] = rate * rate_at(part)
        loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(means, weights, 1 - min(MEAN_DECAY, step / (step + 10)))
        now = time.monotonic()
        part = (now - start) / seconds
        if now - logged > LOG_SECONDS:
            logged = now
            LOG.info("%s: %5.1f s, step %5d, loss %.5f", name, now - start, step, loss.item())
        if part >= looks[0]:
            exchange(weights, means)
            LOG.info("%s: %5.1f s, step %5d, mean of the weights: %s", name, now - start, step, look())
            looks = [later for later in looks if later > part]
            if looks:
                exchange(weights, means)
