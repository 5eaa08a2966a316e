"""LoRA files that are too large to be copied: pinned where the system has them, if room is free."""

import os
from weakref import WeakSet

import comfy.model_management as mm
import torch

from ..ops.pinned_part import SYSTEM_CAN, PinnedPart, parts_for, parts_of
from .pinning import is_room_free, pin_parts

# What may be pinned, for as long as somebody has a tensor that views it.
parts_of_loras: WeakSet[PinnedPart] = WeakSet()

# What the host notes at the storage of a tensor that views a file: its place there, and what keeps it mapped.
PLACE, MAPPING = "_comfy_tensor_file_slice", "_comfy_tensor_mmap_refs"


def in_pages(tensors: dict) -> dict:
    """What the host has read of a file, its tensors as views of parts that can be pinned; as it is without DynamicVRAM
    or where that cannot be.
    """
    storages = {key: tensor.untyped_storage() for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    places = {key: getattr(storage, PLACE) for key, storage in storages.items() if hasattr(storage, PLACE)}
    if not places or not SYSTEM_CAN or mm.get_torch_device().type != "cuda":
        return tensors
    # The host's own descriptor: by its name the file may be another one by now.
    (descriptor,) = {place.file_ref for place in places.values()}
    file = open(os.dup(descriptor), "rb", buffering=0)  # noqa: SIM115 (closed with the last part)
    n_bytes, views = os.fstat(descriptor).st_size, dict(tensors)
    # The host takes what its file has of a tensor that is said to be longer.
    whole = {
        key: (place.offset, place.size)
        for key, place in places.items()
        if place.size == tensors[key].nbytes and 0 <= place.offset <= n_bytes - place.size
    }
    parts = parts_for(file, whole.values())
    for key, span in whole.items():
        data = parts[span].view(*span)
        for note in (PLACE, MAPPING):
            setattr(data.untyped_storage(), note, getattr(storages[key], note))
        views[key] = data.view(tensors[key].dtype).view(tensors[key].shape)
    parts_of_loras.update(parts.values())
    return views


def pin_pages(tensors: dict) -> bool:
    """Whether what a file's tensors view is pinned now: a model may have taken the room since it last was.

    Into room that is free, for a model's weights cross the bus at each step; other LoRAs leave it first.
    """
    parts = parts_of(tensor for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
    if not all(part.is_pinned() for part in parts):
        others = [part for part in parts_of_loras if part not in parts]
        while not is_room_free(parts) and others:
            others.pop().unpin()
        if is_room_free(parts):
            pin_parts(parts, mm.get_torch_device())
    # They are wanted whole as soon as sampling begins, so the driver's answer is waited for.
    if parts and all(part.is_pinned() for part in parts):
        return True
    for part in parts:
        part.unpin()
    return False
