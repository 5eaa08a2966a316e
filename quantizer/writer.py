"""Writes GGUF files, version 3: header first, then one tensor after the other, as they come.

A file has a temporary name, its own with `.NUMBER.part` at the end, until it is whole; what is interrupted leaves no
other. The number is that of the process: two that write the same file do not write into each other's.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from struct import pack
from typing import BinaryIO, Protocol

import torch

from ..ops.formats import FORMATS
from .errors import TargetError

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
# gguf_metadata_value_type: its number and struct code. A type in brackets is an array of it.
VALUE_TYPES = {
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "STRING": (8, ""),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
ARRAY = 9

# Key -> (value type, value).
Pairs = Mapping[str, tuple[str, object]]


class Tensor(Protocol):
    """What the header says of a tensor: shape in torch order, type a key of FORMATS."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


# The bytes of a tensor, uint8 in any number of pieces.
Packed = Callable[[Tensor], Iterable[torch.Tensor]]


def write_gguf(paths: Sequence[Path], pairs: Pairs, shards: Sequence[Sequence[Tensor]], packed: Packed) -> None:
    """Write a model: the tensors of each shard to the path of the same place; one shard is a whole file.

    `packed` is called once for each tensor, in their order. All files get their names at the end, when they are on
    the disk; on any exception (also KeyboardInterrupt) none does, and the temporary ones are removed.
    """
    n_tensors = sum(len(shard) for shard in shards)
    with ExitStack() as unfinished:
        for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
            remove_leftovers(path)
            unfinished.callback(temporary(path).unlink, missing_ok=True)
            with temporary(path).open("wb") as file:
                write_shard(file, shard_pairs(pairs, number, len(shards), n_tensors), shard, packed)
                file.flush()
                os.fsync(file.fileno())
        for path in paths:
            temporary(path).replace(path)


def temporary(path: Path) -> Path:
    """The name of a file that is not whole yet."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def remove_leftovers(path: Path) -> None:
    """Remove what processes left that were killed. One that still runs then fails where it would rename its file."""
    for left in path.parent.glob(f"{escape(path.name)}.*.part"):
        left.unlink(missing_ok=True)


def shard_names(path: Path, count: int) -> list[Path]:
    """name-00001-of-0000N.gguf ..., or `path` itself for one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)]


def into_shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """The tensors in runs of at most `max_bytes` together; 0 is no limit. Raises TargetError for a larger tensor."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = aligned(tensor.nbytes)
        if 0 < max_bytes < size:
            raise TargetError(
                f"Tensor '{tensor.name}' takes {size:,} bytes; shards of {max_bytes:,} cannot hold it. "
                "Allow larger shards (--split-max-size)."
            )
        if 0 < max_bytes < used + size:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def shard_pairs(pairs: Pairs, number: int, count: int, n_tensors: int) -> Pairs:
    """The metadata of one shard: all of it is in the first."""
    if count == 1:
        return pairs
    about_split = {
        "split.no": ("UINT16", number),
        "split.count": ("UINT16", count),
        "split.tensors.count": ("INT32", n_tensors),
    }
    return {**pairs, **about_split} if number == 0 else about_split


def write_shard(file: BinaryIO, pairs: Pairs, tensors: Sequence[Tensor], packed: Packed) -> None:
    """One whole file."""
    file.write(padded(header(pairs, tensors)))
    for tensor in tensors:
        written = 0
        for piece in packed(tensor):
            written += file.write(memoryview(piece.contiguous().numpy()).cast("B"))
        file.write(bytes(aligned(written) - written))


def header(pairs: Pairs, tensors: Sequence[Tensor]) -> bytes:
    """Everything before the data, without the padding."""
    parts = [MAGIC, pack("<IQQ", VERSION, len(tensors), len(pairs))]
    parts += [string(key) + value(type_name, content) for key, (type_name, content) in pairs.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        number = FORMATS[tensor.type].number
        parts.append(string(tensor.name) + pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset))
        offset += aligned(tensor.nbytes)
    return b"".join(parts)


def value(type_name: str, content: object) -> bytes:
    """A value with the number of its type before it."""
    if not type_name.startswith("["):
        return pack("<I", VALUE_TYPES[type_name][0]) + items(type_name, [content])
    element = type_name.strip("[]")
    return pack("<IIQ", ARRAY, VALUE_TYPES[element][0], len(content)) + items(element, content)


def items(type_name: str, values: Sequence) -> bytes:
    """Values of one type, one after the other."""
    if type_name == "STRING":
        return b"".join(string(text) for text in values)
    return pack(f"<{len(values)}{VALUE_TYPES[type_name][1]}", *values)


def string(text: str) -> bytes:
    raw = text.encode()
    return pack("<Q", len(raw)) + raw


def aligned(n_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def padded(raw: bytes) -> bytes:
    return raw.ljust(aligned(len(raw)), b"\0")
