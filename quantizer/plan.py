"""What becomes of each tensor of a source: its type, the shape in which it is stored, and its bytes."""

import re
from collections.abc import Mapping
from functools import partial
from math import lcm, prod
from typing import NamedTuple

import torch

from ..loader.gguf_tensors import MAX_DIMS
from ..ops.formats import FORMATS
from ..ops.formats.plain import PlainFormat
from .errors import SourceError
from .recipes import BLOCKS_OF_32, FileType
from .sensitivity import SENSITIVITY, Rule, Sensitivity
from .source import SourceTensor

# Up to this many values a tensor stays in F32: it costs nothing.
SMALL = 1024
# Up to this many values a kept tensor of float32 stays so; larger ones become BF16.
MEDIUM = 1 << 20
# Rows in which tensors are stored whose own rows are not whole blocks.
FLAT_ROW = 256
BLOCK_NUMBER = re.compile(r"(.*?)\.(\d+)\.")
PLAIN_TYPES = {
    row.storage_dtype: name for name, row in FORMATS.items() if issubclass(row, PlainFormat) and name != "F64"
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What models keep beside their weights: marks, and the vocabulary of a text encoder.
LEFT_OUT = (torch.uint8, torch.bool)


class PlannedTensor(NamedTuple):
    """One tensor of the output. `shape` is how it is stored, `original_shape` what it is, in torch order."""

    name: str
    type: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]
    source: SourceTensor

    @property
    def nbytes(self) -> int:
        row = FORMATS[self.type]
        return prod(self.shape) // row.block_size * row.block_bytes

    @property
    def columns(self) -> int:
        """Values after which a row as it is stored and one of the source begin together again."""
        return lcm(self.shape[-1], *self.source.shape[-1:])

    def weights_of_columns(self, importance: torch.Tensor | None) -> torch.Tensor | None:
        """float32 [columns]: importance of the source's columns, None where there is none, over and over."""
        return None if importance is None else importance.repeat(self.columns // len(importance))


def plan_tensors(tensors: Mapping[str, SourceTensor], architecture: str, file_type: FileType) -> list[PlannedTensor]:
    """The output's tensors in the source's order, without those of uint8 and bool that are no weights.

    Raises SourceError for a tensor that GGUF cannot hold.
    """
    sensitivity = SENSITIVITY.get(architecture) or Sensitivity(names_without_number(tensors))
    depths = depths_of(tensors)
    planned = []
    for name, source in tensors.items():
        if source.dtype in LEFT_OUT and not name.endswith(".weight"):
            continue
        source = with_values(source)
        check_dtype(name, source)
        wanted = wanted_type(name, source, sensitivity, depths, file_type)
        planned.append(PlannedTensor(name, *fitting_type(wanted, source), source.shape or (1,), source))
        check_dimensions(planned[-1])
    return planned


def check_dtype(name: str, source: SourceTensor) -> None:
    """Raise SourceError for values that no type holds: packed in a format that is not known, or complex."""
    if source.dtype not in PLAIN_TYPES and source.dtype not in FLOATS:
        raise SourceError(
            f"Tensor '{name}' has dtype {source.dtype}, which GGUF cannot hold; packed weights are read in ComfyUI's "
            "formats only. Convert the original model, in 16 or 32 bits."
        )


def check_dimensions(tensor: PlannedTensor) -> None:
    """Raise SourceError for a tensor that no reader of the file would accept."""
    if len(tensor.shape) > MAX_DIMS:
        raise SourceError(
            f"Tensor '{tensor.name}' has {len(tensor.shape)} dimensions, {list(tensor.shape)}; at most {MAX_DIMS} are "
            "read from GGUF files. Reshape it in the original model."
        )


def with_values(source: SourceTensor) -> SourceTensor:
    """A tensor without values is a flag by its name: one zero stands for it, since GGUF has no empty tensors."""
    return source if source.n_values else SourceTensor(source.dtype, (1,), partial(zero, source.dtype))


def zero(dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype)


def names_without_number(tensors: Mapping[str, SourceTensor]) -> tuple[str, ...]:
    """What is in no block of a model: its inputs, outputs and embeddings, which an unknown model keeps."""
    return tuple(f"^{name}" for name in tensors if not BLOCK_NUMBER.match(name))


def wanted_type(
    name: str, source: SourceTensor, sensitivity: Sensitivity, depths: Mapping[str, int], file_type: FileType
) -> str:
    """The type of one tensor by its name, whether or not its rows fit it."""
    if source.dtype not in FLOATS:
        return PLAIN_TYPES[source.dtype]
    if len(source.shape) < 2 or source.n_values <= SMALL or holds(name, sensitivity.exact):
        return "F32"
    if not name.endswith(".weight") or holds(name, sensitivity.kept):
        return kept_type(source)
    return file_type.types[rank_of(name, sensitivity.rules, depths)]


def kept_type(source: SourceTensor) -> str:
    """The type of a tensor that is not quantised: its own, but no more than 16 bits where there are many values."""
    if source.dtype in (torch.float16, torch.bfloat16):
        return PLAIN_TYPES[source.dtype]
    return "F32" if source.n_values <= MEDIUM else "BF16"


def rank_of(name: str, rules: tuple[Rule, ...], depths: Mapping[str, int]) -> int:
    """The rank of a matrix, 0 where no rule fits."""
    match = BLOCK_NUMBER.match(name)
    series, place = (match[1], int(match[2]) / depths[match[1]]) if match else ("", 0.0)
    for rule in rules:
        if holds(name, rule.parts) and rule.start <= place < rule.stop and series.endswith(rule.series):
            return rule.rank
    return 0


def depths_of(tensors: Mapping[str, SourceTensor]) -> dict[str, int]:
    """Series of blocks -> how many it has, by the largest number."""
    depths: dict[str, int] = {}
    for name in tensors:
        if match := BLOCK_NUMBER.match(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def holds(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in f"^{name}" for part in parts)


def fitting_type(wanted: str, source: SourceTensor) -> tuple[str, tuple[int, ...]]:
    """(type, stored shape) of a tensor: whole blocks in its own rows, else in rows of 256, else in smaller blocks."""
    shape = source.shape or (1,)
    block_size = FORMATS[wanted].block_size
    if shape[-1] % block_size == 0:
        return wanted, shape
    if source.n_values % FLAT_ROW == 0:
        return wanted, (source.n_values // FLAT_ROW, FLAT_ROW)
    smaller = BLOCKS_OF_32.get(wanted)
    if smaller and shape[-1] % FORMATS[smaller].block_size == 0:
        return smaller, shape
    return kept_type(source), shape
