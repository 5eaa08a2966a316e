"""A machine that pins parts of files for a GPU, without one: what it is asked is noted, and the host counts it."""

from collections.abc import Iterator
from types import SimpleNamespace

import comfy.cli_args
import comfy.model_management as mm
import pytest
import torch
from gguf_native.loader import pinning
from gguf_native.ops import streaming

GPU = torch.device("cuda", 0)
# What the host has pinned already.
PINNED_BEFORE = 1000


class Part:
    """In place of a PinnedPart: what it was asked, in a list that all of them share."""

    def __init__(self, nbytes: int, done: list):
        self.nbytes, self.done, self.is_asked_for, self.is_refused = nbytes, done, False, False

    def pin(self, device: torch.device) -> None:
        self.done.append(("pin", self.nbytes, device))
        self.is_asked_for = True
        mm.TOTAL_PINNED_MEMORY += self.nbytes

    def unpin(self) -> None:
        if self.is_asked_for:
            self.done.append(("unpin", self.nbytes))
            self.is_asked_for = False
            mm.TOTAL_PINNED_MEMORY -= self.nbytes

    def is_pinned(self) -> bool:
        return self.is_asked_for and not self.is_refused


def pinning_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The fixture `system`: a machine with a GPU and room, and what was asked of it."""
    done, asked = [], []
    room = SimpleNamespace(budget=True, registerable=True)
    pinning.log_too_large_to_pin.cache_clear()
    streaming.log_unpinned.cache_clear()
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", PINNED_BEFORE)
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda nbytes: asked.append(nbytes) or room.budget)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda nbytes: asked.append(nbytes) or room.registerable)
    monkeypatch.setattr(pinning, "SYSTEM_CAN", True)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", False)
    monkeypatch.setattr(comfy.cli_args.args, "fast_disk", False)
    with torch.inference_mode():
        yield SimpleNamespace(done=done, asked=asked, room=room)
