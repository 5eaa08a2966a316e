"""Which of the pack's models may hold GPU memory: `max_parallel_models`, `sequential_processing`, `memory_mode`."""

import logging

import comfy.model_management as mm

from ..config import settings

log = logging.getLogger("gguf_native")

# Under this key a patcher of ours carries its role and the options of its LoRAs.
ATTACHMENT = "gguf_native"

DIFFUSION, TEXT, VAE = "diffusion model", "text encoder", "VAE"
# A VAE is small beside the others and is needed after every run: it counts nowhere, and nothing leaves for it.
COUNTED = (DIFFUSION, TEXT)


def role_of(patcher) -> str | None:
    """DIFFUSION, TEXT or VAE for a model of this pack, else None."""
    attachment = patcher.get_attachment(ATTACHMENT) if patcher is not None else None
    return attachment and attachment["role"]


def make_room(patcher) -> None:
    """Before the host loads `patcher`: unload what may not stay beside it, least recently used first."""
    role, limits = role_of(patcher), settings()
    if role not in COUNTED:
        return
    others = [loaded for loaded in mm.current_loaded_models if _is_idle(loaded) and not patcher.is_clone(loaded.model)]
    # The host keeps the most recently used model first.
    others = [loaded for loaded in others if role_of(loaded.model) in COUNTED][::-1]
    if limits.sequential_processing or limits.memory_mode == "aggressive":
        _unload([loaded for loaded in others if role_of(loaded.model) != role], f"before the {role} loads")
        others = [loaded for loaded in others if role_of(loaded.model) == role]
    if limits.memory_mode != "conservative":
        surplus = len(others) + 1 - limits.max_parallel_models
        _unload(others[: max(0, surplus)], f"max_parallel_models is {limits.max_parallel_models}")


def idle_beside(patcher) -> list:
    """The loaded models of this pack that are not at work, but for `patcher` and its clones."""
    others = [loaded for loaded in mm.current_loaded_models if _is_idle(loaded) and not patcher.is_clone(loaded.model)]
    return [loaded.model for loaded in others if role_of(loaded.model) is not None]


def unload_idle(diffusion_model, reason: str) -> bool:
    """Unload the counted models that are on a GPU and not at work, but for this one's; whether there were any."""
    idle = [loaded for loaded in mm.current_loaded_models if _is_idle(loaded) and role_of(loaded.model) in COUNTED]
    idle = [loaded for loaded in idle if not mm.is_device_cpu(loaded.device)]
    idle = [loaded for loaded in idle if getattr(loaded.model.model, "diffusion_model", None) is not diffusion_model]
    _unload(idle, reason)
    return bool(idle)


def leave_after_use(patcher) -> None:
    """After sampling: in aggressive mode the diffusion model leaves at once, so that decoding has the memory."""
    if settings().memory_mode == "aggressive" and role_of(patcher) == DIFFUSION:
        mine = [loaded for loaded in mm.current_loaded_models if loaded.model is patcher]
        _unload(mine, "memory_mode is aggressive")


def _is_idle(loaded) -> bool:
    if loaded.model is None or getattr(loaded.model.model, "current_patcher", None) is not None:  # being sampled
        return False
    # The host marks what a running load uses, but never clears the mark of a model on the CPU.
    return not loaded.currently_used or mm.is_device_cpu(loaded.device)


def _unload(models: list, reason: str) -> None:
    for loaded in models:
        log.info("GGUF Native: unloading %s (%s): %s.", _title(loaded.model), role_of(loaded.model), reason)
        loaded.model_unload()
        mm.current_loaded_models.remove(loaded)
    if models:
        mm.soft_empty_cache()


def _title(patcher) -> str:
    return patcher.model.__class__.__name__
