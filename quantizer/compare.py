"""A GGUF file against the model it was made from: which tensors are in one only, and how far the others are off."""

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from ..loader import GGUFFile
from ..loader.gguf_tensors import TensorInfo
from ..loader.key_maps import TEXT_ENCODERS, TextEncoderNames
from ..loader.original_shape import logical_shape
from ..ops.formats import FORMATS
from .checks import forget, slices
from .measure import type_error
from .plan import FLOATS, PLAIN_TYPES, with_values
from .source import SourceTensor

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# How many times the error of normally distributed weights a tensor may have; between these bounds for any type.
ALLOWED_TIMES = 5
LEAST_ALLOWED = 0.01
MOST_ALLOWED = 0.9


class Difference(NamedTuple):
    """How far a tensor is off: root of the mean squared difference over that of the original.

    None: one of the two is not finite. 1 where the original is all zero and the file is not.
    """

    tensor: str
    type: str
    error: float | None

    @property
    def is_too_much(self) -> bool:
        return self.error is None or self.error > allowed_error(self.type)


class Comparison(NamedTuple):
    """`missing` tensors are in the original only, `extra` ones in the file only, `shapes` says which do not agree."""

    differences: list[Difference]
    missing: list[str]
    extra: list[str]
    shapes: list[str]

    @property
    def is_fine(self) -> bool:
        return not (self.missing or self.extra or self.shapes or any(one.is_too_much for one in self.differences))


def compare(file: GGUFFile, originals: Mapping[str, SourceTensor]) -> Comparison:
    """Every tensor of the file with the original of the same name; one slice of both is decoded at a time."""
    originals = {name: with_values(tensor) for name, tensor in originals.items() if can_be_stored(tensor)}
    names = original_names(file)
    shapes, differences = [], []
    for info in file.tensors.values():
        original = originals.get(names[info.name])
        if original is None:
            continue
        if logical_shape(file, info) != (original.shape or (1,)):
            shapes.append(f"{info.name} is {list(logical_shape(file, info))}, its original {list(original.shape)}")
        else:
            differences.append(Difference(info.name, info.type, relative_error(file, info, original)))
            forget(file, info)
    missing = [name for name in originals if name not in set(names.values())]
    extra = [name for name in file.tensors if names[name] not in originals]
    return Comparison(differences, missing, extra, shapes)


def can_be_stored(tensor: SourceTensor) -> bool:
    """Whether GGUF has a type for it: not for bytes, which are a tokenizer's."""
    return tensor.dtype in FLOATS or tensor.dtype in PLAIN_TYPES


def original_names(file: GGUFFile) -> dict[str, str]:
    """Tensor -> its name in the original, where a converter such as llama.cpp's gave it another."""
    tables = (row.names for row in TEXT_ENCODERS if row.signature in file.tensors and widens(file, row))
    table = next(tables, {})
    return {name: original_name(name, table) for name in file.tensors}


def widens(file: GGUFFile, row: TextEncoderNames) -> bool:
    """Whether the matrix that tells two namings apart is the one that widens."""
    info = file.tensors.get(row.widens)
    return info is None or info.shape[0] > info.shape[-1]


def original_name(name: str, table: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    number = LAYER_NUMBER.search(module)
    renamed = table.get(LAYER_NUMBER.sub("{}", module, count=1))
    return f"{renamed.format(number and number[0])}.{kind}" if renamed else name


def relative_error(file: GGUFFile, info: TensorInfo, original: SourceTensor) -> float | None:
    """The error of Difference."""
    difference, energy = 0.0, 0.0
    start = 0
    for decoded in slices(file, info):
        expected = original.values(start, start + decoded.numel()).float()
        difference += float((decoded.flatten() - expected).double().square().sum())
        energy += float(expected.double().square().sum())
        start += decoded.numel()
    if not energy:
        return float(difference > 0)
    error = math.sqrt(difference / energy) if math.isfinite(difference) else math.inf
    return error if math.isfinite(error) else None


@cache
def allowed_error(type_name: str) -> float:
    """The error above which a tensor is not the original in that type."""
    if not hasattr(FORMATS[type_name], "encode"):
        return MOST_ALLOWED
    return min(max(ALLOWED_TIMES * type_error(type_name), LEAST_ALLOWED), MOST_ALLOWED)
