"""A forward that runs out of GPU memory runs again without other models and without what saves it time."""

import logging
import math
from functools import cache

import comfy.model_management as mm
import torch
from comfy.model_prefetch import cleanup_prefetch_queues, cleanup_prefetched_modules
from comfy.patcher_extension import WrappersMP
from torch.utils._pytree import tree_map

from ..ops.graph import tensors_of
from . import residency
from .file_streaming import streamer_of
from .graphs import graphs_of, is_options, options_of, other_wrappers
from .packed_layers import cache_of

log = logging.getLogger("gguf_native")


def retry_forwards(patcher) -> None:
    """Have a patcher's diffusion model, and those of its clones, try again."""
    if patcher.load_device.type == "cuda":
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, residency.ATTACHMENT, Retrying())


class Retrying:
    """The host's wrapper around a forward."""

    def __init__(self) -> None:
        # Of the inputs of the smallest forward that had no room for the ring: larger ones do not try it.
        self.n_values = math.inf

    def __call__(self, executor, *args, **kwargs):
        # What other nodes do around a forward, such as counting steps, is not to be done twice.
        if torch.compiler.is_compiling() or other_wrappers(options_of(args, kwargs) or {}):
            return executor(*args, **kwargs)
        model, n_values = executor.class_obj, sum(tensor.numel() for tensor in tensors_of(args))
        if n_values >= self.n_values:
            give_up_ring(model)
        stages = iter((give_up_decoded, give_up_others, give_up_recordings, give_up_ring))
        while True:
            try:
                return executor(*map(untouched, args), **{key: untouched(value) for key, value in kwargs.items()})
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                stage = next((stage for stage in stages if stage(model)), None)
                if stage is None:
                    raise
                if stage is give_up_ring:
                    self.n_values = min(n_values, self.n_values)
            # Outside `except`, which holds what the forward held.
            cleanup_prefetch_queues()
            cleanup_prefetched_modules(model.modules())
            mm.soft_empty_cache()
            log_retry()


def is_out_of_memory(error: Exception) -> bool:
    """The host's own question knows CUDA's and torch's errors, not those of DynamicVRAM's buffers and pages."""
    return mm.is_oom(error) or str(error).startswith(("VRAM grow failed", "Fault failed"))


def untouched(value: object):
    """The same in lists and dicts of its own: a forward takes what a ControlNet gives out of them."""
    return value if is_options(value) else tree_map(lambda leaf: leaf, value)


def give_up_decoded(diffusion_model: torch.nn.Module) -> bool:
    """Decoded weights, until sampling ends, and with them the recordings that read them."""
    decoded, graphs = cache_of(diffusion_model), graphs_of(diffusion_model)
    # What begins again counts as the next forward, at which they are chosen.
    if decoded is None or not decoded.keep_no_more():
        return False
    if graphs is not None:
        graphs.reset()
    return True


def give_up_others(diffusion_model: torch.nn.Module) -> bool:
    """Models of this pack that are not at work: DynamicVRAM takes their weights, but not their LoRAs."""
    return residency.unload_idle(diffusion_model, "a forward ran out of memory")


def give_up_recordings(diffusion_model: torch.nn.Module) -> bool:
    """For good."""
    graphs = graphs_of(diffusion_model)
    return graphs is not None and graphs.give_up()


def give_up_ring(diffusion_model: torch.nn.Module) -> bool:
    """The memory for weights sent ahead, until sampling ends."""
    streamer = streamer_of(diffusion_model)
    return streamer is not None and streamer.give_up()


@cache
def log_retry() -> None:
    log.info(
        "GGUF Native: the GPU's memory was too little for a forward. It runs again without what it can do without "
        "(decoded weights, other models, CUDA graphs and, if need be, weights sent ahead), which is slower. A smaller "
        "picture or batch needs less."
    )
