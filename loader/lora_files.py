"""LoRA files in memory, pinned beside a GPU: each is read once, then changing LoRAs reads nothing from disk."""

import logging
import os
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import comfy.model_management
import comfy.utils
import torch

from ..config import settings
from ..ops.pinned_part import SYSTEM_CAN, PinnedPart, parts_for
from .pinning import is_room_free, pin_parts

log = logging.getLogger("gguf_native")

# What a tensor's first byte is aligned to: a cache line, and more than any dtype needs.
ALIGNMENT = 64


class LoraFileError(ValueError):
    """A file that ComfyUI's reader cannot read."""


class Version(NamedTuple):
    """A file as it is now: one that was written anew is another version, and is read anew."""

    path: str
    modified_ns: int
    n_bytes: int


class LoraFile(NamedTuple):
    """What a file holds, in one buffer: pinning costs one call, and a replaced file on disk changes nothing here.

    One larger than the setting `preload_loras` has no buffer, but is held as the host's own node holds its last file's
    tensors: the same ones again are what another strength can leave on the GPU. Beside a GPU that can read the file's
    pages where the system holds them they view parts of it, to be pinned there.
    """

    tensors: dict  # by key, views of the buffer or of the parts, if there are any
    metadata: dict | None
    buffer: torch.Tensor | None  # uint8 [bytes]
    parts: list[PinnedPart]
    is_pinned: bool  # of the buffer


# Least recently used first.
kept: OrderedDict[Version, LoraFile] = OrderedDict()
# Of files that are kept no more: pinned for as long as a model has their tensors.
left: WeakSet[PinnedPart] = WeakSet()


def read_lora(path: str) -> tuple[dict[str, torch.Tensor], dict | None]:
    """(tensors, metadata) of a LoRA file; beside a GPU pinned, in memory where `preload_loras` has room for it, else
    where the system has the file.

    The same version gives the same tensors as long as it is kept: never where that setting is 0. Raises LoraFileError
    for a broken file.
    """
    status = Path(path).stat()
    version = Version(path, status.st_mtime_ns, status.st_size)
    if version not in kept:
        tensors, metadata = _from_disk(path)
        budget = settings().preload_loras << 20
        if not budget:
            return tensors, metadata
        for other in [other for other in kept if other.path == path]:
            _let_go(other, "its file has changed")
        keep = _pinned if version.n_bytes <= budget else _from_pages
        kept[version] = keep(version, tensors, metadata)
    kept.move_to_end(version)
    file = kept[version]
    if file.buffer is None:
        log_way = log_in_place if _pin_pages(file.parts) else log_too_large
        log_way(path)
    # ComfyUI's conversion of some key styles changes the dict that it is given.
    return dict(file.tensors), file.metadata


def _from_disk(path: str) -> tuple[dict, dict | None]:
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:
        # Each format's library has errors of its own. Few name the file, and torch's goes on to advise to run its code.
        reason = str(error).partition(". ")[0]
        raise LoraFileError(
            f"{Path(path).name}: cannot be read as a LoRA: {reason}. Download it again, or choose another."
        ) from error


def preload_lora(path: str) -> None:
    """Read a LoRA file into memory if the setting `preload_loras` has room for it; LoraFileError if it is broken."""
    if Path(path).stat().st_size <= settings().preload_loras << 20:
        read_lora(path)
    else:
        log_not_preloaded(path)


def _pinned(version: Version, tensors: dict, metadata: dict | None) -> LoraFile:
    limit = settings().preload_loras
    others = [other for other, file in kept.items() if file.buffer is not None]
    while sum(other.n_bytes for other in others) + version.n_bytes > limit << 20:
        _let_go(others.pop(0), f"preload_loras is {limit} MB")
    file = _in_one_buffer(tensors, metadata)
    where = "pinned memory" if file.is_pinned else "memory"
    log.info("GGUF Native: LoRA %s stays in %s (%.1f MB).", Path(version.path).name, where, version.n_bytes / 2**20)
    return file


def _from_pages(version: Version, tensors: dict, metadata: dict | None) -> LoraFile:
    """One larger than what may be copied: as many as the node has inputs for."""
    others = [other for other, file in kept.items() if file.buffer is None]
    limit = settings().max_loras
    if len(others) >= limit:
        _let_go(others[0], f"max_loras is {limit}")
    is_beside_gpu = SYSTEM_CAN and comfy.model_management.get_torch_device().type == "cuda"
    views, parts = _in_parts(tensors) if is_beside_gpu else (tensors, [])
    return LoraFile(views, metadata, None, parts, False)


def _pin_pages(parts: list[PinnedPart]) -> bool:
    """Whether they are pinned now: a model may have taken their room since they last were.

    Into room that is free, for a model's weights cross the bus at each step; other LoRAs leave it first.
    """
    if not all(part.is_pinned() for part in parts):
        others = [part for part in parts_of_loras() if part not in parts]
        while not is_room_free(parts) and others:
            others.pop(0).unpin()
        if is_room_free(parts):
            pin_parts(parts, comfy.model_management.get_torch_device())
    # They are wanted whole as soon as sampling begins, so the driver's answer is waited for.
    if parts and all(part.is_pinned() for part in parts):
        return True
    for part in parts:
        part.unpin()
    return False


def parts_of_loras() -> list[PinnedPart]:
    """What may be pinned of files, in their pages; the least recently used first."""
    return [*left, *(part for file in kept.values() for part in file.parts)]


# What the host notes at the storage of a tensor that views a file.
NOTES = "_comfy_tensor_file_slice", "_comfy_tensor_mmap_refs"


def _in_parts(tensors: dict) -> tuple[dict, list[PinnedPart]]:
    """The same tensors as views of their file's parts, as far as the host says where in it they lie; and the parts."""
    storages = {key: tensor.untyped_storage() for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    slices = {key: getattr(storage, NOTES[0]) for key, storage in storages.items() if hasattr(storage, NOTES[0])}
    if not slices:
        return tensors, []
    # The host's own descriptor: by its name the file may be another one by now.
    (descriptor,) = {piece.file_ref for piece in slices.values()}
    file = open(os.dup(descriptor), "rb", buffering=0)  # noqa: SIM115 (closed with the last part)
    n_bytes = os.fstat(descriptor).st_size
    # The host takes what its file has of a tensor that is said to be longer.
    whole = {
        key: piece
        for key, piece in slices.items()
        if piece.size == tensors[key].nbytes and 0 <= piece.offset <= n_bytes - piece.size
    }
    parts, views = parts_for(file, [(piece.offset, piece.size) for piece in whole.values()]), dict(tensors)
    for key, piece in whole.items():
        data = parts[piece.offset, piece.size].view(piece.offset, piece.size)
        for note in NOTES:
            setattr(data.untyped_storage(), note, getattr(storages[key], note))
        views[key] = data.view(tensors[key].dtype).view(tensors[key].shape)
    return views, list(dict.fromkeys(parts.values()))


def _let_go(version: Version, reason: str) -> None:
    file = kept.pop(version)
    if file.is_pinned:
        comfy.model_management.unpin_memory(file.buffer)
    left.update(file.parts)
    log.info("GGUF Native: LoRA %s leaves memory: %s.", Path(version.path).name, reason)


@cache
def log_not_preloaded(path: str) -> None:
    log.info(
        "GGUF Native: LoRA %s is larger than preload_loras (%d MB), so it is not preloaded.",
        Path(path).name,
        settings().preload_loras,
    )


@cache
def log_in_place(path: str) -> None:
    log.info("GGUF Native: LoRA %s is pinned where the system has its file.", Path(path).name)


@cache
def log_too_large(path: str) -> None:
    log.info(
        "GGUF Native: LoRA %s, larger than preload_loras (%d MB), is not pinned, so it comes from its file, which is "
        "slower.",
        Path(path).name,
        settings().preload_loras,
    )


def _in_one_buffer(contents: dict, metadata: dict | None) -> LoraFile:
    # A torch file may hold numbers beside its tensors.
    tensors = {key: value for key, value in contents.items() if isinstance(value, torch.Tensor)}
    starts, end = {}, 0
    for key, tensor in tensors.items():
        starts[key] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer, views = torch.empty(end, dtype=torch.uint8), dict(contents)
    for key, tensor in tensors.items():
        views[key] = buffer[starts[key] : starts[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[key].copy_(tensor)
    return LoraFile(views, metadata, buffer, [], comfy.model_management.pin_memory(buffer))
