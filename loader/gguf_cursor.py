"""A position in a mapped GGUF header; no step leaves the file."""

import mmap
from struct import Struct

from .errors import GGUFError, TruncatedFileError

LENGTH = Struct("<Q")


class Cursor:
    """Reads little-endian numbers and strings one after the other.

    Args:
        buffer: the mapped file.
        file: the file's name, for messages.
    """

    def __init__(self, buffer: mmap.mmap, file: str):
        self.buffer = buffer
        self.file = file
        self.offset = 0

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` bytes and return the offset where they start.

        Raises:
            TruncatedFileError: the file ends before them.
        """
        start = self.offset
        self.offset = start + n_bytes
        missing = self.offset - len(self.buffer)
        if missing > 0:
            raise TruncatedFileError(
                f"{self.file}: the file ends inside {what}; at least {missing:,} bytes are missing after its "
                f"{len(self.buffer):,}. The download is incomplete: download the file again.",
                missing,
            )
        return start

    def unpack(self, layout: Struct, what: str) -> tuple:
        """The numbers of one fixed layout."""
        return layout.unpack_from(self.buffer, self.take(layout.size, what))

    def raw_string(self, max_bytes: int, too_long: type[GGUFError], what: str) -> bytes:
        """The bytes of a length-prefixed string of at most `max_bytes`, else `too_long` is raised."""
        (n_bytes,) = self.unpack(LENGTH, what)
        if n_bytes > max_bytes:
            raise too_long(
                f"{self.file}: {what} claims {n_bytes:,} bytes; at most {max_bytes:,} are allowed. "
                "The file is damaged: download it again."
            )
        start = self.take(n_bytes, what)
        return self.buffer[start : self.offset]

    def name(self, max_bytes: int, bad_name: type[GGUFError], what: str) -> str:
        """A key or a tensor name: 1 to `max_bytes` bytes of UTF-8, else `bad_name` is raised."""
        raw = self.raw_string(max_bytes, bad_name, what)
        if not raw:
            raise bad_name(f"{self.file}: {what} is empty; a name needs at least one byte. The file is damaged.")
        return decode_utf8(raw, bad_name, f"{self.file}: {what}")


def decode_utf8(raw: bytes, not_utf8: type[GGUFError], where: str) -> str:
    """The text of `raw`, else `not_utf8` is raised."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(
            f"{where} is not UTF-8 at byte {error.start}: {raw[error.start : error.start + 4].hex(' ')}. "
            "The file is damaged or was made by a faulty converter."
        ) from None
