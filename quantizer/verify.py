"""`verify`: whether a GGUF file is sound, and with the original beside it, how far each tensor is off."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..loader import GGUFError, GGUFFile
from ..loader.architectures import architecture_of
from ..loader.errors import (
    BigEndianError,
    FileUnreadableError,
    NotFirstShardError,
    NotGGUFError,
    UnsupportedTensorTypeError,
    UnsupportedVersionError,
)
from .checks import ALL_ZERO, Fault, examine, forget
from .compare import Comparison, Difference, allowed_error, compare
from .inspect_file import open_model
from .parts import take_part
from .printing import complain, say, say_json, table
from .source import Source, SourceTensor
from .sources import open_source

HELP = "structure, values that cannot be, tensors of zeros; with the original at hand the error of each tensor"

FINE, PROBLEM = 0, 1
# A file that these name is no GGUF file, or one that is not to be read here; all others name damage.
NOT_ITS_FAULT = (
    BigEndianError,
    FileUnreadableError,
    NotFirstShardError,
    NotGGUFError,
    UnsupportedTensorTypeError,
    UnsupportedVersionError,
)
WORST = 10
SHOWN_NAMES = 10


class Report(NamedTuple):
    """What was found in a file of so many tensors; `comparison` is None where there was no original."""

    file: str
    tensors: int
    faults: list[Fault]
    comparison: Comparison | None

    @property
    def is_fine(self) -> bool:
        return not self.faults and (self.comparison is None or self.comparison.is_fine)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or the first part of a split one")
    parser.add_argument("--against", metavar="ORIGINAL", type=Path, help="the model that it was made from")
    parser.add_argument("--part", help="of a full checkpoint as ORIGINAL: unet, clip, vae, or one encoder by its name")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """FINE or PROBLEM. Raises GGUFError for a file that is not to be read, QuantizerError for such an original."""
    try:
        with open_model(arguments.file, "verify") as file:
            source = original_of(file, arguments.against, arguments.part) if arguments.against else None
            report = verify(file, source and source.tensors)
    except NOT_ITS_FAULT:
        raise
    except GGUFError as error:
        complain(error)
        return PROBLEM
    if arguments.json:
        say_json(as_data(report))
    else:
        say(*lines(report))
    return FINE if report.is_fine else PROBLEM


def verify(file: GGUFFile, originals: Mapping[str, SourceTensor] | None = None) -> Report:
    """Decode every tensor, one slice at a time; `originals` are the tensors to compare with, by name."""
    faults = []
    for info in file.tensors.values():
        faults += examine(file, info)
        forget(file, info)
    comparison = compare(file, originals) if originals is not None else None
    if comparison is not None:
        # Zeros that the original has too are its own.
        equal = {one.tensor for one in comparison.differences if one.error == 0}
        faults = [fault for fault in faults if fault.check != ALL_ZERO or fault.tensor not in equal]
    return Report(file.name, len(file.tensors), faults, comparison)


def original_of(file: GGUFFile, path: Path, part: str | None) -> Source:
    """The part of a model that the file was made from, by default what the file's own tensors are."""
    known = architecture_of(file.tensors)
    return take_part(open_source(path), part or (known[0].part if known else None))


def as_data(report: Report) -> dict[str, object]:
    """The report as JSON has it, the errors of all tensors included."""
    data = report._asdict() | {"fine": report.is_fine, "faults": [fault._asdict() for fault in report.faults]}
    if report.comparison is not None:
        differences = [one._asdict() | {"too_much": one.is_too_much} for one in report.comparison.differences]
        data["comparison"] = report.comparison._asdict() | {"differences": differences}
    return data


def lines(report: Report) -> Iterable[str]:
    """The report as the terminal shows it."""
    yield f"{report.file}: {report.tensors:,} tensors, header and places in order"
    yield from (f"{fault.tensor}: {fault.text}" for fault in report.faults)
    if report.comparison is not None:
        yield from lines_of_comparison(report.comparison)
    yield "fine" if report.is_fine else "PROBLEMS FOUND: convert the model again, or download the file again"


def lines_of_comparison(comparison: Comparison) -> Iterable[str]:
    for what, names in (
        ("missing, only in the original", comparison.missing),
        ("extra, not in the original", comparison.extra),
        ("of another shape", comparison.shapes),
    ):
        if names:
            more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
            yield f"{len(names):,} {what}: {', '.join(names[:SHOWN_NAMES])}{more}"
    yield f"{len(comparison.differences):,} tensors compared; the worst:"
    head = ("tensor", "type", "error", "allowed", "")
    yield from table([head, *map(row, worst(comparison.differences))])


def worst(differences: list[Difference]) -> list[Difference]:
    """The WORST ones, those that are not finite first."""
    return sorted(differences, key=lambda one: (one.error is not None, -(one.error or 0)))[:WORST]


def row(one: Difference) -> tuple[str, ...]:
    error = "not finite" if one.error is None else f"{one.error:.4%}"
    return one.tensor, one.type, error, f"{allowed_error(one.type):.1%}", "too much" if one.is_too_much else ""
