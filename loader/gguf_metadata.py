"""The key-value pairs of a GGUF file: scalars are read at once, arrays only when asked for."""

import mmap
from collections.abc import Iterator, Mapping
from struct import Struct
from typing import NamedTuple

from .errors import (
    AlignmentError,
    ArrayLengthError,
    BoolValueError,
    ClosedFileError,
    DuplicateKeyError,
    KeyNameError,
    NestedArrayError,
    StringEncodingError,
    StringLengthError,
    UnknownValueTypeError,
)
from .gguf_cursor import LENGTH, Cursor, decode_utf8

BOOL, STRING, ARRAY = 7, 8, 9
# gguf_metadata_value_type -> struct code
NUMBER_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
NUMBER_LAYOUTS = {number: Struct("<" + code) for number, code in NUMBER_CODES.items()}
VALUE_TYPE = Struct("<I")
ARRAY_HEAD = Struct("<IQ")

MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 2**27
MAX_ARRAY_BYTES = 2**32
MAX_STRINGS = 2**22
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 65_536


class ArrayValue(NamedTuple):
    """Where an array lies in the file and what it holds."""

    element_type: int
    count: int
    offset: int


def read_pairs(cursor: Cursor, count: int) -> dict[str, object]:
    """The next `count` key-value pairs; an array stays an `ArrayValue`."""
    pairs: dict[str, object] = {}
    for number in range(count):
        key = cursor.name(MAX_KEY_BYTES, KeyNameError, f"key {number + 1} of {count}")
        if key in pairs:
            raise DuplicateKeyError(
                f"{cursor.file}: key {key!r:.100} appears twice; each key may appear once. "
                "The file is damaged or was made by a faulty converter."
            )
        pairs[key] = read_value(cursor, key)
    return pairs


def read_value(cursor: Cursor, key: str) -> object:
    """The value that follows `key`: its type number, then its bytes."""
    what = f"the value of key {key!r:.100}"
    (value_type,) = cursor.unpack(VALUE_TYPE, what)
    check_alignment_type(cursor.file, key, value_type)
    if value_type == STRING:
        raw = cursor.raw_string(MAX_STRING_BYTES, StringLengthError, what)
        return decode_utf8(raw, StringEncodingError, f"{cursor.file}: {what}")
    if value_type == ARRAY:
        return read_array_place(cursor, what)
    (value,) = cursor.unpack(number_layout(cursor.file, value_type, what), what)
    return checked_bools(cursor.file, (value,), what)[0] if value_type == BOOL else value


def read_array_place(cursor: Cursor, what: str) -> ArrayValue:
    """Skip an array and say where it lies; its items are checked to lie inside the file."""
    element_type, count = cursor.unpack(ARRAY_HEAD, what)
    if element_type == ARRAY:
        raise NestedArrayError(
            f"{cursor.file}: {what} is an array of arrays; only arrays of numbers, bools and strings are read. "
            "Write it as separate keys."
        )
    layout = LENGTH if element_type == STRING else number_layout(cursor.file, element_type, what)
    max_count = MAX_STRINGS if element_type == STRING else MAX_ARRAY_BYTES // layout.size
    if count > max_count:
        raise ArrayLengthError(
            f"{cursor.file}: {what} claims {count:,} items; at most {max_count:,} are allowed. "
            "The file is damaged: download it again."
        )
    start = cursor.take(count * layout.size, what)
    if element_type == STRING:
        cursor.offset = start
        skip_strings(cursor, count, what)
    return ArrayValue(element_type, count, start)


def skip_strings(cursor: Cursor, count: int, what: str) -> None:
    """Step over `count` strings; only their lengths are looked at."""
    buffer, offset = cursor.buffer, cursor.offset
    length_at, length_bytes = LENGTH.unpack_from, LENGTH.size
    last = len(buffer) - length_bytes
    for _ in range(count):
        if offset > last:
            offset += length_bytes
            break
        offset += length_bytes + length_at(buffer, offset)[0]
    if offset - len(buffer) > MAX_STRING_BYTES:
        raise StringLengthError(
            f"{cursor.file}: {what} has a string that claims to end at byte {offset:,}; the file has "
            f"{len(buffer):,} bytes. The file is damaged: download it again."
        )
    cursor.take(offset - cursor.offset, what)


def number_layout(file: str, value_type: int, what: str) -> Struct:
    """The layout of one number of `value_type`."""
    if value_type not in NUMBER_LAYOUTS:
        raise UnknownValueTypeError(
            f"{file}: {what} has type {value_type}; the specification knows 0 to 12. "
            "The file is damaged, or newer than this pack: update the pack."
        )
    return NUMBER_LAYOUTS[value_type]


def checked_bools(file: str, values: tuple[int, ...], what: str) -> list[bool]:
    """`values` as bools; anything but 0 and 1 is an error."""
    wrong = next((value for value in values if value > 1), None)
    if wrong is not None:
        raise BoolValueError(f"{file}: {what} has the bool {wrong}; only 0 and 1 are valid. The file is damaged.")
    return [value == 1 for value in values]


def check_alignment_type(file: str, key: str, value_type: int) -> None:
    """general.alignment must be a UINT32: any other type is a sign of a faulty writer."""
    if key == "general.alignment" and NUMBER_CODES.get(value_type) != "I":
        raise AlignmentError(
            f"{file}: key 'general.alignment' has value type {value_type}; it must be a UINT32 (type 4). "
            "Convert the model again with a current converter."
        )


def alignment_of(file: str, pairs: Mapping[str, object]) -> int:
    """The file's alignment in bytes: a power of two from 8 (the specification's least) to 65,536."""
    alignment = pairs.get("general.alignment", DEFAULT_ALIGNMENT)
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise AlignmentError(
            f"{file}: key 'general.alignment' is {alignment}; it must be a power of two from {MIN_ALIGNMENT} to "
            f"{MAX_ALIGNMENT}. Convert the model again with a current converter."
        )
    return alignment


def decode_array(file: str, buffer: mmap.mmap, array: ArrayValue, what: str) -> list:
    """The items of an array that `read_array_place` has checked."""
    if array.element_type == STRING:
        return list(strings_at(file, buffer, array, what))
    layout = Struct(f"<{array.count}{NUMBER_CODES[array.element_type]}")
    values = layout.unpack_from(buffer, array.offset)
    return checked_bools(file, values, what) if array.element_type == BOOL else list(values)


def strings_at(file: str, buffer: mmap.mmap, array: ArrayValue, what: str) -> Iterator[str]:
    """The strings of an array, in order."""
    start = array.offset
    for number in range(array.count):
        (n_bytes,) = LENGTH.unpack_from(buffer, start)
        start += LENGTH.size
        yield decode_utf8(buffer[start : start + n_bytes], StringEncodingError, f"{file}: item {number} of {what}")
        start += n_bytes


class Metadata(Mapping[str, object]):
    """Keys to Python values: int, float, bool, str, or a list of one of them.

    An array is decoded, and its strings and bools checked, when it is first asked for; from then on it is kept.

    Raises:
        StringEncodingError, BoolValueError: on asking for an array with such an item.
        ClosedFileError: on asking for an array for the first time after the file was closed.
    """

    def __init__(self, file: str, buffer: mmap.mmap, pairs: dict[str, object]):
        self._file = file
        self._buffer: mmap.mmap | None = buffer
        self._pairs = pairs

    def __getitem__(self, key: str) -> object:
        value = self._pairs[key]
        if isinstance(value, ArrayValue):
            if self._buffer is None:
                raise ClosedFileError(f"{self._file}: key {key!r:.100} was asked for after the file was closed.")
            value = decode_array(self._file, self._buffer, value, f"the value of key {key!r:.100}")
            self._pairs[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._pairs

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def close(self) -> None:
        """Let go of the mapping; what was decoded stays readable."""
        self._buffer = None
