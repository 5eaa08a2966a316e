"""A mapped file whose pages the GPU reads where the system holds them: no copy in RAM, none by the processor."""

import mmap
import os
import sys
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

import comfy.model_management
import torch

# Only there do GPU drivers lock the pages of a file.
SYSTEM_CAN = sys.platform == "linux"
# cudaHostRegisterReadOnly: the mapping cannot be written, and a GPU that reads need not.
READ_ONLY = 8
# Registering takes some 30 ms per GB and lets other threads run.
IN_BACKGROUND = ThreadPoolExecutor(1, "gguf-native-pin")


class PinnedFile:
    """The mapping of one file, and whether its pages are locked in memory and known to the GPU's copy engines.

    mapping: of the whole of `file`, read-only and shared. nbytes: how much `pin` locks.
    """

    def __init__(self, mapping: mmap.mmap, file: BinaryIO):
        self.mapping, self.file, self.nbytes = mapping, file, len(mapping)
        self.device: torch.device | None = None
        # Whether the system or its driver would not pin it; it is not asked again.
        self.is_refused = False
        self.pinning: Future | None = None
        self.release: weakref.finalize | None = None

    def pin(self, device: torch.device) -> None:
        """Begin to pin, in the background; `is_pinned` waits for it."""
        self.device = device
        self.pinning = IN_BACKGROUND.submit(self._register, device)

    @property
    def is_asked_for(self) -> bool:
        """Whether `pin` was called since the last `unpin`."""
        return self.pinning is not None

    def is_pinned(self) -> bool:
        """Whether copies from the file's tensors run by themselves; False too where the system cannot do it."""
        return self.pinning is not None and self.pinning.result()

    def unpin(self) -> None:
        """Give the pages back to the system; no copy may be under way."""
        if self.is_pinned():
            self.release()
        self.pinning = None

    def give_pages_back(self) -> None:
        """Have them no longer count as this process's memory; the system keeps them as long as it has room."""
        # Pages that something else has locked stay.
        with suppress(OSError):
            if hasattr(mmap, "MADV_DONTNEED"):
                self.mapping.madvise(mmap.MADV_DONTNEED)

    def _register(self, device: torch.device) -> bool:
        # Locking pages reads what is not in memory, in small pieces; this asks the disk for large ones.
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        with torch.cuda.device(device):
            code = torch.cuda.cudart().cudaHostRegister(address_of(self.mapping), self.nbytes, READ_ONLY)
            if int(code) != 0:
                comfy.model_management.discard_cuda_async_error()
                self.is_refused = True
                return False
        # Before the mapping goes, which this holds; what is left at the process's end, the system takes.
        self.release = weakref.finalize(self, unregister, self.mapping)
        self.release.atexit = False
        return True


def unregister(mapping: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address_of(mapping))


def address_of(mapping: mmap.mmap) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
