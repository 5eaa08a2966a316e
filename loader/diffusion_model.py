"""From a GGUF file to a ComfyUI diffusion model; which model it is, the host tells from the tensors."""

from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ..config import settings
from ..ops.layers import GGUFOps, PackedWeight, WeightShapeError
from .errors import IncompleteModelError, UnknownModelError, WrongShapeError
from .model_patcher import adopt
from .residency import DIFFUSION
from .state_dict import read_state_dict


def load_diffusion_model(
    path: str,
    decode_dtype: torch.dtype | None = None,
    patch_dtype: torch.dtype | None = None,
    patch_on_device: bool = False,
    compute: str | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Load a diffusion model, its weights still packed, with the host's own patcher for the memory mode in force.

    decode_dtype: what decoded weights are rounded to first, None for the compute dtype. patch_dtype: of the LoRA
    arithmetic, None for the compute dtype. patch_on_device, compute: see `model_patcher.adopt`; None is the setting's
    compute. Raises GGUFError kinds.
    """
    sd, metadata = read_state_dict(path, settings().streaming_loading)
    architecture, names = metadata.get("general.architecture"), list(sd)
    # LTX keeps the sizes that its tensors do not show in this key.
    config = {"config": metadata["config"]} if isinstance(metadata.get("config"), str) else None
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(
            sd, {"custom_operations": GGUFOps}, metadata=config, disable_dynamic=disable_dynamic
        )
    except WeightShapeError as error:
        raise WrongShapeError(f"{Path(path).name}: {error}") from error
    if patcher is None:
        raise UnknownModelError(_what_was_tried(path, names, architecture))
    refuse_incomplete(path, patcher.model)
    for layer in patcher.model.modules():
        if isinstance(layer, PackedWeight):
            layer.decode_dtype = decode_dtype
    patcher.cached_patcher_init = (load_diffusion_model, (path, decode_dtype, patch_dtype, patch_on_device, compute))
    return adopt(patcher, DIFFUSION, patch_dtype, patch_on_device, compute or settings().compute)


def refuse_incomplete(path: str, model: torch.nn.Module) -> None:
    """Raise IncompleteModelError if a layer lacks a parameter: the host only warns, and paints noise."""
    missing = [
        f"{name}.{parameter}"
        for name, layer in model.named_modules()
        if isinstance(layer, PackedWeight)
        for parameter in layer.missing
    ]
    if missing:
        raise IncompleteModelError(
            f"{Path(path).name}: lacks {len(missing)} tensors that a {model.__class__.__name__} model needs: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download or convert it again."
        )


def _what_was_tried(path: str, names: list[str], architecture: object) -> str:
    return (
        f"{Path(path).name}: holds no diffusion model that this ComfyUI knows. Its first tensors are "
        f"{', '.join(names[:8])}; its architecture tag is {architecture!r:.60}. Tried: every model that ComfyUI "
        "detects from tensor names, with and without a `model.diffusion_model.` prefix, and diffusers' names. "
        "A text encoder belongs into a CLIP loader, a VAE into the VAE loader; for a new kind of model, update ComfyUI."
    )
