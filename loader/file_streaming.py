"""Under DynamicVRAM: weights straight from the pinned file, within the RAM that the host allows itself to pin."""

import logging
from collections.abc import Iterable
from functools import cache

import comfy.cli_args
import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP

from ..ops.layers import GGUFOps, PackedWeight
from ..ops.pinned_file import SYSTEM_CAN, PinnedFile
from ..ops.streaming import Streamer, log_unpinned, pinned_file_of
from .graphs import options_of
from .packed_layers import packed_layers, unpatched_slots
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
    paged = {layer for layer in unpatched_slots(model) if pinned_file_of(layer)}
    streamer, streamers = streamer_of(model), {}
    if paged and device.type == "cuda":
        if streamer is None or streamer.device != device:
            streamer = Streamer(device, next(iter(paged)).workspace.weights_stream)
        # A table of words, of which one is larger than many a model, is wanted once: what does not fit is the host's.
        sizes = [layer.weight._qdata.nbytes for layer in paged if not isinstance(layer, GGUFOps.Embedding)]
        streamer.prepare(files_of(paged), max(sizes, default=0))
        if pin_files(streamer.files, device):
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


def pin_files(files: list[PinnedFile], device: torch.device) -> bool:
    """Pin what is not pinned yet, within what the host allows itself; whether that is so."""
    for file in files:
        if file.is_refused and file.is_asked_for:
            unpin(file)
    n_bytes, args = sum(file.nbytes for file in files if not file.is_asked_for), comfy.cli_args.args
    if not n_bytes:
        return True
    if args.disable_pinned_memory or args.fast_disk or mm.MAX_PINNED_MEMORY <= 0:
        return False
    if not SYSTEM_CAN or any(file.is_refused for file in files):
        log_unpinned()
        return False
    if not mm.ensure_pin_budget(n_bytes) or not mm.ensure_pin_registerable(n_bytes):
        log_too_large_to_pin()
        return False
    # To make room the host may have had the other parts of a split file unpinned.
    for file in files:
        if not file.is_asked_for:
            mm.TOTAL_PINNED_MEMORY += file.nbytes
            file.pin(device)
    return True


def files_of(layers: Iterable[PackedWeight]) -> list[PinnedFile]:
    """Those that packed weights view, each once."""
    return list({id(file): file for file in map(pinned_file_of, layers) if file is not None}.values())


def unpin_files(model: torch.nn.Module) -> int:
    """Bytes that are pinned no more."""
    files = [file for file in files_of(packed_layers(model).values()) if file.is_asked_for]
    pinned = [file for file in files if file.is_pinned()]
    if pinned:
        stop_streaming(model)
        if getattr(model, "current_patcher", None) is not None:
            log_unpinned_while_sampling()
    for file in files:
        unpin(file)
    # The next load makes another; layers that hold what holds them would stay until the garbage collector comes.
    set_streamer(model, {})
    return sum(file.nbytes for file in pinned)


def unpin(file: PinnedFile) -> None:
    # A copy from it may be under way.
    torch.cuda.synchronize(file.device)
    file.unpin()
    mm.TOTAL_PINNED_MEMORY -= file.nbytes


@cache
def log_unpinned_while_sampling() -> None:
    log.info(
        "GGUF Native: something else needs pinned RAM while a model samples, so until it is done its weights go to the "
        "GPU through ComfyUI's own buffers, which is slower."
    )


@cache
def log_too_large_to_pin() -> None:
    log.info(
        "GGUF Native: a model's file does not fit into RAM beside what is there, so its weights go to the GPU through "
        "ComfyUI's own buffers, which is slower."
    )
