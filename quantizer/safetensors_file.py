"""Safetensors files, whole and in shards: where each tensor lies, so that runs of one are read and none is mapped.

Why not the safetensors library: it slices along dimensions, while a run of values may begin within one row, or within
one matrix of a stack, and end in another. Memory decides nothing: its mapping counts as this process's (542 MB for a
tensor of 537), but opened again for each run it takes 16 MB, and what is here 13. This package needs torch alone.
"""

import json
import math
import re
from functools import partial
from pathlib import Path
from struct import Struct

import torch

from .errors import SourceError
from .source import Source, SourceTensor, read_bytes

HEADER_SIZE = Struct("<Q")
MAX_HEADER_BYTES = 100_000_000
INDEX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|sft)")
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Before 2.7 torch has no float8_e8m0fnu.
DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items() if hasattr(torch, torch_name)}


def open_safetensors(path: Path) -> Source:
    """A safetensors file, an index.json, or any shard of a model (with its neighbours). Raises SourceError."""
    paths = shards_of_index(path) if path.name.endswith(INDEX) else shards_beside(path)
    tensors: dict[str, SourceTensor] = {}
    metadata: dict[str, object] = {}
    for shard in paths:
        more, about = read_header(shard)
        if twice := next((name for name in more if name in tensors), None):
            raise SourceError(f"{shard.name}: tensor '{twice}' is also in another shard. Download the model again.")
        tensors |= more
        metadata |= about
    return Source("safetensors", tuple(paths), tensors, metadata)


def shards_of_index(path: Path) -> list[Path]:
    """The files that an index names, all of them present."""
    try:
        names = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        paths = [path.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        paths = []
    if not paths:
        raise SourceError(f"{path.name}: is not an index of safetensors (JSON with 'weight_map' that names files).")
    return check_present(path, paths)


def shards_beside(path: Path) -> list[Path]:
    """The shards that the name of one of them tells; a file of another name is whole."""
    name = SHARD_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name[3])
    paths = [path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}.{name[4]}") for number in range(1, count + 1)]
    if path not in paths:
        raise SourceError(f"{path.name}: is shard {int(name[2])} of {count} by its name. Give it the name it had.")
    return check_present(path, paths)


def check_present(path: Path, paths: list[Path]) -> list[Path]:
    """`paths`, if all of them are files."""
    missing = [shard.name for shard in paths if not shard.is_file()]
    if missing:
        raise SourceError(
            f"{path.name}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:5])}. "
            "Put all of them into one folder."
        )
    return paths


def read_header(path: Path) -> tuple[dict[str, SourceTensor], dict[str, object]]:
    """(tensors in the order of their bytes, metadata) of one file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (n_bytes,) = HEADER_SIZE.unpack(file.read(HEADER_SIZE.size).ljust(HEADER_SIZE.size, b"\0"))
            if not 2 <= n_bytes <= min(MAX_HEADER_BYTES, size - HEADER_SIZE.size):
                raise SourceError(f"{path.name}: is not a safetensors file, or is cut off. Download it again.")
            header = json.loads(file.read(n_bytes))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{path.name}: its header is not JSON; the file is damaged. Download it again.") from None
    metadata = (header.pop("__metadata__", None) or {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise SourceError(
            f"{path.name}: its header, or '__metadata__' there, is no JSON object; the file is damaged. "
            "Download it again."
        )
    start = HEADER_SIZE.size + n_bytes
    entries = [(name, *checked(path, name, entry, size - start)) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3])
    tensors = {
        name: SourceTensor(dtype, shape, partial(load, path, start + offset, dtype))
        for name, dtype, shape, offset in entries
    }
    return tensors, metadata


def checked(path: Path, name: str, entry: object, data_bytes: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """(dtype, shape, offset) of one entry of a header, if it agrees with itself and the file."""
    try:
        type_name, shape, (start, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        is_sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and stop <= data_bytes
    except (TypeError, KeyError, ValueError):
        raise SourceError(f"{path.name}: tensor {name!r:.100} has a damaged entry. Download the file again.") from None
    if type_name not in DTYPES:
        raise SourceError(f"{path.name}: tensor {name!r:.100} has dtype {type_name!r:.20}, which is not read here.")
    if not is_sound or stop - start != math.prod(shape) * DTYPES[type_name].itemsize:
        raise SourceError(
            f"{path.name}: tensor {name!r:.100} of shape {list(shape)} does not lie where its entry says. "
            "The file is damaged or cut off: download it again."
        )
    return DTYPES[type_name], shape, start


def load(path: Path, offset: int, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
    """Some values of the tensor that begins at `offset`, in memory of their own."""
    size = dtype.itemsize
    return read_bytes(path, offset + start * size, (stop - start) * size).view(dtype)
