"""From a model file to a GGUF file: some rows after the other, from the source through the device to the disk."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from ..ops.formats import is_packed
from ..ops.quantize import quantize
from .encoders import Encode, encoder
from .fit_size import CANDIDATES, Bits, Size, plan_for_size
from .importance import read_importance
from .metadata import metadata, recipe
from .parts import take_part
from .plan import PlannedTensor, plan_tensors
from .recipes import file_type, number_of
from .refusals import architecture_and_tag, check_finite, check_importance, check_space, check_target
from .source import Run, Source, SourceTensor, read_ahead, runs
from .sources import open_source
from .writer import header, into_shards, shard_names, write_gguf

# Values quantised at once, while as many are read and decoded: all that memory and device hold of a tensor.
VALUES_PER_RUN = {"cpu": 1 << 22}
VALUES_PER_RUN_ELSEWHERE = 1 << 24
# How much longer the account of the types in a header may become when they change.
ROOM_FOR_RECIPE = 512

# Called after each slice with the source's bytes done so far and in all. What it raises ends the conversion.
OnProgress = Callable[[int, int], None]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str | Size | Bits,
    *,
    part: str | None = None,
    importance: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: OnProgress | None = None,
    split_max_bytes: int = 0,
    architecture: str | None = None,
    force: bool = False,
    processes: int = 1,
) -> list[Path]:
    """Write a model as GGUF of a file type and return the files written (several where it is split).

    source: safetensors (also in shards), a torch checkpoint or GGUF. type: a key of FILE_TYPES, or a size for which
    each matrix gets its own type, see `plan_for_size`. part: of a full checkpoint, see `take_part`. importance: a file
    for `read_importance`. architecture: for models that are not known. force: replace a file that is there. processes:
    how many quantise at once on the CPU, with this one; each other takes 0.2 GB. Raises QuantizerError and GGUFError
    kinds; then there is no new file.
    """
    row = file_type(type if isinstance(type, str) else CANDIDATES[0])
    model = take_part(open_source(source), part)
    name, tag = architecture_and_tag(model, architecture)
    inputs = [*model.paths, *([Path(importance)] if importance is not None else [])]
    if not split_max_bytes:
        check_target([Path(target)], inputs, force)
    weights = read_importance(importance) if importance is not None else {}
    planned, number = plan_tensors(model.tensors, name, row), row.number
    check_importance(weights, planned, importance)
    about = {} if importance is None else {"importance": Path(importance).name}
    if isinstance(type, str):
        about["type"] = type
    else:
        about["size"], room = room_for_tensors(type, model, planned, tag, about)
        report = Progress(progress, planned)
        planned, about["error"] = plan_for_size(model, name, room, weights, device, report.advance)
        number = number_of(planned)
    shards = into_shards(planned, split_max_bytes)
    paths = shard_names(Path(target), len(shards))
    check_target(paths, inputs, force)
    check_space(paths[0], planned)
    pairs = metadata(model, planned, tag, number, recipe(planned, about))
    report = Progress(progress, planned)
    contents = read_ahead(run for tensor in planned for run in runs_of(tensor, device))
    try:
        with encoder(processes if torch.device(device).type == "cpu" else 1) as encode:
            options = {"importance": weights, "device": device, "report": report, "file": model.name, "encode": encode}
            write_gguf(paths, pairs, shards, partial(pack_tensor, contents=contents, **options))
    finally:
        contents.close()
    return paths


def room_for_tensors(
    size: Size | Bits, model: Source, planned: list[PlannedTensor], tag: str, about: Mapping[str, object]
) -> tuple[int, int]:
    """(bytes of a whole file, those that are left for its tensors)"""
    n_bytes = size.n_bytes(sum(tensor.source.n_values for tensor in planned))
    pairs = metadata(model, planned, tag, 0, recipe(planned, about))
    return n_bytes, n_bytes - len(header(pairs, planned)) - ROOM_FOR_RECIPE


class Progress:
    """Counts the source's bytes and tells whoever asked."""

    def __init__(self, report: OnProgress | None, planned: list[PlannedTensor]):
        self.report = report
        self.done, self.total = 0, sum(size_of(tensor.source) for tensor in planned)

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.report is not None:
            self.report(self.done, self.total)


def pack_tensor(
    tensor: PlannedTensor,
    contents: Iterator[torch.Tensor],
    importance: Mapping[str, torch.Tensor],
    device: str | torch.device,
    report: Progress,
    file: str,
    encode: Encode,
) -> Iterator[torch.Tensor]:
    """The bytes of one tensor, run by run of its rows. Raises NotFiniteError."""
    weights = tensor.weights_of_columns(importance.get(tensor.name)) if is_packed(tensor.type) else None
    # Another process would have to be sent what is only rounded here.
    encode = encode if is_packed(tensor.type) else quantize
    for run in runs_of(tensor, device):
        rows = next(contents).view(-1, tensor.columns).to(device)
        if rows.is_floating_point():
            rows = rows.float() if rows.dtype == torch.float64 else rows
            check_finite(rows, run.start, tensor, file)
            yield encode(rows, tensor.type, weights).cpu()
        else:
            yield rows.cpu().contiguous().view(torch.uint8)
        report.advance(rows.numel() * tensor.source.dtype.itemsize)


def runs_of(tensor: PlannedTensor, device: str | torch.device) -> Iterator[Run]:
    """A tensor in runs of its rows as it is stored, as large as a device should work on."""
    most = VALUES_PER_RUN.get(torch.device(device).type, VALUES_PER_RUN_ELSEWHERE)
    return runs(tensor.source, tensor.columns, most)


def size_of(source: SourceTensor) -> int:
    """Bytes that a source tensor's values take."""
    return source.n_values * source.dtype.itemsize
