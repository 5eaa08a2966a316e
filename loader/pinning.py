"""Parts of files pinned, within the RAM that the host allows itself to pin."""

import logging
from collections.abc import Iterable
from functools import cache

import comfy.cli_args
import comfy.model_management as mm
import torch

from ..ops.pinned_part import SYSTEM_CAN, PinnedPart
from ..ops.streaming import log_unpinned

log = logging.getLogger("gguf_native")


def pin_parts(parts: list[PinnedPart], device: torch.device, spare: Iterable[PinnedPart] = ()) -> bool:
    """Pin what is not pinned yet; whether all of it is, as far as is known: the driver's answer comes later.

    spare: what is unpinned where there is no room.
    """
    if any(part.is_refused for part in parts):
        # The others serve nothing without them.
        for part in parts:
            part.unpin()
    n_bytes, args = sum(part.nbytes for part in parts if not part.is_asked_for), comfy.cli_args.args
    if not n_bytes:
        return True
    if args.disable_pinned_memory or args.fast_disk or mm.MAX_PINNED_MEMORY <= 0:
        return False
    if not SYSTEM_CAN or any(part.is_refused for part in parts):
        log_unpinned()
        return False
    if not _has_room(n_bytes):
        for part in spare:
            part.unpin()
        if not _has_room(n_bytes):
            log_too_large_to_pin()
            return False
    # To make room the host may have had some of them unpinned.
    for part in parts:
        if not part.is_asked_for:
            part.pin(device)
    return True


def _has_room(n_bytes: int) -> bool:
    return mm.ensure_pin_budget(n_bytes) and mm.ensure_pin_registerable(n_bytes)


@cache
def log_too_large_to_pin() -> None:
    log.info(
        "GGUF Native: a model's or a LoRA's file does not fit into RAM beside what is there, so it goes to the GPU "
        "through buffers, which is slower."
    )
