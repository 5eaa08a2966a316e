"""Checkpoints of torch.save, read without running code from them and without loading them whole."""

import pickle
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from .errors import SourceError
from .source import Source, SourceTensor

# Under which key trainers put the weights.
WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
# What torch raises of a file that is cut off or altered, by where that is.
DAMAGE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error)
# What was read through a mapping stays in memory while it is open.
MAPPED_BYTES = 64 << 20


class TorchCheckpoint:
    """An open checkpoint, mapped; it is mapped afresh when much of it has been read, which gives the memory back."""

    def __init__(self, path: Path):
        self.path = path
        self.read_bytes = 0
        self.tensors = load_tensors(path)

    def load(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some values of one tensor: a view of the mapping, or a copy where they do not lie in a row there."""
        if self.read_bytes > MAPPED_BYTES:
            self.tensors, self.read_bytes = load_tensors(self.path), 0
        rows = rows_of(self.tensors[name])
        unit = unit_of(rows)
        self.read_bytes += (stop - start) * rows.itemsize
        return rows[start // unit : -(-stop // unit)]


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, flat where it lies in a row; a transposed one, say, has rows that are gathered from all of it."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def unit_of(rows: torch.Tensor) -> int:
    """How many values one of `rows_of` has."""
    return max(1, rows.shape[1:].numel())


def open_torch(path: Path) -> Source:
    """A .pt, .pth, .ckpt or .bin file. Raises SourceError, also where loading would run code."""
    checkpoint = TorchCheckpoint(path)
    tensors = {
        name: SourceTensor(tensor.dtype, tuple(tensor.shape), partial(checkpoint.load, name), unit_of(rows_of(tensor)))
        for name, tensor in checkpoint.tensors.items()
    }
    return Source("torch checkpoint", (path,), tensors, {})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, mapped."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise SourceError(
            f"{path.name}: is damaged, or holds more than tensors and would run code if loaded, so it is not. "
            "Get the safetensors file of this model."
        ) from None
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{path.name}: is damaged, or no checkpoint of torch 1.6 or newer ({reason:.120}).") from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: tensor for name, tensor in named if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise SourceError(f"{path.name}: holds no tensors by name.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.layout != torch.strided:
            raise SourceError(
                f"{path.name}: tensor {name!r:.100} ({tensor.layout}) must be dense and have a string as its name. "
                "Save the model's state_dict."
            )
    return tensors
