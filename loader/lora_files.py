"""LoRA files in memory, pinned beside a GPU: each is read once, then changing LoRAs reads nothing from disk."""

import logging
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch

from ..config import settings
from .lora_pages import in_pages, pin_pages

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
    tensors: the same ones again are what another strength can leave on the GPU.
    """

    tensors: dict  # by key, views of the buffer if there is one
    metadata: dict | None
    buffer: torch.Tensor | None  # uint8 [bytes]
    is_pinned: bool  # of the buffer


# Least recently used first.
kept: OrderedDict[Version, LoraFile] = OrderedDict()


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
        keep = _copied if version.n_bytes <= budget else _held
        kept[version] = keep(version, tensors, metadata)
    kept.move_to_end(version)
    file = kept[version]
    if file.buffer is None:
        log_way = log_in_place if pin_pages(file.tensors) else log_too_large
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


def _copied(version: Version, tensors: dict, metadata: dict | None) -> LoraFile:
    limit = settings().preload_loras
    others = [other for other, file in kept.items() if file.buffer is not None]
    while sum(other.n_bytes for other in others) + version.n_bytes > limit << 20:
        _let_go(others.pop(0), f"preload_loras is {limit} MB")
    file = _in_one_buffer(tensors, metadata)
    where = "pinned memory" if file.is_pinned else "memory"
    log.info("GGUF Native: LoRA %s stays in %s (%.1f MB).", Path(version.path).name, where, version.n_bytes / 2**20)
    return file


def _held(version: Version, tensors: dict, metadata: dict | None) -> LoraFile:
    """One larger than what may be copied: as many as the node has inputs for."""
    others = [other for other, file in kept.items() if file.buffer is None]
    limit = settings().max_loras
    if len(others) >= limit:
        _let_go(others[0], f"max_loras is {limit}")
    return LoraFile(in_pages(tensors), metadata, None, False)


def _let_go(version: Version, reason: str) -> None:
    file = kept.pop(version)
    if file.is_pinned:
        comfy.model_management.unpin_memory(file.buffer)
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
    return LoraFile(views, metadata, buffer, comfy.model_management.pin_memory(buffer))
