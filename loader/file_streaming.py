"""Under DynamicVRAM: weights straight from the pinned file."""

import logging
from functools import cache

import torch
from comfy.patcher_extension import WrappersMP

from ..ops.layers import GGUFOps, PackedWeight
from ..ops.pinned_part import PinnedPart, part_of, parts_of
from ..ops.streaming import Streamer
from .graphs import options_of
from .lora_pages import parts_of_loras
from .packed_layers import unpatched_slots
from .pinning import pin_parts
from .residency import ATTACHMENT

log = logging.getLogger("gguf_native")


def streamer_of(model: torch.nn.Module) -> Streamer | None:
    """The one that the packed layers of a model share."""
    layers = (layer for layer in model.modules() if isinstance(layer, PackedWeight))
    return next((layer.streamer for layer in layers if layer.streamer is not None), None)


def stop_streaming(model: torch.nn.Module) -> None:
    """Give back the GPU memory of what was sent ahead; the next forward begins anew."""
    streamer = streamer_of(model)
    if streamer is not None:
        streamer.reset()


def stream_from_files(model: torch.nn.Module, device: torch.device) -> None:
    """Have the layers that DynamicVRAM pages in take their weights from the pinned file, if there is RAM for that."""
    stop_streaming(model)
    # A patched bias is the host's affair.
    paged = [layer for layer in unpatched_slots(model) if part_of(layer.weight._qdata)]
    streamer, streamers, parts = streamer_of(model), {}, parts_of(layer.weight._qdata for layer in paged)
    for part in streamer.parts if streamer is not None else ():
        if part not in parts:
            # Since the last load a patch has made dense what alone viewed it.
            part.unpin()
    if paged and device.type == "cuda":
        if streamer is None or streamer.device != device:
            streamer = Streamer(device, paged[0].workspace.weights_stream)
        # A table of words, of which one is larger than many a model, is wanted once: what does not fit is the host's.
        sizes = [layer.weight._qdata.nbytes for layer in paged if not isinstance(layer, GGUFOps.Embedding)]
        streamer.prepare(parts, max(sizes, default=0))
        if pin_parts(streamer.parts, device, spare=parts_of_loras):
            streamers = dict.fromkeys(paged, streamer)
    set_streamer(model, streamers)


def send_once(patcher) -> None:
    """Keep the host from sending blocks ahead itself, as it does for some models, where a streamer does."""
    if patcher.load_device.type == "cuda":
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ATTACHMENT, without_prefetch)


def without_prefetch(executor, *args, **kwargs):
    """The host's wrapper around a forward."""
    options = None if torch.compiler.is_compiling() else options_of(args, kwargs)
    if options is not None and options.get("prefetch_dynamic_vbars"):
        streamer = streamer_of(executor.class_obj)
        # The host's copy of the options, made for this forward.
        options["prefetch_dynamic_vbars"] = streamer is None or not streamer.serves()
    return executor(*args, **kwargs)


def set_streamer(model: torch.nn.Module, streamers: dict[torch.nn.Module, Streamer]) -> None:
    """None for all others, those too whose weight a patch has made dense since."""
    for layer in model.modules():
        if isinstance(layer, PackedWeight):
            layer.streamer = streamers.get(layer)


def parts_viewed(model: torch.nn.Module) -> list[PinnedPart]:
    """Those that a model's tensors view, each once."""
    return parts_of(getattr(tensor, "_qdata", tensor) for tensor in model.parameters())


def unpin_parts(model: torch.nn.Module) -> int:
    """Bytes that are pinned no more."""
    parts = parts_viewed(model)
    pinned = [part for part in parts if part.is_pinned()]
    if pinned:
        stop_streaming(model)
        if getattr(model, "current_patcher", None) is not None:
            log_unpinned_while_sampling()
    for part in parts:
        part.unpin()
    # The next load makes another; layers that hold what holds them would stay until the garbage collector comes.
    set_streamer(model, {})
    return sum(part.nbytes for part in pinned)


@cache
def log_unpinned_while_sampling() -> None:
    log.info(
        "GGUF Native: something else needs pinned RAM while a model samples, so until it is done its weights go to the "
        "GPU through ComfyUI's own buffers, which is slower."
    )
