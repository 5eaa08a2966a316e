"""Large LoRA files pinned in their own pages: the host's tensors, its room, and nothing that stays locked."""

import gc
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management as mm
import comfy.utils
from gguf_native.loader import lora_pages
from gguf_native.loader.lora_pages import in_pages, pin_pages
from gguf_native.ops import pinned_part
from gguf_native.ops.pinned_part import part_of, parts_of


@pytest.fixture
def driver(dynamic_vram_on_cpu, monkeypatch) -> SimpleNamespace:
    """Of a host that has a GPU: the addresses that are registered with its driver, how many more it takes, the room."""
    if not lora_pages.SYSTEM_CAN:
        pytest.skip("pages of files are pinned on Linux only")
    state = SimpleNamespace(registered=[], takes=100, room=True)

    def register(address, nbytes, flags):
        state.takes -= 1
        if state.takes < 0:
            return 801
        state.registered.append(address)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=state.registered.remove)
    monkeypatch.setattr(lora_pages, "parts_of_loras", WeakSet())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(mm, "discard_cuda_async_error", lambda: None)
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 1 << 40)
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", 0)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda nbytes: state.room)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda nbytes: True)
    monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cuda", 0))
    yield state
    gc.collect()
    assert state.registered == [] and mm.TOTAL_PINNED_MEMORY == 0


def read(path) -> dict[str, torch.Tensor]:
    return in_pages(comfy.utils.load_torch_file(str(path), safe_load=True))


def written(folder, name: str, tensors: dict[str, torch.Tensor] | None = None):
    path = folder / f"{name}.safetensors"
    save_file(tensors or {"a.lora_up.weight": torch.ones(64, 32), "a.alpha": torch.tensor(4.0)}, path)
    return path


def test_they_are_the_tensors_of_the_file_and_pinned_in_one_part(tmp_path, driver):
    dtypes = {"a.up": torch.float32, "a.half": torch.float16, "a.bf16": torch.bfloat16, "a.fp8": torch.float8_e4m3fn}
    tensors = {key: torch.randn(3, 5).to(dtype) for key, dtype in dtypes.items()}
    tensors |= {"a.alpha": torch.tensor(4.0), "a.none": torch.zeros(0)}
    path = written(tmp_path, "a", tensors)
    found = read(path)
    assert pin_pages(found) and len(driver.registered) == 1
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key].float(), tensor.float())
        assert (part_of(found[key]) is not None) == (tensor.numel() > 0)
        # Where ComfyUI must send it, it knows where to read.
        assert hasattr(found[key].untyped_storage(), "_comfy_tensor_file_slice") == (tensor.numel() > 0)
    # By its name the file is another one now.
    os.replace(written(tmp_path, "b"), path)
    assert torch.equal(found["a.up"], tensors["a.up"])


def test_without_dynamic_vram_or_a_gpu_they_stay_as_they_are(tmp_path, monkeypatch):
    tensors = {"a.up": torch.ones(3), "epoch": 7}
    monkeypatch.setattr(mm, "get_torch_device", lambda: torch.device("cuda", 0))
    assert in_pages(tensors) is tensors and not pin_pages(tensors)


def test_on_a_cpu_they_stay_as_they_are(tmp_path, dynamic_vram_on_cpu):
    tensors = comfy.utils.load_torch_file(str(written(tmp_path, "a")), safe_load=True)
    assert in_pages(tensors) is tensors and not pin_pages(tensors)


def test_what_a_model_has_taken_the_room_of_is_pinned_again(tmp_path, driver):
    tensors = read(written(tmp_path, "a"))
    assert pin_pages(tensors)
    for part in lora_pages.parts_of_loras:
        part.unpin()
    assert driver.registered == []
    assert pin_pages(tensors) and len(driver.registered) == 1


def test_what_somebody_still_has_stays_pinned(tmp_path, driver):
    files = [read(written(tmp_path, name)) for name in "abc"]
    assert all(map(pin_pages, files))
    assert len(driver.registered) == len(lora_pages.parts_of_loras) == 3
    del files[0]
    gc.collect()
    assert len(driver.registered) == len(lora_pages.parts_of_loras) == 2


def test_other_loras_leave_their_room_and_no_model_does(tmp_path, driver, monkeypatch):
    first, second = read(written(tmp_path, "a")), read(written(tmp_path, "b"))
    assert pin_pages(first)
    (part,), (other,) = parts_of(first.values()), parts_of(second.values())
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", mm.TOTAL_PINNED_MEMORY)
    assert pin_pages(second)
    assert (part.is_asked_for, other.is_asked_for) == (False, True)
    # The rest is a model's, which the host would have unpinned.
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 0.5 * part.nbytes)
    assert not pin_pages(first)
    assert driver.registered == []


@pytest.mark.parametrize("why", ["room", "driver"])
def test_what_cannot_be_pinned_whole_is_not_pinned(tmp_path, driver, monkeypatch, why):
    monkeypatch.setattr(pinned_part, "PART_BYTES", 1 << 12)
    driver.room, driver.takes = why != "room", 1
    tensors = {f"{number}.lora_up.weight": torch.full((1 << 10,), float(number)) for number in range(3)}
    found = read(written(tmp_path, "a", tensors))
    assert not pin_pages(found)
    assert len(lora_pages.parts_of_loras) == 3
    assert driver.registered == [] and mm.TOTAL_PINNED_MEMORY == 0
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_header_that_claims_more_than_its_file_has(tmp_path, driver):
    """ComfyUI's reader takes what there is."""
    path = written(tmp_path, "a")
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["a.lora_up.weight"]["data_offsets"][1] += 4096
        changed = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        assert len(changed) == size
        file.seek(8)
        file.write(changed)
    tensor = read(path)["a.lora_up.weight"]
    assert torch.equal(tensor, torch.ones(64, 32)) and part_of(tensor) is None
