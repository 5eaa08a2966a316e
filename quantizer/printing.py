"""How the commands write to the terminal: lines, tables, bars, sizes and JSON."""

import json
import sys
from collections.abc import Sequence

BAR_WIDTH = 40
SIZE_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def say(*lines: str) -> None:
    """Print lines; what the terminal cannot show or would obey, names of tensors included, is written as an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)
        sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def complain(message: object) -> None:
    """Print an error, to where errors go."""
    sys.stderr.write(f"{message}\n")


def say_json(value: object) -> None:
    """Print one JSON document; ValueError for a number that JSON does not know."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def size(n_bytes: float) -> str:
    """6.81 GB; decimal units, as files and downloads are labelled."""
    unit, factor = next(((unit, factor) for unit, factor in SIZE_UNITS.items() if n_bytes >= factor), ("bytes", 1))
    return f"{n_bytes:.0f} bytes" if factor == 1 else f"{n_bytes / factor:.2f} {unit}"


def bar(fraction: float) -> str:
    """A bar as long as `fraction` of BAR_WIDTH; a sliver shows too."""
    return "#" * max(round(fraction * BAR_WIDTH), fraction > 0)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
