"""LoRA beside a packed weight: y = x Wq^T + (x A^T) B^T, so that blocks are never merged or quantised again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import comfy.lora
import torch
import torch.nn.functional as F
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase


class LowRank(NamedTuple):
    """All LoRAs of one weight as one pair of factors; strengths and alphas are inside `up`."""

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


@dataclass(frozen=True)
class SidePath:
    """What one layer adds to its packed weight: low-rank factors, or a function of the dense weight, never both."""

    patches: tuple  # the host's tuples (strength, adapter, strength_model, offset, function)
    device: torch.device
    dtype: torch.dtype
    low_rank: LowRank | None
    rewrite: Callable[[torch.Tensor], torch.Tensor] | None

    def is_of(self, patches: list, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it was made from these very patches for this device and dtype."""
        return (self.device, self.dtype) == (device, dtype) and [id(p) for p in self.patches] == [
            id(p) for p in patches
        ]


def side_path(
    patches: list,
    key: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    patch_on_device: bool = False,
) -> SidePath:
    """The side path for the host's patches of the weight `key` of logical `shape`, computing in `dtype` on `device`.

    Plain LoRAs become factors on the device. If any adapter has no low-rank form (LoHa, LoKr, DoRA, OFT, diff, set)
    all of them go through the host's own `calculate_weight` on the decoded weight; `patch_on_device` keeps their
    tensors on the device, otherwise the host sends them for every use.
    """
    factors = [_factors(patch, shape) for patch in patches]
    if None not in factors:
        down = torch.cat([down for down, _ in factors]).to(device, dtype)
        up = torch.cat([up for _, up in factors], dim=1).to(device, dtype)
        return SidePath(tuple(patches), device, dtype, LowRank(down, up), None)
    used = [(p[0], _moved(p[1], device), *p[2:]) for p in patches] if patch_on_device else patches

    def rewrite(weight: torch.Tensor) -> torch.Tensor:
        # "model_as_lora" subtracts the weight as it was before the patches, which change theirs in place.
        changed, original = weight.to(dtype, copy=True), {key: [(weight,)]}
        return comfy.lora.calculate_weight(used, changed, key, dtype, original).to(weight.dtype)

    return SidePath(tuple(patches), device, dtype, None, rewrite)


def _factors(patch: tuple, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """float32 (down [rank, in], up [out, rank]) of one host patch, or None if it is not a plain LoRA of a matrix."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None or len(shape) != 2:
        return None
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    up, down = up.flatten(1).float() * scale, down.flatten(1).float()
    if offset is not None:
        # A LoRA of one slice of a fused matrix (q of qkv) has zeros in the other slices.
        dim, start, length = offset
        padding = (start, shape[dim] - start - length)
        up, down = (F.pad(up, (0, 0, *padding)), down) if dim == 0 else (up, F.pad(down, padding))
    return (down, up) if (up.shape[0], down.shape[1]) == shape else None


def _moved(value, device: torch.device):
    """A host patch value with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _moved(value.weights, device))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value
