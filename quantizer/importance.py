"""How much each column of a matrix matters: importance files ("imatrix") as llama.cpp writes them, read and written."""

from collections.abc import Mapping
from pathlib import Path
from struct import Struct, error
from typing import NamedTuple

import torch

from ..loader import open_gguf
from .errors import ImportanceError
from .writer import write_gguf

MAGIC = b"GGUF"
SUMS, COUNTS = ".in_sum2", ".counts"
INT32 = Struct("<i")


class StoredSums(NamedTuple):
    """One tensor of an importance file."""

    name: str
    values: torch.Tensor
    type: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def read_importance(path: str | Path) -> dict[str, torch.Tensor]:
    """Name of a matrix -> float32 [columns], the mean square of each input. GGUF files and the older .dat.

    Raises ImportanceError, or a GGUFError.
    """
    path = Path(path)
    if not path.is_file():
        raise ImportanceError(f"{path}: there is no such importance file.")
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    found = read_gguf(path) if is_gguf else read_dat(path)
    for name, values in found.items():
        if not values.isfinite().all() or (values < 0).any():
            raise ImportanceError(f"{path.name}: the importance of '{name}' is negative, infinite or NaN.")
    if not found:
        raise ImportanceError(f"{path.name}: holds no importance (tensors ending in {SUMS} and {COUNTS}).")
    return found


def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The means of a GGUF file's sums."""
    sums, counts = read_sums(path)
    return {name: values / max(counts[name], 1) for name, values in sums.items()}


def read_sums(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """<name>.in_sum2, the sums of squares, float32 [columns], and <name>.counts, how many inputs were summed."""
    sums, counts = {}, {}
    with open_gguf(path) as file:
        for name in (name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)):
            if name + COUNTS not in file.tensors or file.tensors[name + SUMS].type != "F32":
                raise ImportanceError(f"{path.name}: '{name}{SUMS}' must be F32 and have '{name}{COUNTS}' beside it.")
            values, counted = (file.read(name + end).view(torch.float32) for end in (SUMS, COUNTS))
            # One row for each matrix of a stack of experts, which share their importance here.
            columns = file.tensors[name + SUMS].shape[-1]
            sums[name], counts[name] = values.view(-1, columns).sum(0), int(counted.sum())
    return sums, counts


def read_dat(path: Path) -> dict[str, torch.Tensor]:
    """The older binary form: a count, then for each matrix its name, calls, number of columns and sums."""
    raw = path.read_bytes()
    found, at = {}, INT32.size
    try:
        for _ in range(INT32.unpack_from(raw)[0]):
            (length,) = INT32.unpack_from(raw, at)
            name = raw[at + 4 : at + 4 + length].decode()
            at += 4 + length
            calls, columns = INT32.unpack_from(raw, at)[0], INT32.unpack_from(raw, at + 4)[0]
            sums = torch.frombuffer(bytearray(raw[at + 8 : at + 8 + 4 * columns]), dtype=torch.uint8)
            found[name] = sums.view(torch.float32).view(columns) / max(calls, 1)
            at += 8 + 4 * columns
    except (error, RuntimeError, ValueError):
        raise ImportanceError(f"{path.name}: is no importance file, or is cut off.") from None
    return found


def write_importance(path: str | Path, sums: Mapping[str, torch.Tensor], counts: Mapping[str, int], about: str) -> None:
    """Write sums of squared inputs, float32 [columns] by matrix, and how many inputs were summed, as llama.cpp does.

    about: what was run meanwhile, for `imatrix.datasets`. The file appears when it is whole.
    """
    tensors = []
    for name, values in sums.items():
        tensors.append(StoredSums(name + SUMS, values.float().cpu().view(1, -1)))
        tensors.append(StoredSums(name + COUNTS, torch.tensor([[float(counts[name])]])))
    pairs = {
        "general.type": ("STRING", "imatrix"),
        "imatrix.datasets": ("[STRING]", [about]),
        "imatrix.chunk_count": ("UINT32", min(max(counts.values(), default=0), 0xFFFFFFFF)),
        "imatrix.chunk_size": ("UINT32", 1),
    }
    write_gguf([Path(path)], pairs, [tensors], lambda tensor: [tensor.values])
