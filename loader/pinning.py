"""Parts of files pinned, within the RAM that the host allows itself to pin."""

import logging
from collections.abc import Iterable
from functools import cache

import comfy.cli_args
import comfy.memory_management
import comfy.model_management as mm
import torch

from ..ops.pinned_part import SYSTEM_CAN, PinnedPart
from ..ops.streaming import log_unpinned

log = logging.getLogger("gguf_native")


def pin_parts(parts: list[PinnedPart], device: torch.device, spare: Iterable[PinnedPart] = ()) -> bool:
    """Pin all or none; whether it is all, as far as is known: the driver's answer comes later.

    spare: what is unpinned, in its order, where there is no room.
    """
    if _may_pin(parts, list(spare)):
        # To make room the host may have had some of them unpinned.
        for part in parts:
            if not part.is_asked_for:
                part.pin(device)
        return True
    for part in parts:
        part.unpin()
    return False


def _may_pin(parts: list[PinnedPart], spare: list[PinnedPart]) -> bool:
    """Whether the driver, the host's options and RAM let what is not pinned yet be pinned."""
    n_bytes, args = _unpinned_bytes(parts), comfy.cli_args.args
    if args.disable_pinned_memory or args.fast_disk or mm.MAX_PINNED_MEMORY <= 0:
        return False
    if not SYSTEM_CAN or any(part.is_refused for part in parts):
        log_unpinned()
        return False
    if not n_bytes:
        return True
    while not (mm.ensure_pin_budget(n_bytes) and mm.ensure_pin_registerable(n_bytes)):
        if not spare:
            log_too_large_to_pin()
            return False
        spare.pop(0).unpin()
    return True


def _unpinned_bytes(parts: list[PinnedPart]) -> int:
    return sum(part.nbytes for part in parts if not part.is_asked_for)


def is_room_free(parts: list[PinnedPart]) -> bool:
    """Whether `pin_parts` finds room for them without having anything unpinned, by the host's own measure."""
    n_bytes = _unpinned_bytes(parts)
    headroom = max(comfy.memory_management.RAM_CACHE_HEADROOM / 2, 2 << 30)
    available = mm.get_free_memory(torch.device("cpu"))
    fits = comfy.cli_args.args.high_ram or n_bytes + headroom <= available
    return fits and mm.TOTAL_PINNED_MEMORY + n_bytes <= mm.MAX_PINNED_MEMORY


@cache
def log_too_large_to_pin() -> None:
    log.info(
        "GGUF Native: a model's or a LoRA's file does not fit into RAM beside what is there, so it goes to the GPU "
        "through buffers, which is slower."
    )
