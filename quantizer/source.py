"""What every input of the converter looks like: tensors by name, each read only when it is its turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import SourceError


class SourceTensor(NamedTuple):
    """One tensor: the dtype and shape of what `read()` gives. It is fresh or read-only: never write to it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def n_values(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Source:
    """An open input: its kind of file, the files it consists of, its tensors in file order and its metadata.

    `carries` are the metadata that the output keeps as they are, those of a GGUF file: key -> the writer's name of its
    type.
    """

    kind: str
    paths: tuple[Path, ...]
    tensors: Mapping[str, SourceTensor]
    metadata: Mapping[str, object]
    carries: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.paths[0].name

    def with_tensors(self, tensors: Mapping[str, SourceTensor]) -> "Source":
        return replace(self, tensors=tensors)


def read_ahead(tensors: Iterable[SourceTensor]) -> Iterator[torch.Tensor]:
    """Each tensor in turn; while one is in use, a thread reads the next."""
    with ThreadPoolExecutor(1, "gguf-native-reader") as reader:
        coming = None
        for tensor in tensors:
            before, coming = coming, reader.submit(tensor.read)
            if before is not None:
                yield before.result()
                del before
        if coming is not None:
            yield coming.result()


def read_bytes(path: Path, offset: int, n_bytes: int) -> torch.Tensor:
    """uint8 [n_bytes] of a file, in memory of its own: a mapping would count as this process's memory."""
    raw = torch.empty(n_bytes, dtype=torch.uint8)
    view, done = memoryview(raw.numpy()), 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < n_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise SourceError(f"{path.name}: ends {n_bytes - done} bytes early; it changed while it was read.")
            done += count
    return raw
