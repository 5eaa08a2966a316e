"""Sizes as they are typed: 5.8GB, 500M, 6 GiB."""

import argparse
import re

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
LETTERS = ("", "K", "M", "G", "T")


def file_size(text: str) -> int:
    """Bytes of `4GB`, `500M` or `1000000`: decimal units, as files and downloads are labelled, unless it says `GiB`."""
    return n_bytes_of(text, 1000, "", "4GB or 500M")


def memory_size(text: str) -> int:
    """Bytes of `6GB`, `6` or `512MB`: memory comes in powers of two, whatever its label says."""
    return n_bytes_of(text, 1024, "G", "6GB or 512MB")


def n_bytes_of(text: str, kilo: int, unit: str, example: str) -> int:
    """Bytes, `kilo` to the next unit; a bare number counts `unit`. Raises ArgumentTypeError."""
    match = SIZE.fullmatch(text.strip())
    exponent = LETTERS.index((match[2] or unit).upper()) if match else 0
    n_bytes = int(float(match[1]) * (1024 if match[3] else kilo) ** exponent) if match else 0
    if not n_bytes:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like {example}")
    return n_bytes
