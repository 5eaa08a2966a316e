"""The shapes that a GGUF file cannot express, and where they are kept."""

import math

from .architectures import LEADING_ONES
from .errors import OriginalShapeError
from .gguf_file import GGUFFile, TensorInfo

# Before the name of a tensor: the key of its shape, an array of positive integers.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def logical_shape(file: GGUFFile, info: TensorInfo) -> tuple[int, ...]:
    """The shape of a tensor in torch order: the stored one, or the one that storing it as rows of blocks has lost.

    Raises OriginalShapeError for one that the metadata gives and that cannot be.
    """
    key = ORIGINAL_SHAPE + info.name
    if key not in file.metadata:
        for suffix, n_dims in LEADING_ONES.items():
            if info.name.endswith(suffix) and len(info.shape) < n_dims:
                return (1,) * (n_dims - len(info.shape)) + info.shape
        return info.shape
    shape = file.metadata[key]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise OriginalShapeError(f"{file.path.name}: '{key}' is {shape!r}; expected an array of positive integers.")
    if math.prod(shape) != math.prod(info.shape):
        raise OriginalShapeError(
            f"{file.path.name}: '{key}' is {shape}, but the tensor is stored as {list(info.shape)}; both must hold as "
            "many values. The converter wrote a wrong shape; convert the model again."
        )
    return tuple(shape)
