"""What every input of the converter looks like: tensors by name, read run by run when it is their turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import SourceError


class SourceTensor(NamedTuple):
    """One tensor: its dtype and shape, once it is decoded, and how to have any run of its values.

    `load(start, stop)` gives the values from number `start` to before `stop`, in row-major order, of any shape. Both
    are multiples of `unit`, or `stop` is the end: packed formats decode whole blocks, rows or tiles only. What it gives
    is fresh or read-only: never write to it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[int, int], torch.Tensor]
    unit: int = 1

    @property
    def n_values(self) -> int:
        return torch.Size(self.shape).numel()

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Values `start` to before `stop` of the flattened tensor, [stop - start]; a unit more is decoded at most."""
        first, last = start // self.unit * self.unit, min(-(-stop // self.unit) * self.unit, self.n_values)
        return self.load(first, last).reshape(-1)[start - first : stop - first]

    def read(self) -> torch.Tensor:
        """The whole tensor: only for those that are known to be small."""
        return self.values(0, self.n_values).view(self.shape)


class Run(NamedTuple):
    """Some consecutive values of a tensor, those from number `start` to before `stop`."""

    tensor: SourceTensor
    start: int
    stop: int

    def read(self) -> torch.Tensor:
        return self.tensor.values(self.start, self.stop)


def runs(tensor: SourceTensor, columns: int, most: int) -> Iterator[Run]:
    """A tensor in runs of whole rows of `columns` values: at most `most` values each, at least one row."""
    step = max(1, most // columns) * columns
    for start in range(0, tensor.n_values, step):
        yield Run(tensor, start, min(start + step, tensor.n_values))


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


def read_ahead(some: Iterable[Run]) -> Iterator[torch.Tensor]:
    """The values of each run in turn; while one is in use, a thread reads the next."""
    with ThreadPoolExecutor(1, "gguf-native-reader") as reader:
        coming = None
        for run in some:
            before, coming = coming, reader.submit(run.read)
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
