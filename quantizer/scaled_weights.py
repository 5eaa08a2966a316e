"""Weights in ComfyUI's own quantised formats, found by what stands beside them, and decoded run by run."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from .errors import SourceError
from .scaled_formats import (
    FORMATS,
    FP8,
    OLD_FLOAT8,
    PRE_QUANT_SCALE,
    Scale,
    ScaledFormat,
    ScaledWeight,
    Shape,
    columns_of,
)
from .source import SourceTensor

# A tensor for each layer that says its format, as JSON in bytes; the metadata may do so for all layers instead.
CONFIGURATION = ".comfy_quant"
METADATA = "_quantization_metadata"
# Scales of a weight, which it means nothing without. `scale_*` are the names of ComfyUI's older scaled fp8.
BEFORE = ".pre_quant_scale"
SCALES = (".weight_scale", ".weight_scale_2", ".scale_weight", BEFORE)
# Scales that ComfyUI quantises a layer's input by and never applies to its weight: `input_scale` in the forward of
# `mixed_precision_ops`, comfy/ops.py, to which `convert_old_quants`, comfy/utils.py, renames `scale_input`.
OF_INPUTS = (".input_scale", ".scale_input")
MARK_OF_FILE = "scaled_fp8"
# What stands beside weights in the formats of bitsandbytes, DeepSeek, GPTQ, compressed-tensors and quanto.
FOREIGN = re.compile(
    r".+\.((nested_)?(absmax|quant_map)|quant_state\..+|SCB|weight_scale_inv|weight_zero_point|weight_packed|qweight"
    r"|weight\._data)"
)


def decode_scaled_weights(
    tensors: Mapping[str, SourceTensor], metadata: Mapping[str, object], file: str
) -> dict[str, SourceTensor]:
    """The same tensors with every quantised weight decoded, in the original order, without scales and marks.

    Scaled weights become float32, fp8 without a scale bfloat16, which holds it exactly. Raises SourceError, also for a
    scale that no weight uses.
    """
    if foreign := next(filter(FOREIGN.fullmatch, tensors), None):
        raise SourceError(
            f"{file}: tensor '{foreign}' belongs to a weight in a quantised format that is not known here. "
            "Convert the original model instead."
        )
    configurations = configurations_of(tensors, metadata, file)
    marked = marked_parts(tensors, metadata)
    found, used = {}, set()
    for name, weight in tensors.items():
        if name.endswith((CONFIGURATION, *SCALES, *OF_INPUTS)) or name.rpartition(".")[2] == MARK_OF_FILE:
            continue
        layer = name.removesuffix(".weight")
        scales = {suffix: tensors[layer + suffix] for suffix in SCALES if layer + suffix in tensors}
        configuration, where = configurations.get(layer, {}), f"{file}: tensor '{name}'"
        kind = configuration.get("format") or unsaid_format(weight, scales, name.startswith(marked))
        if kind is not None:
            options = {**configuration, **configuration.get("params", {})}
            scaled = ScaledWeight(weight, scales, options, f"{where} has the format '{kind}'")
            found[name] = decoded(scaled, known_format(kind, where))
            used |= {layer + suffix for suffix in (*FORMATS[kind].scales, BEFORE)}
        elif weight.dtype in FP8:
            found[name] = SourceTensor(torch.bfloat16, weight.shape, partial(widened, weight))
        else:
            if not weight.dtype.is_floating_point:
                check_no_scale(layer, tensors, f"{where} ({weight.dtype})")
            found[name] = weight
    check_all_used((name for name in tensors if name.endswith(SCALES) and name not in used), tensors, file)
    return found


def configurations_of(
    tensors: Mapping[str, SourceTensor], metadata: Mapping[str, object], file: str
) -> dict[str, dict[str, object]]:
    """Layer -> what the file says of its format. Raises SourceError if that cannot be read."""
    found, where = {}, METADATA
    try:
        if METADATA in metadata:
            found |= json.loads(metadata[METADATA])["layers"]
        for where, tensor in tensors.items():
            if where.endswith(CONFIGURATION):
                found[where.removesuffix(CONFIGURATION)] = json.loads(bytes(tensor.read().tolist()))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SourceError(f"{file}: '{where}' is not the JSON that ComfyUI writes. Download the file again.") from None
    for layer, configuration in found.items():
        if not is_configuration(configuration):
            raise SourceError(
                f"{file}: layer '{layer}' is described by {configuration!r:.100}; ComfyUI writes an object with "
                "'format'. Download the file again."
            )
    return found


def is_configuration(content: object) -> bool:
    """Whether the decoders can use it."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("format"), str)
        and isinstance(content.get("params", {}), dict)
    )


def marked_parts(tensors: Iterable[str], metadata: Mapping[str, object]) -> tuple[str, ...]:
    """What the names of those parts of a model begin with in which `scale_weight` makes any weight scaled fp8.

    So does `convert_old_quants`, comfy/utils.py, where a part holds a mark and the metadata say nothing.
    """
    if METADATA in metadata:
        return ()
    return tuple(name.removesuffix(MARK_OF_FILE) for name in tensors if name.rpartition(".")[2] == MARK_OF_FILE)


def unsaid_format(weight: SourceTensor, scales: Iterable[str], is_marked: bool) -> str | None:
    """The format of a weight of which the file says none."""
    if ".scale_weight" in scales and (weight.dtype in FP8 or is_marked):
        return OLD_FLOAT8
    return "float8_e4m3fn" if ".weight_scale" in scales and weight.dtype in FP8 else None


def known_format(kind: str, where: str) -> ScaledFormat:
    if kind not in FORMATS:
        raise SourceError(f"{where} has the format '{kind}'; known are {', '.join(FORMATS)}. Update this pack.")
    return FORMATS[kind]


def check_no_scale(layer: str, tensors: Mapping[str, SourceTensor], where: str) -> None:
    """Raise SourceError for integers that mean something only with a scale, of which nothing says how."""
    if scale := next((name for name in tensors if name.startswith(f"{layer}.") and "scale" in name), None):
        raise SourceError(
            f"{where} has '{scale}' beside it, but nothing says in which format it is ({CONFIGURATION[1:]} or "
            f"{METADATA}). Convert the original model instead."
        )


def check_all_used(unused: Iterable[str], tensors: Mapping[str, SourceTensor], file: str) -> None:
    """Raise SourceError for a scale that no weight uses: without it the values would be other ones."""
    for name in unused:
        layer = name.rpartition(".")[0]
        weight = tensors.get(f"{layer}.weight", tensors.get(layer))
        found = f"beside it is {weight.dtype}" if weight is not None else "it belongs to is not there"
        raise SourceError(
            f"{file}: '{name}' is a scale, but the weight {found} and nothing says a format with such a scale "
            f"({CONFIGURATION[1:]} or {METADATA}). Convert the original model instead."
        )


def decoded(weight: ScaledWeight, row: ScaledFormat) -> SourceTensor:
    """One weight as dense values. Raises SourceError unless it and its scales are what the format has."""
    stored = weight.weight.shape
    shape = (*stored[:-1], *(n * row.values_per_item for n in stored[-1:]))
    check_dtype(weight, row.dtypes)
    row.check(weight, shape)
    for suffix, scale in row.scales.items():
        check_scale(weight, suffix, scale, shape)
    if BEFORE in weight.scales:
        check_scale(weight, BEFORE, PRE_QUANT_SCALE, shape)
    columns = columns_of(shape)
    return SourceTensor(torch.float32, shape, partial(load, weight, row, columns), row.unit * columns)


def check_dtype(weight: ScaledWeight, dtypes: tuple[torch.dtype, ...]) -> None:
    if weight.weight.dtype not in dtypes:
        raise SourceError(
            f"{weight.where}, which is stored as {listed(dtypes)}; got {weight.weight.dtype}. "
            "Convert the original model instead."
        )


def check_scale(weight: ScaledWeight, suffix: str, expected: Scale, shape: Shape) -> None:
    """Raise SourceError unless a scale is there, of a dtype and shape that fit a weight of this shape."""
    scale = weight.scales.get(suffix)
    if scale is None:
        raise SourceError(f"{weight.where} but no '{suffix}'; the file is incomplete.")
    if scale.dtype not in expected.dtypes or not expected.fits(scale.shape, shape):
        raise SourceError(
            f"{weight.where} and shape {list(shape)}: '{suffix}' must be {expected.shape}, as "
            f"{listed(expected.dtypes)}; got scales of shape {list(scale.shape)} as {scale.dtype}. "
            "Convert the original model instead."
        )


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def load(weight: ScaledWeight, row: ScaledFormat, columns: int, start: int, stop: int) -> torch.Tensor:
    """Some values of a scaled weight, whole rows."""
    values = row.decode(weight, start // columns, stop // columns)
    # The input of such a layer is multiplied by it first: here the columns are instead.
    return values * weight.scales[BEFORE].read().float().reshape(-1) if BEFORE in weight.scales else values


def widened(weight: SourceTensor, start: int, stop: int) -> torch.Tensor:
    """Some values of fp8 without a scale, which bfloat16 holds exactly."""
    return weight.values(start, stop).to(torch.bfloat16)
