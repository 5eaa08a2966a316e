"""Opens whatever the converter takes as input, by what the file is."""

import os
from collections.abc import Callable
from pathlib import Path

from .errors import SourceError
from .gguf_source import open_gguf_source
from .safetensors_file import INDEX, open_safetensors
from .scaled_weights import decode_scaled_weights
from .source import Source
from .torch_file import open_torch

OPENERS: dict[str, Callable[[Path], Source]] = {
    ".safetensors": open_safetensors,
    ".sft": open_safetensors,
    ".json": open_safetensors,
    ".gguf": open_gguf_source,
    ".pt": open_torch,
    ".pth": open_torch,
    ".ckpt": open_torch,
    ".bin": open_torch,
}


def open_source(path: str | os.PathLike[str]) -> Source:
    """The tensors of a model file, or of a folder that holds one; weights in ComfyUI's formats with their scales.

    Raises SourceError, or a GGUFError for a GGUF file.
    """
    path = Path(path)
    if path.is_dir():
        path = model_in_folder(path)
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file.")
    if path.suffix.lower() not in OPENERS:
        raise SourceError(f"{path.name}: is of no kind that is read: {', '.join(OPENERS)}, or a folder of shards.")
    source = OPENERS[path.suffix.lower()](path)
    if not source.tensors:
        raise SourceError(f"{path.name}: holds no tensors.")
    return source.with_tensors(decode_scaled_weights(source.tensors, source.metadata, source.name))


def model_in_folder(folder: Path) -> Path:
    """The index of the shards in a folder, or its only safetensors file."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    files = indices or sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and not indices and len({file.name.rpartition("-of-")[2] for file in files}) == 1:
        # All shards of one model, without an index.
        return files[0]
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:8]) or "none"
        raise SourceError(f"{folder}: must hold one model as safetensors; found: {found}. Name the file itself.")
    return files[0]
