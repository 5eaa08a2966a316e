"""Watches the inputs of a running model's matrices: their mean squares are the importance of the columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .errors import ImportanceError
from .importance import read_sums, write_importance


class Seen:
    """By matrix, as a file of the model calls it: sums of squared inputs, float32 [columns], and how many were summed.

    The sums stay on the device of the inputs until they are written.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count inputs x [..., columns] of a matrix; waits for nothing."""
        rows = x.detach().reshape(-1, x.shape[-1])
        # A norm sums in float32 without a copy of the inputs in it.
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.counts[name] = self.counts.get(name, 0) + len(rows)


@contextmanager
def watching(model: torch.nn.Module, seen: Seen) -> Iterator[None]:
    """Meanwhile every call of a linear layer of `model` is counted in `seen`. A compiled model shows nothing."""

    def count(name: str, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.add(name, inputs[0])

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(partial(count, f"{name}.weight")) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_file(path: Path, model: torch.nn.Module) -> None:
    """Raise ImportanceError if there is an importance file of another model, before the model takes its time."""
    sums, _ = read_sums(path) if path.exists() else ({}, {})
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and f"{name}.weight" in sums:
            check_columns(path, f"{name}.weight", len(sums[f"{name}.weight"]), layer.in_features)


def check_columns(path: Path, name: str, known: int, columns: int) -> None:
    if known != columns:
        raise ImportanceError(
            f"{path.name}: has {known} columns for '{name}', this model {columns}. It is of another model: give "
            "another name, or remove the file."
        )


def add_to_file(path: Path, seen: Seen, about: str) -> int:
    """Add what was seen to an importance file, or make it. Returns how many matrices the file knows now.

    Raises ImportanceError if nothing was seen, an input was not finite, or the file is of another model.
    """
    if not seen.sums:
        raise ImportanceError(f"{path.name}: no linear layer ran; a model under torch.compile cannot be watched.")
    sums, counts = read_sums(path) if path.exists() else ({}, {})
    for name, values in seen.sums.items():
        values = values.cpu()
        if not values.isfinite().all():
            raise ImportanceError(f"{path.name}: inputs of '{name}' were NaN or infinite; nothing was written.")
        if name in sums:
            check_columns(path, name, len(sums[name]), len(values))
        sums[name] = sums[name] + values if name in sums else values
        counts[name] = counts.get(name, 0) + seen.counts[name]
    write_importance(path, sums, counts, about)
    return len(sums)
