"""Builds GGUF files byte by byte, valid and broken, with nothing but struct."""

from collections.abc import Iterable, Mapping
from struct import pack

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8


def string(text: str | bytes) -> bytes:
    """u64 length and the bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return pack("<Q", len(raw)) + raw


def pair(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    """One key-value pair."""
    return string(key) + pack("<I", value_type & 0xFFFFFFFF) + payload


def array(element_type: int, count: int, payload: bytes = b"") -> bytes:
    """The payload of an ARRAY value."""
    return pack("<IQ", element_type & 0xFFFFFFFF, count) + payload


def strings(items: Iterable[str | bytes]) -> bytes:
    """The payload of an ARRAY of STRING."""
    raw = [string(item) for item in items]
    return array(STRING, len(raw), b"".join(raw))


def info(name: str | bytes, dims: tuple[int, ...], type_number: int = F32, offset: int = 0) -> bytes:
    """One tensor info; `dims` as in the file, innermost first; numbers wrap to their field like in C."""
    wrapped = [dim % 2**64 for dim in dims]
    head = string(name) + pack(f"<I{len(dims)}Q", len(dims), *wrapped)
    return head + pack("<IQ", type_number & 0xFFFFFFFF, offset % 2**64)


def header(
    pairs: list[bytes], infos: list[bytes], version: int = 3, n_pairs: int | None = None, n_infos: int | None = None
) -> bytes:
    """Everything before the tensor data, unpadded; the counts can lie."""
    n_infos = len(infos) if n_infos is None else n_infos % 2**64
    n_pairs = len(pairs) if n_pairs is None else n_pairs % 2**64
    return b"GGUF" + pack("<IQQ", version, n_infos, n_pairs) + b"".join(pairs) + b"".join(infos)


def padded(raw: bytes, alignment: int = 32) -> bytes:
    """`raw` filled with zeros up to a multiple of `alignment`."""
    return raw + bytes(-len(raw) % alignment)


def file(
    pairs: Iterable[bytes] = (), infos: Iterable[bytes] = (), data: bytes = b"", alignment: int = 32, **lies: int
) -> bytes:
    """A whole file from its pieces."""
    return padded(header(list(pairs), list(infos), **lies), alignment) + data


def model(
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]],
    pairs: Iterable[bytes] = (),
    alignment: int = 32,
    version: int = 3,
) -> bytes:
    """A valid file of `name -> (dims innermost first, type number, bytes)`."""
    infos, data = [], b""
    for name, (dims, type_number, raw) in tensors.items():
        infos.append(info(name, dims, type_number, len(data)))
        data += padded(raw, alignment)
    return file(pairs, infos, data, alignment, version=version)
