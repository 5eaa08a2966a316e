"""From LoRA files to patches of a model and its text encoder, through the host's own conversion of key styles."""

from pathlib import Path

import comfy.sd
from comfy.model_patcher import ModelPatcher

from .lora_files import read_lora


class LoraMismatchError(ValueError):
    """No key of a LoRA file fits the model it is applied to."""


def apply_lora(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, path: str, strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, comfy.sd.CLIP | None]:
    """Clones of model and clip with the LoRA added; the originals stay as they are. What gets strength 0 is no clone.

    Raises LoraMismatchError if not one key of the file names a weight of the model or the text encoder.
    """
    lora, metadata = read_lora(path)
    keys = list(lora)
    new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, lora, strength_model, strength_clip, metadata)
    patched = _n_patches(new_model) > _n_patches(model)
    if clip is not None:
        patched = patched or _n_patches(new_clip.patcher) > _n_patches(clip.patcher)
    if not patched:
        raise LoraMismatchError(
            f"{Path(path).name}: none of its {len(keys)} keys names a weight of this {model.model.__class__.__name__} "
            f"model{'' if clip is None else ' or its text encoder'}. Its first keys are {', '.join(keys[:5])}. "
            "It was made for another model; choose one for this model."
        )
    return new_model if strength_model else model, new_clip if strength_clip else clip


def _n_patches(patcher: ModelPatcher) -> int:
    return sum(len(patches) for patches in patcher.patches.values())
