"""All plain LoRAs of one weight as one pair of factors, and the two ways to apply them."""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor.base import QuantizedTensor

from .dequantize import has_kernel
from .formats import FORMATS
from .kernels import WHY_NONE

if WHY_NONE is None:
    from .kernels import low_rank as kernel

log = logging.getLogger("gguf_native")


class LowRank(NamedTuple):
    """What is added to a weight W: up down. Strengths and alphas are inside `up`."""

    down: torch.Tensor  # [total rank, in]
    up: torch.Tensor  # [out, total rank]

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [..., out], contiguous, += the LoRAs' answer to x [..., in], computed in the factors' dtype."""
        h = F.linear(x.to(self.down.dtype), self.down)
        if y.dtype != self.up.dtype:
            return y.add_(F.linear(h, self.up))
        # One matrix product that adds to y, instead of a second pass over it.
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.up.t())
        return y

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """What the LoRAs add to the rows `index` (any shape) of an embedding: [*index.shape, in]."""
        return F.embedding(index, self.up) @ self.down

    def joins(self, weight: QuantizedTensor, dtype: torch.dtype) -> bool:
        """Whether decoding `weight` to `dtype` can add it: no pass over the outputs, and a rounding that was there."""
        blocks, type = weight._qdata, weight._params.type
        if not has_kernel(FORMATS[type], blocks.device):
            return False
        reason = kernel.why_not(type, blocks, dtype, self.up)
        if reason is not None:
            log_beside(reason)
        return reason is None

    def decode_into(self, blocks: torch.Tensor, type: str, out: torch.Tensor) -> Callable[[], None] | None:
        """As `dequantize.decode_into`, of W + up down in `out` [out, in], where it `joins`."""
        return kernel.decode_into(blocks, type, self.down, self.up, out)


@cache
def log_beside(reason: str) -> None:
    log.info(
        "GGUF Native: the LoRAs of some layers are two products of their own and do not join the weight as it is "
        "decoded, which is slower: %s.",
        reason,
    )
