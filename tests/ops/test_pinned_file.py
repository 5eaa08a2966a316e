"""Pinning the pages of a mapped file: what the driver is told, when, and that it is told of the end in time."""

import gc
import mmap
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management
from gguf_native.ops import pinned_file
from gguf_native.ops.pinned_file import READ_ONLY, PinnedFile, address_of

pytestmark = pytest.mark.skipif(not pinned_file.SYSTEM_CAN, reason="pages of files are pinned on Linux only")

NBYTES = (1 << 16) + 123
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(torch.randint(256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator()).numpy().tobytes())
    return path


def opened(path) -> PinnedFile:
    file = path.open("rb", buffering=0)
    return PinnedFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file)


class Runtime:
    """In place of CUDA's: what is registered with it, as (address, bytes, flags)."""

    def __init__(self):
        self.registered, self.answer, self.may_answer, self.alive = [], 0, threading.Event(), lambda: None
        self.was_alive = []
        self.may_answer.set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert self.may_answer.wait(10)
        if self.answer == 0:
            self.registered.append((address, nbytes, flags))
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.was_alive.append(self.alive() is not None)
        (entry,) = [entry for entry in self.registered if entry[0] == address]
        self.registered.remove(entry)
        return 0


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_the_whole_mapping_is_registered_to_be_read(path, runtime):
    file = opened(path)
    assert not file.is_asked_for and not file.is_pinned()
    file.pin(CPU)
    assert file.is_asked_for and file.is_pinned()
    assert runtime.registered == [(address_of(file.mapping), NBYTES, READ_ONLY)]
    assert file.nbytes == NBYTES


def test_pinning_goes_on_beside_and_who_asks_waits(path, runtime):
    runtime.may_answer.clear()
    file = opened(path)
    file.pin(CPU)
    assert file.is_asked_for and runtime.registered == []
    threading.Timer(0.1, runtime.may_answer.set).start()
    assert file.is_pinned()


def test_unpinned_and_pinned_again(path, runtime):
    file = opened(path)
    file.unpin()
    for _ in range(2):
        file.pin(CPU)
        assert file.is_pinned() and len(runtime.registered) == 1
        file.unpin()
        assert not file.is_asked_for and not file.is_pinned() and runtime.registered == []
    # What was told already is not told once more.
    del file
    gc.collect()
    assert len(runtime.was_alive) == 2


def test_a_refusal_is_kept_and_its_error_is_taken_from_cuda(path, runtime, monkeypatch):
    asked = []

    monkeypatch.setattr(comfy.model_management, "discard_cuda_async_error", lambda: asked.append("discard"))
    runtime.answer = 801
    file = opened(path)
    file.pin(CPU)
    assert not file.is_pinned() and file.is_asked_for and file.is_refused
    assert asked == ["discard"]
    file.unpin()
    assert not file.is_asked_for and file.is_refused
    del file
    gc.collect()
    assert runtime.was_alive == []


def test_it_is_unregistered_before_the_mapping_goes(path, runtime):
    file = opened(path)
    mapping = runtime.alive = weakref.ref(file.mapping)
    handle = file.file  # the host has it too
    file.pin(CPU)
    assert file.is_pinned()
    del file
    gc.collect()
    assert runtime.registered == []
    assert runtime.was_alive == [True]
    assert mapping() is None
    assert not handle.closed


def test_nothing_is_told_at_the_end_of_the_process(path, runtime):
    file = opened(path)
    file.pin(CPU)
    assert file.is_pinned()
    assert file.release.alive and not file.release.atexit


def test_the_address_is_that_of_the_tensors(path):
    file = opened(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.frombuffer(file.mapping, dtype=torch.uint8, offset=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert address_of(file.mapping) == tensor.data_ptr() - 100


@pytest.mark.cuda
def test_on_a_gpu_copies_are_the_bytes_of_the_file(path):
    file, device = opened(path), torch.device("cuda", 0)
    tensor = torch.frombuffer(file.mapping, dtype=torch.uint8)
    expected = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    assert not tensor.is_pinned()
    for _ in range(2):
        file.pin(device)
        assert file.is_pinned() and tensor.is_pinned()
        for part in (slice(None), slice(5, 4099), slice(NBYTES - 7, None)):
            assert torch.equal(tensor[part].to(device, non_blocking=True).cpu(), expected[part])
        file.unpin()
        assert not tensor.is_pinned()
    assert torch.equal(tensor.to(device).cpu(), expected)


@pytest.mark.cuda
def test_on_a_gpu_a_refusal_leaves_no_error_behind(path):
    """Pinned twice: the driver refuses the second."""
    file, device = opened(path), torch.device("cuda", 0)
    file.pin(device)
    assert file.is_pinned()
    again = PinnedFile(file.mapping, file.file)
    again.pin(device)
    assert not again.is_pinned()
    assert torch.ones(3, device=device).sum().item() == 3
    again.unpin()
    file.unpin()
