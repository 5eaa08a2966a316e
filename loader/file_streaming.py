"""Under DynamicVRAM: weights straight from the pinned file, within the RAM that the host allows itself to pin."""

import logging
from collections.abc import Iterable
from functools import cache

import comfy.cli_args
import comfy.model_management as mm
import torch

from ..ops.layers import GGUFOps, PackedWeight
from ..ops.pinned_file import SYSTEM_CAN, PinnedFile
from ..ops.streaming import Streamer, log_unpinned, pinned_file_of
from .packed_layers import packed_layers, unpatched_slots

log = logging.getLogger("gguf_native")


def streamer_of(model: torch.nn.Module) -> Streamer | None:
    """The one that the packed layers of a model share."""
    return next((layer.streamer for layer in packed_layers(model).values() if layer.streamer is not None), None)


def stop_streaming(model: torch.nn.Module) -> None:
    """Give back the GPU memory of what was sent ahead; the next forward begins anew."""
    streamer = streamer_of(model)
    if streamer is not None:
        streamer.reset()


def stream_from_files(model: torch.nn.Module, device: torch.device) -> None:
    """Have the layers that DynamicVRAM pages in take their weights from the pinned file, if there is RAM for that."""
    # A patched bias is the host's affair.
    paged = {layer for layer in unpatched_slots(model) if pinned_file_of(layer)}
    streamer = streamer_of(model)
    if streamer is not None and streamer.device == device:
        streamer.reset()
    elif paged and device.type == "cuda":
        files = files_of(paged)
        # A table of words, of which one is larger than many a model, is wanted once: what does not fit is the host's.
        sizes = [layer.weight._qdata.nbytes for layer in paged if not isinstance(layer, GGUFOps.Embedding)]
        streamer = Streamer(device, files, max(sizes, default=0), next(iter(paged)).workspace.weights_stream)
    may = streamer is not None and pin_files(streamer.files, device)
    set_streamer(model, dict.fromkeys(paged, streamer) if may else {})


def set_streamer(model: torch.nn.Module, streamers: dict[torch.nn.Module, Streamer]) -> None:
    """None for all others, those too whose weight a patch has made dense since."""
    for layer in model.modules():
        if isinstance(layer, PackedWeight):
            layer.streamer = streamers.get(layer)


def pin_files(files: list[PinnedFile], device: torch.device) -> bool:
    """Pin what is not pinned yet, within what the host allows itself; whether that is so."""
    n_bytes, args = sum(file.nbytes for file in files if not file.is_asked_for), comfy.cli_args.args
    if not n_bytes:
        return True
    if args.disable_pinned_memory or args.fast_disk or mm.MAX_PINNED_MEMORY <= 0:
        return False
    if not SYSTEM_CAN:
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
    """Bytes that the host counts as pinned no more."""
    files = [file for file in files_of(packed_layers(model).values()) if file.is_asked_for]
    if files:
        stop_streaming(model)
        if getattr(model, "current_patcher", None) is not None:
            log_unpinned_while_sampling()
    for file in files:
        # A copy from it may be under way.
        torch.cuda.synchronize(file.device)
        file.unpin()
        mm.TOTAL_PINNED_MEMORY -= file.nbytes
    # The next load makes another; layers that hold what holds them would stay until the garbage collector comes.
    set_streamer(model, {})
    return sum(file.nbytes for file in files)


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
