"""ComfyUI's own quantised formats, a table: what stands beside a weight, and how some of its rows are decoded.

A row is what lies along a tensor's last dimension; a tensor of one dimension has rows of one value.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import NamedTuple

import torch

from .errors import SourceError
from .source import SourceTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Before 2.7 torch has no float8_e8m0fnu.
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
# The name here of fp8 with `scale_weight`, which ComfyUI wrote before its formats had names.
OLD_FLOAT8 = "scaled_fp8"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Scales of blocks are stored in tiles of so many rows and columns, as cuBLAS wants them.
TILE = (128, 4)
GROUP = "convrot_groupsize"
DEFAULT_GROUP = 256

Shape = tuple[int, ...]


class ScaledWeight(NamedTuple):
    """One weight as it is stored, what stands beside it, and what its file says of it. `where` begins an error."""

    weight: SourceTensor
    scales: Mapping[str, SourceTensor]
    options: Mapping[str, object]
    where: str

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Some rows of the weight, as they are stored."""
        columns = columns_of(self.weight.shape)
        return self.weight.values(first * columns, last * columns).view(-1, columns)


class Scale(NamedTuple):
    """What a scale must be: `fits(shape, of_weight)`, that of the decoded weight, and `shape` in words."""

    dtypes: tuple[torch.dtype, ...]
    fits: Callable[[Shape, Shape], bool]
    shape: str


class ScaledFormat(NamedTuple):
    """One format: what a weight and its scales are, and `decode(weight, first, last)`, float32 [rows, columns].

    `check(weight, shape)` raises SourceError for a decoded shape or options that cannot be. A weight has
    `values_per_item` in each number of its rows; `unit` rows are decoded together.
    """

    dtypes: tuple[torch.dtype, ...]
    scales: Mapping[str, Scale]
    check: Callable[[ScaledWeight, Shape], None]
    decode: Callable[[ScaledWeight, int, int], torch.Tensor]
    values_per_item: int = 1
    unit: int = 1


def columns_of(shape: Shape) -> int:
    return shape[-1] if len(shape) > 1 else 1


def is_one(scale: Shape, weight: Shape) -> bool:
    return prod(scale) == 1


def is_one_or_leading(scale: Shape, weight: Shape) -> bool:
    """Whether there is one scale, or one for each row, matrix, ... of the weight."""
    leading = scale
    while leading[-1:] == (1,):
        leading = leading[:-1]
    return is_one(scale, weight) or leading == weight[: max(1, len(weight) - 1)][: len(leading)]


def is_by_row(scale: Shape, weight: Shape) -> bool:
    return scale == weight[:1]


def is_by_column(scale: Shape, weight: Shape) -> bool:
    return len(weight) > 1 and scale[-1:] == weight[-1:] == (prod(scale),)


def are_tiles(block_size: int, scale: Shape, weight: Shape) -> bool:
    """Whether they are scales of blocks of a matrix, in whole tiles."""
    rows, columns = weight[0], weight[-1] // block_size
    return scale == tuple(-(-n // tile) * tile for n, tile in zip((rows, columns), TILE, strict=True))


def scale_of_rows(weight: ScaledWeight, suffix: str, first: int, last: int) -> torch.Tensor:
    """float32 [rows, 1], the scale of each of some rows."""
    scale, shape = weight.scales[suffix], weight.weight.shape
    rows_per_scale = prod(shape) // columns_of(shape) // scale.n_values
    start, stop = first // rows_per_scale, -(-last // rows_per_scale)
    scales = scale.values(start, stop).float()
    return scales[torch.arange(first, last) // rows_per_scale - start, None]


def scaled_float8(weight: ScaledWeight, first: int, last: int, dtype: torch.dtype, suffix: str) -> torch.Tensor:
    """One scale for the tensor, or one for each of its rows or matrices.

    A weight of more bits is cast to the format before it is scaled, as ComfyUI does: `weight.to(..., storage_t)` in
    `_load_quantized_module`, comfy/ops.py.
    """
    stored = weight.rows(first, last)
    if stored.dtype not in FP8:
        stored = stored.to(dtype)
    return stored.float().mul_(scale_of_rows(weight, suffix, first, last))


def int8(weight: ScaledWeight, first: int, last: int) -> torch.Tensor:
    scale = scale_of_rows(weight, ".weight_scale", first, last)
    if not weight.options.get("convrot"):
        return weight.rows(first, last).float().mul_(scale)
    return kitchen_layout(
        "TensorWiseINT8Layout", weight, weight.rows(first, last), scale, convrot=True, **{GROUP: group_of(weight)}
    )


def convrot_w4a4(weight: ScaledWeight, first: int, last: int) -> torch.Tensor:
    scale = scale_of_rows(weight, ".weight_scale", first, last).flatten()
    options = {GROUP: group_of(weight), "quant_group_size": 64}
    return kitchen_layout("TensorCoreConvRotW4A4Layout", weight, weight.rows(first, last), scale, **options)


def mxfp8(weight: ScaledWeight, first: int, last: int) -> torch.Tensor:
    scale = tiles_of_rows(weight, first, last).view(E8M0)
    return kitchen_layout("TensorCoreMXFP8Layout", weight, weight.rows(first, last), scale)


def nvfp4(weight: ScaledWeight, first: int, last: int) -> torch.Tensor:
    blocks = tiles_of_rows(weight, first, last).view(torch.float8_e4m3fn)
    scale = weight.scales[".weight_scale_2"].read().float().reshape(())
    return kitchen_layout("TensorCoreNVFP4Layout", weight, weight.rows(first, last), scale, block_scale=blocks)


def tiles_of_rows(weight: ScaledWeight, first: int, last: int) -> torch.Tensor:
    """The tiles of some rows' scales: `first` begins a tile, and a row of tiles lies in one piece."""
    scale = weight.scales[".weight_scale"]
    columns, end = scale.shape[-1], -(-last // TILE[0]) * TILE[0]
    return scale.values(first * columns, end * columns).view(-1, columns)


def kitchen_layout(
    name: str, weight: ScaledWeight, rows: torch.Tensor, scale: torch.Tensor, **parameters: object
) -> torch.Tensor:
    """float32 values of some rows in a layout of comfy-kitchen, by its own plain torch code."""
    try:
        from comfy_kitchen.tensor import get_layout_class
    except ModuleNotFoundError:
        raise SourceError(
            f"{weight.where}, which comfy-kitchen decodes: run with ComfyUI's Python, or pip install comfy-kitchen."
        ) from None
    layout = get_layout_class(name)
    # Plain decoding does not ask for the shape.
    shape = tuple(rows.shape)
    return layout.dequantize(rows, layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape, **parameters))


def group_of(weight: ScaledWeight) -> int:
    """How many columns were rotated together."""
    return weight.options.get(GROUP, DEFAULT_GROUP)


def check_nothing(weight: ScaledWeight, shape: Shape) -> None:
    pass


def check_blocks(block_size: int, weight: ScaledWeight, shape: Shape) -> None:
    """Raise SourceError unless it is a matrix whose rows are whole blocks."""
    if len(shape) != 2 or shape[-1] % block_size:
        raise SourceError(
            f"{weight.where}, of which matrices are read with rows of whole {block_size} values; got {list(shape)}. "
            "Convert the original model instead."
        )


def check_rotation(weight: ScaledWeight, shape: Shape) -> None:
    """Raise SourceError unless it is a matrix whose rows are whole groups, of a power of 4."""
    group = group_of(weight)
    # Powers of 4 have one bit, the first, third, ...
    if type(group) is not int or group < 4 or group.bit_count() != 1 or group.bit_length() % 2 == 0:
        raise SourceError(
            f"{weight.where}, whose '{GROUP}' must be a power of 4 from 4 on; got {group!r:.50}. "
            "Convert the original model instead."
        )
    check_blocks(group, weight, shape)


def check_int8(weight: ScaledWeight, shape: Shape) -> None:
    if weight.options.get("convrot"):
        check_rotation(weight, shape)


FLOAT_SCALE = Scale(FLOATS, is_one_or_leading, "one, or one for each row or matrix")
PRE_QUANT_SCALE = Scale(FLOATS, is_by_column, "one for each column")


def float8(dtype: torch.dtype, suffix: str) -> ScaledFormat:
    decode = partial(scaled_float8, dtype=dtype, suffix=suffix)
    return ScaledFormat((*FP8, *FLOATS), {suffix: FLOAT_SCALE}, check_nothing, decode)


def tiles(block_size: int, dtype: torch.dtype) -> Scale:
    return Scale(
        (dtype, torch.uint8),
        partial(are_tiles, block_size),
        f"one for each {block_size} columns, in whole tiles of {TILE[0]} rows and {TILE[1]} scales",
    )


FORMATS: dict[str, ScaledFormat] = {
    "float8_e4m3fn": float8(torch.float8_e4m3fn, ".weight_scale"),
    "float8_e5m2": float8(torch.float8_e5m2, ".weight_scale"),
    OLD_FLOAT8: float8(torch.float8_e4m3fn, ".scale_weight"),
    "mxfp8": ScaledFormat(
        (torch.float8_e4m3fn,),
        {".weight_scale": tiles(32, E8M0)},
        partial(check_blocks, 32),
        mxfp8,
        unit=TILE[0],
    ),
    "nvfp4": ScaledFormat(
        (torch.uint8,),
        {
            ".weight_scale": tiles(16, torch.float8_e4m3fn),
            ".weight_scale_2": Scale(FLOATS, is_one, "one"),
        },
        partial(check_blocks, 16),
        nvfp4,
        values_per_item=2,
        unit=TILE[0],
    ),
    "int8_tensorwise": ScaledFormat((torch.int8,), {".weight_scale": FLOAT_SCALE}, check_int8, int8),
    "convrot_w4a4": ScaledFormat(
        (torch.int8,),
        {".weight_scale": Scale(FLOATS, is_by_row, "one for each row")},
        check_rotation,
        convrot_w4a4,
        values_per_item=2,
    ),
}
