"""Which layers of a model have a packed weight, which of them repeat, which have a slot of DynamicVRAM."""

import comfy.utils
import torch

from ..ops.cache import DecodedCache
from ..ops.layers import GGUFOps, PackedWeight
from ..ops.layout import is_packed


def has_packed_weight(module: torch.nn.Module) -> bool:
    return isinstance(module, PackedWeight) and is_packed(module.weight)


def packed_layer(model: torch.nn.Module, key: str) -> PackedWeight | None:
    """The layer whose packed weight has this key in the model, if there is one."""
    name, _, parameter = key.rpartition(".")
    layer = comfy.utils.get_attr(model, name) if parameter == "weight" else None
    return layer if has_packed_weight(layer) else None


def packed_layers(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """All layers whose weight is packed, by the weight's key in the model."""
    return {f"{name}.weight": module for name, module in model.named_modules() if has_packed_weight(module)}


def cache_of(model: torch.nn.Module) -> DecodedCache | None:
    """The one that the layers of a diffusion model share."""
    for layer in model.modules():
        if isinstance(layer, PackedWeight) and layer.workspace is not None:
            return layer.workspace.cache
    return None


def unpatched_slots(model: torch.nn.Module) -> dict[PackedWeight, object]:
    """Layers whose slot of DynamicVRAM is for a packed weight and bias as the file has them -> the slot's signature."""
    return {
        layer: layer._v_signature
        for layer in packed_layers(model).values()
        if hasattr(layer, "_v") and getattr(layer, "bias_lowvram_function", None) is None
    }


# Chroma's guidance and the token refiners of HunyuanVideo are lists of layers too.
EMBEDDING_NAMES = ("guidance", "embed", "time", "txt_in", "refiner")


def block_layers(model: torch.nn.Module) -> list[GGUFOps.Linear]:
    """The linear layers of the model's repeated blocks: within a ModuleList that is not itself part of an embedding.

    What lies outside is small and sensitive: projections of input and output, embeddings of time, guidance and vectors.
    """
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not any(part in name for part in EMBEDDING_NAMES)
    ]
    layers = {layer: None for blocks in lists for layer in blocks.modules() if isinstance(layer, GGUFOps.Linear)}
    return list(layers)
