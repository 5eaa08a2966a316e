"""LoRA beside a packed weight: y = x (Wq + B A)^T, where the blocks of Wq are never merged or quantised again."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from .low_rank import LowRank


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

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[dict[tuple, torch.Tensor], ...]:
        """The LoRAs' rows of `down` and columns of `up`, by what they were made of, for this device and dtype."""
        downs, ups, start = {}, {}, 0
        if self.low_rank is not None and (self.device, self.dtype) == (device, dtype):
            for patch in self.patches:
                end = start + patch[1].weights[1].shape[0]
                downs[_source_of_down(patch)] = self.low_rank.down[start:end]
                ups[_source_of_up(patch)] = self.low_rank.up[:, start:end]
                start = end
        return downs, ups


# By identity: the tensors of one reading of one file, which a side path keeps alive.
def _source_of_down(patch: tuple) -> tuple:
    _, adapter, _, offset, _ = patch
    return id(adapter.weights[1]), offset


def _source_of_up(patch: tuple) -> tuple:
    strength, adapter, _, offset, _ = patch
    up, _, alpha, *_ = adapter.weights
    return id(up), strength, alpha, offset


def side_path(
    patches: list,
    key: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    patch_on_device: bool = False,
    before: SidePath | None = None,
) -> SidePath:
    """The side path for the host's patches of the weight `key` of logical `shape`, computing in `dtype` on `device`.

    Plain LoRAs become factors on the device. If any adapter has no low-rank form (LoHa, LoKr, GLoRA, DoRA, OFT, BOFT,
    diff, set) all of them go through the host's own `calculate_weight` on the decoded weight; `patch_on_device` keeps
    their tensors on the device, otherwise the host sends them for every use. before: the layer's last side path; what
    another strength or another LoRA leaves as it was is taken over from it.
    """
    if all(_is_plain(patch, shape) for patch in patches):
        downs, ups = before.parts(device, dtype) if before is not None else ({}, {})
        down = torch.cat([_down(patch, shape, device, dtype, downs) for patch in patches])
        up = torch.cat([_up(patch, shape, device, dtype, ups) for patch in patches], dim=1)
        return SidePath(tuple(patches), device, dtype, LowRank(down, up), None)
    used = [(p[0], _moved(p[1], device), *p[2:]) for p in patches] if patch_on_device else patches

    def rewrite(weight: torch.Tensor) -> torch.Tensor:
        # "model_as_lora" subtracts the weight as it was before the patches, which change theirs in place.
        changed, original = weight.to(dtype, copy=True), {key: [(weight,)]}
        return comfy.lora.calculate_weight(used, changed, key, dtype, original).to(weight.dtype)

    return SidePath(tuple(patches), device, dtype, None, rewrite)


def n_loras(patches: list) -> int:
    """How many LoRAs the host's patches of one weight come from: one may have a patch for each slice of it."""
    slices = Counter(patch[3] for patch in patches if isinstance(patch[1], WeightAdapterBase))
    of_all_rows = slices.pop(None, 0)
    return of_all_rows + max(slices.values(), default=0)


def _is_plain(patch: tuple, shape: tuple[int, ...]) -> bool:
    """Whether a host patch is a plain LoRA of a matrix of this shape or of a slice of one."""
    _, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None or len(shape) != 2:
        return False
    up, down, _, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return False
    changed = list(shape)
    if offset is not None:
        dim, _, changed[dim] = offset
    (out, rank), (rank_of_down, into) = up.flatten(1).shape, down.flatten(1).shape
    return [out, into] == changed and rank == rank_of_down


def _down(
    patch: tuple, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, known: dict[tuple, torch.Tensor]
) -> torch.Tensor:
    """[rank, in] on the device; no strength is in it."""
    if (source := _source_of_down(patch)) in known:
        return known[source]
    _, adapter, _, offset, _ = patch
    down = _sent(adapter.weights[1], device).flatten(1).to(dtype)
    return F.pad(down, _zeros_around(offset, shape)) if offset is not None and offset[0] == 1 else down


def _up(
    patch: tuple, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, known: dict[tuple, torch.Tensor]
) -> torch.Tensor:
    """[out, rank] on the device, times strength and alpha / rank."""
    if (source := _source_of_up(patch)) in known:
        return known[source]
    strength, adapter, _, offset, _ = patch
    up, down, alpha, *_ = adapter.weights
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    up = (_sent(up, device).flatten(1).float() * scale).to(dtype)
    return F.pad(up, (0, 0, *_zeros_around(offset, shape))) if offset is not None and offset[0] == 0 else up


def _zeros_around(offset: tuple[int, int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    """A LoRA of one slice of a fused matrix (q of qkv) has zeros in the other slices: how many before and after."""
    dim, start, length = offset
    return start, shape[dim] - start - length


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As the file has it: the device is the quicker one to convert and to scale it."""
    return comfy.model_management.cast_to_device(tensor, device, tensor.dtype)


def _moved(value, device: torch.device):
    """A host patch value with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _moved(value.weights, device))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value
