"""`inspect`: what a GGUF file holds - metadata, tensors by type, and where its bytes are."""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..loader import GGUFFile, open_gguf
from ..loader.architectures import PREFIXES, architecture_of
from ..loader.errors import NotGGUFError
from ..loader.gguf_tensors import TensorInfo
from .printing import bar, say, say_json, size, table

HELP = "metadata, tensors by type and bytes, architecture and a size bar for each group of tensors"

SHOWN_ITEMS = 4
SHOWN_SIGNS = 100
# A group with less of the file's bytes goes to the others.
SMALL_GROUP = 0.01
OTHERS = "others"
BLOCK_NUMBER = re.compile(r"\.\d+\.")


class Part(NamedTuple):
    """Tensors that have something in common: how many, how many values they hold, in how many bytes."""

    name: str
    tensors: int
    values: int
    nbytes: int


class Contents(NamedTuple):
    """What a file holds: `types` and `groups` are its tensors by type and by name, each largest first.

    `declared` is what `general.architecture` says, `found` and `part` what the tensors' names say; None: nothing known.
    """

    file: str
    files: int
    declared: str | None
    found: str | None
    part: str | None
    metadata: dict[str, object]
    whole: Part
    types: list[Part]
    groups: list[Part]

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self.whole)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or the first part of a split one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Always 0. Raises GGUFError for a file that cannot be read."""
    with open_model(arguments.file, "inspect") as file:
        contents = inspect_file(file)
    if arguments.json:
        say_json(as_data(contents))
    else:
        say(*lines(contents))
    return 0


def open_model(path: str, command: str) -> GGUFFile:
    """The open GGUF file; of a safetensors file the error says how to make one."""
    try:
        return open_gguf(path)
    except NotGGUFError as error:
        if Path(path).suffix != ".safetensors":
            raise
        raise NotGGUFError(
            f"{Path(path).name}: `{command}` reads GGUF files, and this is named a safetensors file. Convert it first, "
            f"with `quantize {Path(path).name} {Path(path).stem}-Q4_K_M.gguf --type Q4_K_M` in place of `{command}`."
        ) from error


def inspect_file(file: GGUFFile) -> Contents:
    """Read the header's tables; no tensor is read. Raises GGUFError for metadata that is no text."""
    tensors = list(file.tensors.values())
    declared = file.metadata.get("general.architecture")
    row, _ = architecture_of(file.tensors) or (None, "")
    return Contents(
        file.name,
        len({info.path for info in tensors} or {file.path}),
        declared if isinstance(declared, str) else None,
        row and row.name,
        row and row.part,
        {key: shortened(value) for key, value in file.metadata.items()},
        part("all", tensors),
        parts(tensors, lambda info: info.type),
        merge_small(parts(tensors, lambda info: group_of(info.name))),
    )


def part(name: str, tensors: Iterable[TensorInfo]) -> Part:
    tensors = list(tensors)
    values = sum(math.prod(info.shape) for info in tensors)
    return Part(name, len(tensors), values, sum(info.nbytes for info in tensors))


def parts(tensors: Iterable[TensorInfo], name_of: Callable[[TensorInfo], str]) -> list[Part]:
    """The tensors by `name_of`, largest first."""
    by_name: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        by_name.setdefault(name_of(info), []).append(info)
    return sorted((part(name, infos) for name, infos in by_name.items()), key=lambda one: -one.nbytes)


def group_of(name: str) -> str:
    """What stands before the number of a block, `double_blocks` of `double_blocks.3.img_attn.qkv.weight`."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    blocks, *numbered = BLOCK_NUMBER.split(name, maxsplit=1)
    return blocks if numbered else OTHERS


def merge_small(groups: list[Part]) -> list[Part]:
    """The groups; those of less than SMALL_GROUP of the bytes become one at the end."""
    least = SMALL_GROUP * sum(group.nbytes for group in groups)
    kept = [group for group in groups if group.name != OTHERS and group.nbytes >= least]
    merged = [group for group in groups if group not in kept]
    sums = (sum(group[column] for group in merged) for column in range(1, len(Part._fields)))
    return [*kept, Part(OTHERS, *sums)] if merged else kept


def bits_per_weight(tensors: Part) -> float:
    """Of the tensor data alone, without header and padding."""
    return tensors.nbytes * 8 / tensors.values if tensors.values else 0.0


def shortened(value: object) -> object:
    """A metadata value as JSON takes it: of a long array its length and first items, of a long string its start."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN_SIGNS else f"{value[:SHOWN_SIGNS]}... ({len(value):,} characters)"
    if isinstance(value, list):
        first = [shortened(item) for item in value[:SHOWN_ITEMS]]
        return first if len(value) <= SHOWN_ITEMS else {"items": len(value), "first": first}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_data(contents: Contents) -> dict[str, object]:
    """The contents as JSON has them, with bits per weight."""
    data = contents._asdict() | {"bits_per_weight": round(contents.bits_per_weight, 3)}
    data["whole"] = contents.whole._asdict()
    return data | {key: [one._asdict() for one in data[key]] for key in ("types", "groups")}


def lines(contents: Contents) -> Iterable[str]:
    """The contents as the terminal shows them."""
    whole = contents.whole
    of_parts = f" in {contents.files} parts" if contents.files > 1 else ""
    yield f"{contents.file}: {size(whole.nbytes)} of tensors{of_parts}"
    by_tensors = f"{contents.found} ({contents.part})" if contents.found else "unknown"
    yield f"architecture: {by_tensors} by its tensors, {contents.declared or 'nothing'} by general.architecture"
    yield f"{whole.values:,} parameters in {whole.tensors:,} tensors, {contents.bits_per_weight:.3f} bits per weight"
    yield from ("", "metadata")
    yield from (f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in contents.metadata.items())
    yield from ("", *table([("type", "tensors", "parameters", "size", "bits"), *map(row, contents.types)]))
    yield from ("", *with_bars(contents))


def row(tensors: Part) -> tuple[str, ...]:
    bits = f"{bits_per_weight(tensors):.3f}"
    return tensors.name, f"{tensors.tensors:,}", f"{tensors.values:,}", size(tensors.nbytes), bits


def with_bars(contents: Contents) -> Iterable[str]:
    """The table of groups, a bar behind each."""
    head, *rows = table([("group", "tensors", "parameters", "size", "bits"), *map(row, contents.groups)])
    yield head
    for line, group in zip(rows, contents.groups, strict=True):
        yield f"{line}  {bar(group.nbytes / max(contents.whole.nbytes, 1))}"
