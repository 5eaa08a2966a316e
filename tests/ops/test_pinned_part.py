"""Pinning the pages of a file's parts: what the driver is told, when, and that it is told of the end in time."""

import gc
import mmap
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management
from gguf_native.ops import pinned_part
from gguf_native.ops.pinned_part import READ_ONLY, PinnedPart, address_of, part_of, parts_for

pytestmark = pytest.mark.skipif(not pinned_part.SYSTEM_CAN, reason="pages of files are pinned on Linux only")

NBYTES = (1 << 16) + 123
CPU = torch.device("cpu")
# By the host, of other memory.
COUNTED_BEFORE = 1000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(torch.randint(256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator()).numpy().tobytes())
    return path


def opened(path, start: int = 0, nbytes: int = NBYTES) -> PinnedPart:
    return PinnedPart(path.open("rb", buffering=0), start, nbytes)


class Runtime:
    """In place of CUDA's: what is registered with it, as (address, bytes, flags)."""

    def __init__(self):
        self.registered, self.answer, self.may_answer, self.alive = [], 0, threading.Event(), lambda: None
        self.was_alive, self.waited_for = [], []
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
def runtime(monkeypatch) -> Iterator[Runtime]:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.waited_for.append(device))
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", COUNTED_BEFORE)
    yield made
    gc.collect()
    # However its parts went.
    assert made.registered == [] and counted() == 0


def counted() -> int:
    """The bytes that the host counts more than before."""
    return comfy.model_management.TOTAL_PINNED_MEMORY - COUNTED_BEFORE


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
        assert counted() == NBYTES
        file.unpin()
        assert runtime.waited_for.pop() == CPU and counted() == 0
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
    assert asked == ["discard"] and counted() == NBYTES
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
    assert runtime.registered == [] and counted() == 0
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
        warnings.simplefilter("error")
        assert address_of(file.mapping) == file.view(100, 7).data_ptr() - 100


def test_a_part_in_the_middle_begins_where_the_system_can_map(path, runtime):
    start = 3 * mmap.ALLOCATIONGRANULARITY + 5
    part = opened(path, start, 40)
    assert (part.start, part.nbytes) == (start - 5, 45)
    assert part.view(start, 40).numpy().tobytes() == path.read_bytes()[start : start + 40]
    part.pin(CPU)
    assert part.is_pinned()
    assert runtime.registered == [(part.view(start, 1).data_ptr() - 5, 45, READ_ONLY)]


def test_pinned_pages_are_not_this_process_memory(path, runtime, monkeypatch):
    """The stand-in reads them, as the driver does."""
    part = opened(path)
    register = runtime.cudaHostRegister
    bytes(part.mapping)
    assert resident_kilobytes(part) >= NBYTES // 1024
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "cudaHostRegister", lambda *given: bytes(part.mapping) and register(*given))
        part.pin(CPU)
        assert part.is_pinned() and resident_kilobytes(part) == 0
    assert bytes(part.mapping) == path.read_bytes()


def resident_kilobytes(part: PinnedPart) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"{address_of(part.mapping):x}-"))
    return int(next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1])


def test_parts_hold_whole_spans_and_are_no_larger_than_they_must(path, monkeypatch):
    monkeypatch.setattr(pinned_part, "PART_BYTES", 1000)
    file = path.open("rb", buffering=0)
    spans = [(5000, 1), (0, 400), (400, 600), (1000, 300), (1310, 2500), (3810, 500), (4310, 500), (5001, 999)]
    parts = parts_for(file, spans)
    assert set(parts) == set(spans)
    by_part = [[span for span in sorted(spans) if parts[span] is part] for part in dict.fromkeys(parts.values())]
    assert by_part == [
        [(0, 400), (400, 600)],
        [(1000, 300)],
        [(1310, 2500)],
        [(3810, 500), (4310, 500)],
        [(5000, 1), (5001, 999)],
    ]
    for span, part in parts.items():
        view = part.view(*span)
        assert view.numpy().tobytes() == path.read_bytes()[span[0] : sum(span)]
        assert part_of(view) is part_of(view[:1].view(torch.int8)) is part
    assert part_of(torch.zeros(1)) is None


@pytest.mark.cuda
def test_on_a_gpu_copies_are_the_bytes_of_the_file(path):
    file, device = opened(path), torch.device("cuda", 0)
    tensor = file.view(0, NBYTES)
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
    again = PinnedPart(file.file, 0, NBYTES)
    again.mapping = file.mapping
    again.pin(device)
    assert not again.is_pinned()
    assert torch.ones(3, device=device).sum().item() == 3
    again.unpin()
    file.unpin()
