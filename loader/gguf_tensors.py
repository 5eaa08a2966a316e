"""The tensor infos of a GGUF file: name, dimensions, type and place of every tensor, all checked."""

from math import prod
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from ..ops.formats import FORMAT_BY_NUMBER, BlockFormat
from .errors import (
    DimensionCountError,
    DuplicateTensorError,
    MisalignedOffsetError,
    OverlapError,
    RowSizeError,
    TensorNameError,
    TensorOffsetError,
    TensorShapeError,
    TruncatedFileError,
    UnknownTensorTypeError,
    UnsupportedTensorTypeError,
)
from .gguf_cursor import Cursor

MAX_NAME_BYTES = 65_535
MAX_DIMS = 5
# 4 TiB: a number that leads beyond it is damage, one that leads only beyond the file's end is a cut download
MAX_FILE_BYTES = 2**42

N_DIMS = Struct("<I")
# by n_dims: the dimensions (innermost first), the type, the offset from the start of the data
REST_OF_INFO = [Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1)]

UNSUPPORTED_TYPES = {
    4: "Q4_2, removed from ggml",
    5: "Q4_3, removed from ggml",
    9: "Q8_1, which never appears in files",
    15: "Q8_K, which never appears in files",
    31: "Q4_0_4_4, removed from ggml",
    32: "Q4_0_4_8, removed from ggml",
    33: "Q4_0_8_8, removed from ggml",
    36: "IQ4_NL_4_4, removed from ggml",
    37: "IQ4_NL_4_8, removed from ggml",
    38: "IQ4_NL_8_8, removed from ggml",
    41: "Q1_0, which this pack does not decode yet",
    42: "Q2_0, which this pack does not decode yet",
}


class TensorInfo(NamedTuple):
    """One tensor of a file.

    `type` is a key of FORMATS, `shape` is in torch order (outermost first), `offset` counts bytes from the start of
    the file `path` (a part of a split file has its own path), `nbytes` is the packed size.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


def read_tensor_infos(cursor: Cursor, count: int, alignment: int, path: Path) -> dict[str, TensorInfo]:
    """The next `count` tensor infos, which end the header, with absolute offsets."""
    infos: dict[str, TensorInfo] = {}
    for number in range(count):
        name = cursor.name(MAX_NAME_BYTES, TensorNameError, f"the name of tensor {number + 1} of {count}")
        if name in infos:
            raise DuplicateTensorError(
                f"{cursor.file}: tensor {name!r:.100} appears twice; each name may appear once. "
                "The file is damaged or was made by a faulty converter."
            )
        infos[name] = read_tensor_info(cursor, name, alignment, path)
    data_start = -(-cursor.offset // alignment) * alignment
    infos = {name: info._replace(offset=data_start + info.offset) for name, info in infos.items()}
    check_places(cursor, infos)
    return infos


def read_tensor_info(cursor: Cursor, name: str, alignment: int, path: Path) -> TensorInfo:
    """What follows a tensor's name; the offset still counts from the start of the data."""
    where = f"{cursor.file}: tensor {name!r:.100}"
    what = f"the info of tensor {name!r:.100}"
    (n_dims,) = cursor.unpack(N_DIMS, what)
    if n_dims > MAX_DIMS:
        raise DimensionCountError(
            f"{where} has {n_dims:,} dimensions; at most {MAX_DIMS} are read. The file is damaged: download it again."
        )
    *dims, type_number, offset = cursor.unpack(REST_OF_INFO[n_dims], what)
    tensor_type = tensor_format(where, type_number)
    nbytes = packed_size(where, dims, tensor_type)
    check_offset(where, offset, alignment)
    return TensorInfo(name, tensor_type.__name__, tuple(reversed(dims)), offset, nbytes, path)


def tensor_format(where: str, number: int) -> type[BlockFormat]:
    """The format with this ggml type number."""
    if number in UNSUPPORTED_TYPES:
        raise UnsupportedTensorTypeError(
            f"{where} has type {number} ({UNSUPPORTED_TYPES[number]}). Use a file quantised to another type."
        )
    if number not in FORMAT_BY_NUMBER:
        raise UnknownTensorTypeError(
            f"{where} has type {number}, which this pack does not know. "
            "The file is damaged, or newer than this pack: update the pack."
        )
    return FORMAT_BY_NUMBER[number]


def packed_size(where: str, dims: list[int], tensor_type: type[BlockFormat]) -> int:
    """The bytes that a tensor of these dimensions (innermost first) takes; no dimensions are one value."""
    if 0 in dims:
        raise TensorShapeError(f"{where} has dimensions {dims}; each must be at least 1. The file is damaged.")
    row, block = dims[0] if dims else 1, tensor_type.block_size
    if row % block:
        raise RowSizeError(
            f"{where} has rows of {row:,} values; {tensor_type.__name__} needs a multiple of {block}. "
            "The file is damaged or was made by a faulty converter."
        )
    nbytes = prod(dims) // block * tensor_type.block_bytes
    if nbytes >= MAX_FILE_BYTES:
        raise TensorShapeError(
            f"{where} has dimensions {dims} and would take {nbytes:,} bytes; no file is larger than "
            f"{MAX_FILE_BYTES:,}. The file is damaged: download it again."
        )
    return nbytes


def check_offset(where: str, offset: int, alignment: int) -> None:
    """The offset is believable and a multiple of the alignment."""
    if offset >= MAX_FILE_BYTES:
        raise TensorOffsetError(
            f"{where} has offset {offset:,}; no file is larger than {MAX_FILE_BYTES:,} bytes. "
            "The file is damaged: download it again."
        )
    if offset % alignment:
        raise MisalignedOffsetError(
            f"{where} has offset {offset:,}; the file's alignment asks for a multiple of {alignment}. "
            "The file is damaged or was made by a faulty converter."
        )


def check_places(cursor: Cursor, infos: dict[str, TensorInfo]) -> None:
    """Every tensor lies inside the file and no two share bytes; gaps and any order are fine."""
    size, end, before = len(cursor.buffer), 0, ""
    for info in sorted(infos.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise OverlapError(
                f"{cursor.file}: tensor {info.name!r:.100} starts at byte {info.offset:,}, inside tensor "
                f"{before!r:.100}, which ends at {end:,}. The file is damaged: download it again."
            )
        end, before = info.offset + info.nbytes, info.name
    if end > size:
        raise TruncatedFileError(
            f"{cursor.file}: {end - size:,} bytes are missing: tensor {before!r:.100} ends at byte {end:,}, the file "
            f"has {size:,}. The download is incomplete: download the file again.",
            end - size,
        )
