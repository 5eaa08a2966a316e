"""Parts of a file whose pages the GPU reads where the system holds them: no copy in RAM, none by the processor."""

import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

import comfy.model_management as mm
import torch

# Only there do GPU drivers lock the pages of a file.
SYSTEM_CAN = sys.platform == "linux"
# cudaHostRegisterReadOnly: the mapping cannot be written, and a GPU that reads need not.
READ_ONLY = 8
# Registering takes some 30 ms per GB and lets other threads run.
IN_BACKGROUND = ThreadPoolExecutor(1, "gguf-native-pin")
# As much counts as this process's memory while it is being registered. Each part takes a file descriptor.
PART_BYTES = 512 << 20 if SYSTEM_CAN else 1 << 62


class PinnedPart:
    """One mapped part of a file, and whether its pages are locked in memory and known to the GPU's copy engines.

    start, nbytes: what of the file can be viewed and is pinned, at least. A copy must not begin in one registered part
    and end in another, so each has a mapping of its own, and parts that share a page map it twice.
    """

    def __init__(self, file: BinaryIO, start: int, nbytes: int):
        self.file, self.start = file, start - start % mmap.ALLOCATIONGRANULARITY
        self.nbytes = start + nbytes - self.start
        self.mapping = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_READ, offset=self.start)
        self.device: torch.device | None = None
        # Whether the system or its driver would not pin it; it is not asked again.
        self.is_refused = False
        self.pinning: Future | None = None
        self.release: weakref.finalize | None = None

    def view(self, start: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], what the file has from `start` on, which is noted at its storage. Never write to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensor = torch.frombuffer(self.mapping, dtype=torch.uint8, count=nbytes, offset=start - self.start)
        tensor.untyped_storage()._gguf_native_part = self
        return tensor

    def pin(self, device: torch.device) -> None:
        """Begin to pin, in the background; `is_pinned` waits for it. The host counts it from now on."""
        self.device = device
        mm.TOTAL_PINNED_MEMORY += self.nbytes
        self.pinning = IN_BACKGROUND.submit(self._register, device)
        # Before the mapping goes, which this holds; what is left at the process's end, the system takes.
        self.release = weakref.finalize(self, release, self.mapping, self.nbytes, self.pinning)
        self.release.atexit = False

    @property
    def is_asked_for(self) -> bool:
        """Whether `pin` was called since the last `unpin`."""
        return self.pinning is not None

    def is_pinned(self) -> bool:
        """Whether copies from the file's tensors run by themselves; False too where the system cannot do it."""
        return self.pinning is not None and self.pinning.result()

    def unpin(self) -> None:
        """Give the pages back to the system, if it was asked to pin them, after the last copy from them."""
        if self.is_asked_for:
            torch.cuda.synchronize(self.device)
            self.release()
            self.pinning = None

    def give_pages_back(self) -> None:
        """Have them no longer count as this process's memory; the system keeps them as long as it has room, or they are
        pinned.
        """
        # Pages that something else has locked stay.
        with suppress(OSError):
            if hasattr(mmap, "MADV_DONTNEED"):
                self.mapping.madvise(mmap.MADV_DONTNEED)

    def _register(self, device: torch.device) -> bool:
        # Locking pages reads what is not in memory, in small pieces; this asks the disk for large ones.
        os.posix_fadvise(self.file.fileno(), self.start, self.nbytes, os.POSIX_FADV_WILLNEED)
        with torch.cuda.device(device):
            code = torch.cuda.cudart().cudaHostRegister(address_of(self.mapping), self.nbytes, READ_ONLY)
            if int(code) != 0:
                mm.discard_cuda_async_error()
                self.is_refused = True
                return False
        # The GPU knows where they are. The system holds them for all processes, so they are not this one's memory.
        self.give_pages_back()
        return True


def release(mapping: mmap.mmap, nbytes: int, pinning: Future) -> None:
    """When a part is unpinned or goes. A task that is not done yet holds its part, so `pinning` is done then."""
    mm.TOTAL_PINNED_MEMORY -= nbytes
    if pinning.result():
        torch.cuda.cudart().cudaHostUnregister(address_of(mapping))


def address_of(mapping: mmap.mmap) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()


def part_of(tensor: torch.Tensor) -> PinnedPart | None:
    """The one that a tensor views, if any."""
    return getattr(tensor.untyped_storage(), "_gguf_native_part", None)


def parts_of(tensors: Iterable[torch.Tensor]) -> list[PinnedPart]:
    """Those that tensors view, each once."""
    return list(dict.fromkeys(part for part in map(part_of, tensors) if part is not None))


def parts_for(file: BinaryIO, spans: Iterable[tuple[int, int]]) -> dict[tuple[int, int], PinnedPart]:
    """The part that each span (start, bytes) of a file lies in: of PART_BYTES at most, or of one larger span."""
    runs = []
    for span in sorted(spans):
        if not runs or sum(span) - runs[-1][0][0] > PART_BYTES:
            runs.append([])
        runs[-1].append(span)
    parts = {}
    for run in runs:
        start = run[0][0]
        parts |= dict.fromkeys(run, PinnedPart(file, start, max(map(sum, run)) - start))
    return parts
