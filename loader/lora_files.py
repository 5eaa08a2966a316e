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
    """What a file holds, in one buffer: pinning costs one call, and a replaced file on disk changes nothing here."""

    tensors: dict  # by key, views of the buffer
    metadata: dict | None
    buffer: torch.Tensor  # uint8 [bytes]
    is_pinned: bool


# Least recently used first.
kept: OrderedDict[Version, LoraFile] = OrderedDict()


def read_lora(path: str) -> tuple[dict[str, torch.Tensor], dict | None]:
    """(tensors, metadata) of a LoRA file; from memory where the setting `preload_loras` has room for it.

    The same version gives the same tensors as long as it is kept. Raises LoraFileError for a broken file.
    """
    status = Path(path).stat()
    version = Version(path, status.st_mtime_ns, status.st_size)
    if version not in kept:
        tensors, metadata = _from_disk(path)
        if not _make_room(version):
            return tensors, metadata
        kept[version] = _in_one_buffer(tensors, metadata)
        where = "pinned memory" if kept[version].is_pinned else "memory"
        log.info("GGUF Native: LoRA %s stays in %s (%.1f MB).", Path(path).name, where, status.st_size / 2**20)
    kept.move_to_end(version)
    file = kept[version]
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


def _make_room(version: Version) -> bool:
    """Let older versions of the file and what was least recently used go; False if the file alone is too large."""
    budget = settings().preload_loras * 2**20
    for other in [other for other in kept if other.path == version.path]:
        _let_go(other, "its file has changed")
    if version.n_bytes > budget:
        if budget:
            log_too_large(version.path)
        return False
    while sum(other.n_bytes for other in kept) + version.n_bytes > budget:
        _let_go(next(iter(kept)), f"preload_loras is {settings().preload_loras} MB")
    return True


def _let_go(version: Version, reason: str) -> None:
    file = kept.pop(version)
    if file.is_pinned:
        comfy.model_management.unpin_memory(file.buffer)
    log.info("GGUF Native: LoRA %s leaves memory: %s.", Path(version.path).name, reason)


@cache
def log_too_large(path: str) -> None:
    log.info(
        "GGUF Native: LoRA %s is larger than preload_loras (%d MB): every change of it reads the file.",
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
