"""A type for each matrix, so that a model fits into a given size with the least error: `--target-size`, `--bits`."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from ..ops.dequantize import dequantize
from ..ops.quantize import quantize
from .allocation import Option, allocate
from .errors import TargetError
from .plan import PlannedTensor, plan_tensors
from .recipes import uniform
from .refusals import check_finite
from .source import Run, Source, SourceTensor, read_ahead, runs
from .writer import aligned

# What a matrix may become. The I-quants decode more slowly and encode far more slowly for what they save.
CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Errors are measured on rows spread evenly over a matrix, so many values in all: enough for three digits.
VALUES_MEASURED = 1 << 18
# Values read at once.
VALUES_PER_RUN = 1 << 22


class Size(NamedTuple):
    """A whole file of at most so many bytes."""

    bytes: int

    def n_bytes(self, n_values: int) -> int:
        return self.bytes


class Bits(NamedTuple):
    """A whole file of at most so many bits for each value of the model."""

    per_value: float

    def n_bytes(self, n_values: int) -> int:
        return int(n_values * self.per_value / 8)


class Fitted(NamedTuple):
    """The output's tensors, and the sum of the errors of all matrices that had a choice."""

    planned: list[PlannedTensor]
    error: float


def plan_for_size(
    model: Source,
    architecture: str,
    n_bytes: int,
    importance: Mapping[str, torch.Tensor],
    device: str | torch.device,
    advance: Callable[[int], None],
) -> Fitted:
    """Types with the least sum of errors for which the tensors take at most `n_bytes` together.

    The error of a matrix is that of its products, relative and squared. `advance` is told the bytes of each tensor
    that has been measured. Raises TargetError if even the smallest types do not fit, and NotFiniteError.
    """
    options = options_of(model.tensors, architecture)
    choices: dict[str, list[Option]] = {}
    measured = {name: planned for name, planned in options.items() if len(planned) > 1}
    contents = read_ahead(run for planned in measured.values() for run in runs_of(planned))
    try:
        for name, planned in options.items():
            if name in measured:
                samples = sample(planned, contents, model.name)
                choices[name] = [
                    Option(
                        tensor.type,
                        aligned(tensor.nbytes),
                        product_error(samples[tensor.columns], tensor, importance.get(name), device),
                    )
                    for tensor in planned
                ]
            advance(planned[0].source.n_values * planned[0].source.dtype.itemsize)
    finally:
        contents.close()
    fixed = sum(aligned(planned[0].nbytes) for planned in options.values() if len(planned) == 1)
    chosen = allocate(choices, n_bytes - fixed)
    check_budget(fixed + sum(choice.nbytes for choice in chosen.values()), n_bytes)
    planned = [
        next(tensor for tensor in options[name] if name not in chosen or tensor.type == chosen[name].type)
        for name in options
    ]
    return Fitted(planned, sum(choice.error for choice in chosen.values()))


def options_of(tensors: Mapping[str, SourceTensor], architecture: str) -> dict[str, list[PlannedTensor]]:
    """Name -> what each tensor may become, one entry for each type; only one for those that the architecture keeps."""
    options: dict[str, dict[str, PlannedTensor]] = {}
    for candidate in CANDIDATES:
        for planned in plan_tensors(tensors, architecture, uniform(0, candidate)):
            options.setdefault(planned.name, {}).setdefault(planned.type, planned)
    return {name: list(by_type.values()) for name, by_type in options.items()}


def runs_of(planned: list[PlannedTensor]) -> Iterator[Run]:
    """A tensor in runs of whole rows of each type that it may become."""
    return runs(planned[0].source, math.lcm(*(tensor.columns for tensor in planned)), VALUES_PER_RUN)


def sample(planned: list[PlannedTensor], contents: Iterator[torch.Tensor], file: str) -> dict[int, torch.Tensor]:
    """Columns -> every so-many-th row of a tensor that has so many columns, from its runs. Raises NotFiniteError."""
    taken: dict[int, list[torch.Tensor]] = {tensor.columns: [] for tensor in planned}
    for run in runs_of(planned):
        values = next(contents)
        check_finite(values, run.start, planned[0], file)
        for columns, rows in taken.items():
            step = -(-run.tensor.n_values // VALUES_MEASURED)
            # The first row of a run that is a multiple of `step` from the first of the tensor.
            rows.append(values.view(-1, columns)[-(run.start // columns) % step :: step].float())
    return {columns: torch.cat(rows) for columns, rows in taken.items()}


def product_error(
    rows: torch.Tensor, planned: PlannedTensor, importance: torch.Tensor | None, device: str | torch.device
) -> float:
    """E |(W - Wq) x|^2 / E |W x|^2 for inputs x of mean square `importance` [columns] (None: equal), independent.

    rows: float32, some of W. Then the expectation over x is the squared error of each column times its importance: no
    batch has to be drawn.
    """
    rows = rows.to(device)
    importance = planned.weights_of_columns(importance)
    if importance is not None and not importance.any():
        importance = None
    blocks = quantize(rows, planned.type, importance)
    difference = dequantize(blocks, planned.type) - rows
    weights = 1.0 if importance is None else importance.to(device)
    return float((difference.square() * weights).sum() / (rows.square() * weights).sum().clamp(min=1e-30))


def check_budget(smallest: int, n_bytes: int) -> None:
    if smallest > n_bytes:
        raise TargetError(
            f"A size of {n_bytes / 1e9:.3f} GB is too small: with every matrix as {CANDIDATES[0]} the model takes "
            f"{smallest / 1e9:.3f} GB."
        )
