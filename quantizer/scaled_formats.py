"""Weights in ComfyUI's own quantised formats, decoded with their scales: fp8, MXFP8, NVFP4, int8 and ConvRot W4A4."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch

from .errors import SourceError
from .source import SourceTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A tensor for each layer that says its format, as JSON in bytes; the metadata may do so for all layers instead.
CONFIGURATION = ".comfy_quant"
METADATA = "_quantization_metadata"
# What stands beside a weight and means nothing without it. `scale_*` are the names of ComfyUI's older scaled fp8.
BESIDE = (
    CONFIGURATION,
    ".weight_scale",
    ".weight_scale_2",
    ".scale_weight",
    ".input_scale",
    ".scale_input",
    ".pre_quant_scale",
)
MARK_OF_FILE = "scaled_fp8"
# What stands beside weights in the formats of bitsandbytes, DeepSeek, GPTQ, compressed-tensors and quanto.
FOREIGN = re.compile(
    r".+\.((nested_)?(absmax|quant_map)|quant_state\..+|SCB|weight_scale_inv|weight_zero_point|weight_packed|qweight"
    r"|weight\._data)"
)

Layer = Mapping[str, SourceTensor]


def decode_scaled_formats(
    tensors: Mapping[str, SourceTensor], metadata: Mapping[str, object], file: str
) -> dict[str, SourceTensor]:
    """The same tensors with every quantised weight decoded, in the original order, without scales and marks.

    Scaled weights become float32, fp8 without a scale bfloat16, which holds it exactly. Raises SourceError.
    """
    if foreign := next(filter(FOREIGN.fullmatch, tensors), None):
        raise SourceError(
            f"{file}: tensor '{foreign}' belongs to a weight in a quantised format that is not known here. "
            "Convert the original model instead."
        )
    configurations = configurations_of(tensors, metadata, file)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(BESIDE) and name.rpartition(".")[2] != MARK_OF_FILE
    }
    for name, weight in kept.items():
        layer = name.removesuffix(".weight")
        beside = {suffix: tensors[layer + suffix] for suffix in BESIDE if layer + suffix in tensors}
        configuration, where = configurations.get(layer, {}), f"{file}: tensor '{name}'"
        if "format" not in configuration and not weight.dtype.is_floating_point:
            check_no_scale(layer, tensors, f"{where} ({weight.dtype})")
        kept[name] = decoded(weight, beside, configuration, where)
    return kept


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


def check_no_scale(layer: str, tensors: Mapping[str, SourceTensor], where: str) -> None:
    """Raise SourceError for integers that mean something only with a scale, of which nothing says how."""
    if scale := next((name for name in tensors if name.startswith(f"{layer}.") and "scale" in name), None):
        raise SourceError(
            f"{where} has '{scale}' beside it, but nothing says in which format it is ({CONFIGURATION[1:]} or "
            f"{METADATA}). Convert the original model instead."
        )


def decoded(weight: SourceTensor, beside: Layer, configuration: Mapping[str, object], where: str) -> SourceTensor:
    """One weight as dense values; one that is dense already stays."""
    kind = configuration.get("format")
    if kind is None and weight.dtype in FP8:
        kind = "float8_e4m3fn" if {".weight_scale", ".scale_weight"} & beside.keys() else "unscaled"
    if kind is None:
        return weight
    if kind not in DECODERS:
        raise SourceError(f"{where} has the format '{kind}'; known are {', '.join(DECODERS)}. Update this pack.")
    if DECODERS[kind] is scaled_float8:
        check_scale(weight, beside, f"{where} has the format '{kind}'")
    dtype = torch.bfloat16 if kind == "unscaled" else torch.float32
    values_per_item = 2 if kind in PAIRS else 1
    shape = (*weight.shape[:-1], *(n * values_per_item for n in weight.shape[-1:]))
    return SourceTensor(dtype, shape, partial(decode, kind, weight, beside, configuration, where))


def check_scale(weight: SourceTensor, beside: Layer, where: str) -> None:
    """Raise SourceError unless there is one scale for the tensor, or one for each of its rows or matrices."""
    scale = beside.get(".scale_weight", beside.get(".weight_scale"))
    if scale is None:
        raise SourceError(f"{where} but no '.weight_scale'; the file is incomplete.")
    if scale.n_values != 1 and not scale.shape[:1] == weight.shape[:1] == (scale.n_values,):
        raise SourceError(
            f"{where} and scales of shape {list(scale.shape)}; read are one, or one for each of the "
            f"rows or matrices in {list(weight.shape)}. Convert the original model instead."
        )


def decode(
    kind: str, weight: SourceTensor, beside: Layer, configuration: Mapping[str, object], where: str
) -> torch.Tensor:
    """Values of one weight."""
    scales = {suffix: tensor.read() for suffix, tensor in beside.items() if suffix != CONFIGURATION}
    try:
        values = DECODERS[kind](weight.read(), scales, {**configuration, **configuration.get("params", {})})
    except KeyError as error:
        raise SourceError(
            f"{where} has the format '{kind}' but no '{error.args[0]}'; the file is incomplete."
        ) from None
    except ModuleNotFoundError:
        raise SourceError(
            f"{where} has the format '{kind}', which comfy-kitchen decodes: run with ComfyUI's Python, "
            "or pip install comfy-kitchen."
        ) from None
    # The input of such a layer is multiplied by it first: here the columns are instead.
    return values * scales[".pre_quant_scale"].float() if ".pre_quant_scale" in scales else values


def unscaled(weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]) -> torch.Tensor:
    return weight.to(torch.bfloat16)


def scaled_float8(
    weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]
) -> torch.Tensor:
    """One scale for the tensor, or one for each of its rows or matrices."""
    scale = scales.get(".scale_weight", scales.get(".weight_scale")).float()
    if scale.numel() > 1:
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight.float().mul_(scale)


def kitchen_layout(
    name: str, weight: torch.Tensor, shape: tuple[int, ...], scale: torch.Tensor, **parameters: object
) -> torch.Tensor:
    """float32 values of a weight in a layout of comfy-kitchen, by its own plain torch code."""
    from comfy_kitchen.tensor import get_layout_class

    layout = get_layout_class(name)
    return layout.dequantize(
        weight, layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=shape, **parameters)
    )


def mxfp8(weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]) -> torch.Tensor:
    scale = scales[".weight_scale"].view(torch.float8_e8m0fnu)
    return kitchen_layout("TensorCoreMXFP8Layout", weight, tuple(weight.shape), scale)


def nvfp4(weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]) -> torch.Tensor:
    shape = (weight.shape[0], weight.shape[1] * 2)
    blocks = scales[".weight_scale"].view(torch.float8_e4m3fn)
    return kitchen_layout("TensorCoreNVFP4Layout", weight, shape, scales[".weight_scale_2"].float(), block_scale=blocks)


def int8(weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]) -> torch.Tensor:
    rotation = {"convrot": True, "convrot_groupsize": int(options.get("convrot_groupsize", 256))}
    parameters = rotation if options.get("convrot") else {}
    return kitchen_layout("TensorWiseINT8Layout", weight, tuple(weight.shape), scales[".weight_scale"], **parameters)


def convrot_w4a4(
    weight: torch.Tensor, scales: Mapping[str, torch.Tensor], options: Mapping[str, object]
) -> torch.Tensor:
    shape = (weight.shape[0], weight.shape[1] * 2)
    group = int(options.get("convrot_groupsize", 256))
    return kitchen_layout(
        "TensorCoreConvRotW4A4Layout",
        weight,
        shape,
        scales[".weight_scale"],
        convrot_groupsize=group,
        quant_group_size=64,
    )


Decoder = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Mapping[str, object]], torch.Tensor]
DECODERS: dict[str, Decoder] = {
    "unscaled": unscaled,
    "float8_e4m3fn": scaled_float8,
    "float8_e5m2": scaled_float8,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
    "int8_tensorwise": int8,
    "convrot_w4a4": convrot_w4a4,
}
# Two values in each byte.
PAIRS = ("nvfp4", "convrot_w4a4")
