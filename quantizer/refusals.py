"""What is refused before or while a model is converted, and why."""

import logging
import os
import shutil
from collections.abc import Collection, Mapping
from math import isfinite
from pathlib import Path

import torch

from ..ops.formats import is_packed
from .errors import ImportanceError, NotFiniteError, RecipeError, TargetError
from .parts import known_architecture
from .plan import PlannedTensor
from .source import Source

log = logging.getLogger("gguf_native")

# The largest number that a type holds; blocks have a scale in float16. All others hold what float32 does.
LARGEST_HALF = 65504
UNLIMITED = ("F32", "MXFP4")


def architecture_and_tag(model: Source, asked: str | None) -> tuple[str, str]:
    """(what SENSITIVITY calls it, general.architecture). Raises RecipeError for a model that cannot be converted."""
    row = known_architecture(model)
    if row is not None and row.fuses:
        raise RecipeError(
            f"{model.name}: has the tensor names of diffusers ({row.name}); ComfyUI joins such matrices while loading, "
            "which it cannot do with quantised ones. Convert the file in the model's original layout."
        )
    if asked is not None and row is not None:
        raise RecipeError(f"{model.name}: is {row.name} by its tensors; leave --architecture out.")
    if asked is not None:
        return asked, asked
    if row is None:
        raise RecipeError(
            f"{model.name}: holds no model that is known here. Its first tensors are "
            f"{', '.join(list(model.tensors)[:6])}. To convert it all the same by general rules, name it: "
            "--architecture NAME."
        )
    return row.name, row.tag


def check_target(paths: list[Path], inputs: Collection[Path], force: bool) -> None:
    """Raise TargetError if the output would replace an input, or any file without `force`."""
    for path in paths:
        if not path.parent.is_dir():
            raise TargetError(f"{path.parent}: there is no such folder.")
        if path.suffix.lower() != ".gguf":
            raise TargetError(f"{path.name}: must end in .gguf, or loaders do not list it.")
        if path.is_dir():
            raise TargetError(f"{path}: is a folder. Give the output another name.")
        if path.exists() and any(path.samefile(input) for input in inputs):
            raise TargetError(f"{path.name}: is an input itself. Give the output another name.")
        if path.exists() and not force:
            raise TargetError(f"{path.name}: exists already. Remove it, or replace it with --force.")


def check_space(target: Path, planned: list[PlannedTensor]) -> None:
    """Raise TargetError if the disk has less space than the output takes."""
    needed, free = sum(tensor.nbytes for tensor in planned), shutil.disk_usage(target.parent).free
    if needed > free:
        raise TargetError(f"{target.name}: takes {needed / 1e9:.1f} GB; {target.parent} has {free / 1e9:.1f} GB free.")


def check_importance(
    weights: Mapping[str, torch.Tensor], planned: list[PlannedTensor], file: str | os.PathLike[str] | None
) -> None:
    """Raise ImportanceError if a file fits no tensor, or one of another size; say how many it leaves out."""
    if not weights:
        return
    matrices = [tensor for tensor in planned if is_packed(tensor.type)]
    known = [tensor for tensor in matrices if tensor.name in weights]
    for tensor in known:
        columns = weights[tensor.name].numel()
        if columns != tensor.source.shape[-1]:
            raise ImportanceError(
                f"{Path(file).name}: has {columns} columns for '{tensor.name}', which has {tensor.source.shape[-1]}. "
                "It belongs to another model."
            )
    if not known:
        raise ImportanceError(f"{Path(file).name}: knows none of the {len(matrices)} matrices: it is of another model.")
    if len(known) < len(matrices):
        log.warning(
            "GGUF Native: %s knows %d of %d matrices; the others are quantised without importance.",
            Path(file).name,
            len(known),
            len(matrices),
        )


def check_finite(values: torch.Tensor, before: int, tensor: PlannedTensor, file: str) -> None:
    """Raise NotFiniteError at the first value that is NaN, infinite or too large for its type; `before` precede."""
    limit = limit_of(tensor.type, values.dtype)
    if all(abs(end.item()) <= limit for end in values.aminmax()):
        return
    place = int((~(values.flatten().float().abs() <= limit)).nonzero()[0])
    index = tuple(int(n) for n in torch.unravel_index(torch.tensor(before + place), tensor.original_shape))
    found = values.flatten()[place].item()
    too_large = f"{tensor.type} holds no more than {limit:.6g}" + (": choose BF16" if tensor.type == "F16" else "")
    reason = too_large if isfinite(found) else "the source is damaged"
    raise NotFiniteError(f"{file}: tensor '{tensor.name}' has {found} at index {list(index)}; {reason}.")


def limit_of(type_name: str, dtype: torch.dtype) -> float:
    """The largest value of a source's dtype that can be stored."""
    largest = torch.finfo(dtype).max
    if type_name in UNLIMITED:
        return largest
    return min(largest, torch.finfo(torch.bfloat16).max if type_name == "BF16" else LARGEST_HALF)
