"""A forward that runs out of GPU memory runs once more without what only saves time."""

import logging
import math
from functools import cache

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP
from torch.utils._pytree import tree_leaves

from .file_streaming import streamer_of
from .graphs import graphs_of
from .packed_layers import cache_of
from .residency import ATTACHMENT

log = logging.getLogger("gguf_native")


def retry_forwards(patcher) -> None:
    """Have a patcher's diffusion model, and those of its clones, try twice."""
    if patcher.load_device.type == "cuda":
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ATTACHMENT, Retrying())


class Retrying:
    """The host's wrapper around a forward."""

    def __init__(self) -> None:
        # Of the inputs of the smallest forward that ran out of memory: larger ones are not tried with everything.
        self.n_values = math.inf

    def __call__(self, executor, *args, **kwargs):
        if torch.compiler.is_compiling():
            return executor(*args, **kwargs)
        n_values = sum(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        if n_values >= self.n_values:
            give_up(executor.class_obj)
        try:
            return executor(*args, **kwargs)
        except Exception as error:
            if not mm.is_oom(error) or not give_up(executor.class_obj):
                raise
            self.n_values = min(n_values, self.n_values)
        # Outside `except`, which holds what the forward held.
        mm.soft_empty_cache()
        log_retry()
        return executor(*args, **kwargs)


def give_up(diffusion_model: torch.nn.Module) -> bool:
    """Until sampling ends: recordings, decoded weights and the ring for weights sent ahead; whether there were any."""
    given_up, graphs = False, graphs_of(diffusion_model)
    decoded, streamer = cache_of(diffusion_model), streamer_of(diffusion_model)
    if graphs is not None and graphs.recordings:
        graphs.reset()
        given_up = True
    if decoded is not None:
        given_up |= decoded.give_up() > 0
    if streamer is not None:
        given_up |= streamer.give_up()
    return given_up


@cache
def log_retry() -> None:
    log.info(
        "GGUF Native: the GPU's memory was too little for a forward. It runs once more without what only saves time "
        "(weights sent ahead, decoded weights, CUDA graphs), which is slower. A smaller picture or batch needs less."
    )
