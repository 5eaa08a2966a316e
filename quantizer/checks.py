"""What can be wrong with the values of a tensor whose header is in order: a table of checks, run slice by slice."""

import mmap
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..loader import GGUFFile
from ..loader.gguf_tensors import TensorInfo
from ..ops.dequantize import dequantize
from ..ops.formats import FORMATS, is_packed

# Values decoded at a time: 16 MB as float32.
SLICE = 1 << 22
# Weights of models stay below a hundred; float16 itself ends at 65504.
LARGEST = 1e4
# Where a block is so many times as large as the median one, its scale is damaged: outliers reach a hundred times.
SPREAD = 1000
ALL_ZERO = "all zero"
INTEGERS = ("I8", "I16", "I32", "I64")


class Check(NamedTuple):
    """One thing that may be wrong: `wrong` marks it in a slice of values, given as [blocks, block_size]."""

    name: str
    text: str
    wrong: Callable[[torch.Tensor], torch.Tensor]
    applies: Callable[[TensorInfo], bool]


class Fault(NamedTuple):
    """What is wrong with a tensor: in how many values, at which the first of them lies."""

    tensor: str
    check: str
    values: int
    first: int
    text: str


def not_finite(values: torch.Tensor) -> torch.Tensor:
    """NaN or infinite."""
    return ~values.isfinite()


def absurd(values: torch.Tensor) -> torch.Tensor:
    """Finite, yet larger than any weight."""
    return (values.abs() > LARGEST) & values.isfinite()


def of_a_wild_scale(values: torch.Tensor) -> torch.Tensor:
    """In a block SPREAD times as large as the median of those that are not zero."""
    peaks = values.abs().amax(1)
    usual = peaks[peaks > 0].nanmedian()
    return ((peaks > SPREAD * usual) & peaks.isfinite())[:, None].expand_as(values)


def all_zero(values: torch.Tensor) -> torch.Tensor:
    """Zero, and with it all others of the slice."""
    return torch.full_like(values, not values.any(), dtype=torch.bool)


def is_float(info: TensorInfo) -> bool:
    return info.type not in INTEGERS


def has_blocks(info: TensorInfo) -> bool:
    return is_packed(info.type)


def is_matrix(info: TensorInfo) -> bool:
    """A bias of zeros is nothing unusual."""
    return len(info.shape) > 1 and is_float(info)


CHECKS = (
    Check("not finite", "are NaN or infinite", not_finite, is_float),
    Check("absurd", f"are larger than {LARGEST:g}", absurd, is_float),
    Check("wild scale", f"are in blocks {SPREAD} times as large as the usual one", of_a_wild_scale, has_blocks),
    Check(ALL_ZERO, "are zero, a whole slice of the tensor", all_zero, is_matrix),
)


def slices(file: GGUFFile, info: TensorInfo) -> Iterator[torch.Tensor]:
    """The values of a tensor in order, float32 [blocks, block_size], at most SLICE at a time."""
    block_format = FORMATS[info.type]
    blocks = file.read(info.name).view(-1, block_format.block_bytes)
    for some in blocks.split(SLICE // block_format.block_size):
        yield dequantize(some, info.type)


def forget(file: GGUFFile, info: TensorInfo) -> None:
    """Let the pages of a tensor leave this process's memory; they stay in the system's cache while there is room."""
    if sys.platform == "linux":
        start = info.offset - info.offset % mmap.PAGESIZE
        file.mapping(info.name).madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)


def examine(file: GGUFFile, info: TensorInfo) -> list[Fault]:
    """All faults of one tensor, one at most for each check."""
    counts: dict[Check, tuple[int, int]] = {}
    checks = [check for check in CHECKS if check.applies(info)]
    start = 0
    for values in slices(file, info):
        for check in checks:
            wrong = check.wrong(values).flatten()
            if n_wrong := int(wrong.count_nonzero()):
                before, first = counts.get(check, (0, start + int(wrong.byte().argmax())))
                counts[check] = before + n_wrong, first
        start += values.numel()
    return [fault(info.name, check, *counts[check], start) for check in checks if check in counts]


def fault(tensor: str, check: Check, n_wrong: int, first: int, n_values: int) -> Fault:
    text = f"{n_wrong:,} of {n_values:,} values {check.text}, the first is number {first:,}"
    return Fault(tensor, check.name, n_wrong, first, text)
