"""GGUF files as input: decoded to float32 run by run, to be quantised once more."""

import logging
from functools import partial
from pathlib import Path

import torch

from ..loader import GGUFFile, open_gguf
from ..loader.errors import KeyNameError
from ..loader.gguf_cursor import Cursor
from ..loader.gguf_file import COUNTS, MAGIC, VERSION, map_file
from ..loader.gguf_metadata import MAX_KEY_BYTES, VALUE_TYPE, ArrayValue, read_value
from ..loader.gguf_tensors import TensorInfo
from ..loader.original_shape import ORIGINAL_SHAPE, logical_shape
from ..ops import dequantize
from ..ops.formats import FORMATS, is_packed
from .source import Source, SourceTensor, read_bytes
from .writer import VALUE_TYPES

log = logging.getLogger("gguf_native")

# What the output says of itself, or what holds for the input's bytes only.
NOT_CARRIED = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.alignment",
    "split.",
    "gguf_native.",
    ORIGINAL_SHAPE,
)
VALUE_NAMES = {number: name for name, (number, _) in VALUE_TYPES.items()}


def open_gguf_source(path: Path) -> Source:
    """A GGUF file, or all parts of a split one. Warns if its values were quantised already. Raises GGUFError."""
    file = open_gguf(path)
    quantised = sorted({info.type for info in file.tensors.values() if is_packed(info.type)})
    if quantised:
        log.warning(
            "GGUF Native: %s is quantised already (%s): its loss and that of the new type add up. "
            "Convert the original model instead where you can.",
            file.name,
            ", ".join(quantised),
        )
    tensors = {name: source_tensor(file, info) for name, info in file.tensors.items()}
    paths = tuple(dict.fromkeys((file.path, *(info.path for info in file.tensors.values()))))
    carries = {key: kind for key, kind in value_types(file.path).items() if not key.startswith(NOT_CARRIED)}
    return Source("GGUF", paths, tensors, file.metadata, carries)


def value_types(path: Path) -> dict[str, str]:
    """Key -> the writer's name of its type. The reader gives values alone, and one may fit several types."""
    cursor = Cursor(map_file(path), path.name)
    cursor.take(len(MAGIC) + VERSION.size, "the header")
    _, n_pairs = cursor.unpack(COUNTS, "the header")
    found = {}
    for _ in range(n_pairs):
        key = cursor.name(MAX_KEY_BYTES, KeyNameError, "a key")
        (number,) = VALUE_TYPE.unpack_from(cursor.buffer, cursor.offset)
        value = read_value(cursor, key)
        found[key] = f"[{VALUE_NAMES[value.element_type]}]" if isinstance(value, ArrayValue) else VALUE_NAMES[number]
    return found


def source_tensor(file: GGUFFile, info: TensorInfo) -> SourceTensor:
    row = FORMATS[info.type]
    dtype = torch.float32 if is_packed(info.type) else row.storage_dtype
    return SourceTensor(dtype, logical_shape(file, info), partial(load, info), row.block_size)


def load(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Some values of one tensor, whole blocks."""
    row = FORMATS[info.type]
    first, last = (n // row.block_size * row.block_bytes for n in (start, stop))
    packed = read_bytes(info.path, info.offset + first, last - first)
    return dequantize(packed, info.type) if is_packed(info.type) else packed.view(row.storage_dtype)
