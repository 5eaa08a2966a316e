"""Opens a GGUF file: every number of its header is checked, its tensors are views of the mapped file."""

import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import torch

from .errors import (
    BigEndianError,
    ClosedFileError,
    CountError,
    DuplicateTensorError,
    FileUnreadableError,
    MissingTensorError,
    NotGGUFError,
    TruncatedFileError,
    UnsupportedVersionError,
)
from .gguf_cursor import Cursor
from .gguf_metadata import Metadata, alignment_of, read_pairs
from .gguf_tensors import TensorInfo, read_tensor_infos
from .shards import check_shard, check_tensor_count, shard_paths

MAGIC = b"GGUF"
VERSION = Struct("<I")
COUNTS = Struct("<QQ")
MAX_COUNT = 65_536

FOREIGN_MAGIC = {
    b"vers": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<!DO": "a web page; download the file itself",
    b"<!do": "a web page; download the file itself",
    b"<htm": "a web page; download the file itself",
    b"PK\x03\x04": "a zip archive or a PyTorch checkpoint; load it with ComfyUI's own loaders",
    b"lmgg": "a model of the time before GGUF; convert it again",
    b"fmgg": "a model of the time before GGUF; convert it again",
    b"tjgg": "a model of the time before GGUF; convert it again",
}


class Shard(NamedTuple):
    """One mapped file and what its header says."""

    mapping: mmap.mmap
    metadata: Metadata
    tensors: dict[str, TensorInfo]


def open_gguf(path: str | os.PathLike[str]) -> "GGUFFile":
    """Open a GGUF file, or all parts of a split one through its first part.

    Raises:
        GGUFError: one of its kinds, see `errors.py`.
    """
    return GGUFFile(path)


def map_file(path: Path) -> mmap.mmap:
    """The file mapped read-only; the file handle is closed again."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise TruncatedFileError(f"{path.name}: the file is empty. Download it again.", len(MAGIC))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileUnreadableError(f"{path}: cannot be opened: {error.strerror}.") from error


def open_shard(path: Path) -> Shard:
    """Map one file and read its header."""
    cursor = Cursor(map_file(path), path.name)
    check_magic(cursor)
    check_version(cursor)
    n_tensors, n_pairs = cursor.unpack(COUNTS, "the header")
    check_count(cursor.file, n_tensors, "tensors")
    check_count(cursor.file, n_pairs, "key-value pairs")
    pairs = read_pairs(cursor, n_pairs)
    tensors = read_tensor_infos(cursor, n_tensors, alignment_of(cursor.file, pairs), path)
    return Shard(cursor.buffer, Metadata(cursor.file, cursor.buffer, pairs), tensors)


def check_magic(cursor: Cursor) -> None:
    """The file starts with the magic."""
    magic = cursor.buffer[: len(MAGIC)]
    if not MAGIC.startswith(magic):
        hint = FOREIGN_MAGIC.get(magic, "not a GGUF file, whatever its name says")
        raise NotGGUFError(f"{cursor.file}: starts with {magic!r}; a GGUF file starts with {MAGIC!r}. It is {hint}.")
    cursor.take(len(MAGIC), "the header")


def check_version(cursor: Cursor) -> None:
    """The version is 2 or 3; in a big-endian file its upper half holds the number."""
    (version,) = cursor.unpack(VERSION, "the header")
    if version and version & 0xFFFF == 0:
        raise BigEndianError(
            f"{cursor.file}: is a big-endian GGUF file (version bytes {VERSION.pack(version).hex(' ')}); only "
            "little-endian files are read. Get the little-endian file, or convert it."
        )
    if version not in (2, 3):
        raise UnsupportedVersionError(
            f"{cursor.file}: is GGUF version {version}; versions 2 and 3 are read. "
            f"{'Convert the model again.' if version < 2 else 'Update the pack.'}"
        )


def check_count(file: str, count: int, things: str) -> None:
    """A count is believable; that the file is long enough shows when its items are read."""
    if count > MAX_COUNT:
        raise CountError(
            f"{file}: claims {count:,} {things}; at most {MAX_COUNT:,} are allowed. "
            "The file is damaged: download it again."
        )


class GGUFFile:
    """An open GGUF file; closes as a context manager.

    Attributes:
        path: the file, or the first part of a split one.
        name: its name without the folder, as messages say it.
        metadata: keys to Python values, arrays decoded when asked for (those of the first part).
        tensors: tensor names to TensorInfo, of all parts, in file order.

    A tensor from `read` keeps its mapping alive by itself, so it outlives `close()`; the mapping goes with the last.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.name = self.path.name
        first = open_shard(self.path)
        self.metadata = first.metadata
        self._mappings = {self.path: first.mapping}
        tensors = first.tensors
        paths = shard_paths(self.path, first.metadata)
        for number, shard_path in enumerate(paths[1:], start=1):
            shard = open_shard(shard_path)
            check_shard(shard_path, shard.metadata, number, len(paths))
            check_disjoint(shard_path, tensors, shard.tensors)
            self._mappings[shard_path] = shard.mapping
            tensors |= shard.tensors
        if len(paths) > 1:
            check_tensor_count(self.path, first.metadata, len(tensors))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def mapping(self, name: str) -> mmap.mmap:
        """The mapping of the file that holds tensor `name`; whoever holds it keeps it alive, nobody closes it."""
        if name not in self.tensors:
            raise MissingTensorError(
                f"{self.name}: has no tensor {name!r:.100}; `.tensors` lists the {len(self.tensors)} it has."
            )
        if not self._mappings:
            raise ClosedFileError(f"{self.name}: tensor {name!r:.100} was asked for after the file was closed.")
        return self._mappings[self.tensors[name].path]

    def read(self, name: str) -> torch.Tensor:
        """The packed bytes of tensor `name`: uint8 `[nbytes]`, a view of the read-only mapping. Never write to it."""
        mapping = self.mapping(name)
        info = self.tensors[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=info.offset)

    def close(self) -> None:
        """Let go of the file; tensors already read stay valid."""
        self.metadata.close()
        self._mappings.clear()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_disjoint(path: Path, seen: Mapping[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    """No tensor of this part was in an earlier one."""
    for name in more:
        if name in seen:
            raise DuplicateTensorError(
                f"{path.name}: tensor {name!r:.100} is also in {seen[name].path.name}; each name may appear once. "
                "The parts are of different models: download them again."
            )
