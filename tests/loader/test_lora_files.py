"""LoRA files in memory: read once, least recently used leaves first, a file that has changed is read anew."""

import dataclasses
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management as mm
import comfy.utils
from gguf_native.config import settings
from gguf_native.loader import lora_files
from gguf_native.loader.lora_files import LoraFileError, preload_lora, read_lora

# With the header a little more than half a megabyte: of preload_loras = 1 one fits, of 2 three.
VALUES = 2**17 + 2**12


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(lora_files, "kept", type(lora_files.kept)())
    for log in (lora_files.log_too_large, lora_files.log_in_place, lora_files.log_not_preloaded):
        log.cache_clear()


@pytest.fixture
def budget(monkeypatch):
    def set_to(megabytes: int) -> None:
        monkeypatch.setattr(lora_files, "settings", lambda: dataclasses.replace(settings(), preload_loras=megabytes))

    return set_to


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that the host's reader reads, as it does so."""
    done, reader = [], comfy.utils.load_torch_file
    monkeypatch.setattr(
        comfy.utils,
        "load_torch_file",
        lambda path, **options: done.append(os.path.basename(path)) or reader(path, **options),
    )
    return done


def write(folder, name: str, value: float = 1.0, n_values: int = VALUES, metadata: dict | None = None) -> str:
    tensors = {"a.lora_up.weight": torch.full((n_values,), value), "a.alpha": torch.tensor(4.0)}
    save_file(tensors, folder / name, metadata)
    return str(folder / name)


def test_a_file_is_read_once_and_gives_the_same_tensors(tmp_path, budget, reads):
    budget(2)
    path = write(tmp_path, "one.safetensors", metadata={"format": "pt", "trained with": "x"})
    first, metadata = read_lora(path)
    again, _ = read_lora(path)
    assert reads == ["one.safetensors"]
    assert metadata == {"format": "pt", "trained with": "x"}
    assert first.keys() == again.keys() == load_file(path).keys()
    assert all(first[key] is again[key] for key in first)
    # ComfyUI's conversion of keys may change the dict that it is given.
    first.clear()
    assert read_lora(path)[0].keys() == again.keys()


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_dtype_and_shape_comes_out_as_the_host_reads_it(tmp_path, budget, request, dynamic):
    if dynamic:
        request.getfixturevalue("dynamic_vram_on_cpu")
    budget(1)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8)
    shapes = ((), (0,), (3,), (5, 7), (2, 3, 1, 1))
    tensors = {f"{dtype} {shape}": torch.randn(shape).mul(50).abs().to(dtype) for dtype in dtypes for shape in shapes}
    save_file(tensors, tmp_path / "all.safetensors")
    read, _ = read_lora(str(tmp_path / "all.safetensors"))
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
        assert torch.equal(
            read[key].view(torch.uint8) if tensor.dim() else read[key],
            tensor.view(torch.uint8) if tensor.dim() else tensor,
        )
        assert read[key].data_ptr() % tensor.itemsize == 0


def test_a_torch_file_with_more_than_tensors(tmp_path, budget, reads):
    budget(1)
    torch.save({"a.lora_up.weight": torch.arange(6).view(2, 3).t(), "epoch": 7}, tmp_path / "old.pt")
    for _ in range(2):
        tensors, metadata = read_lora(str(tmp_path / "old.pt"))
        assert torch.equal(tensors["a.lora_up.weight"], torch.arange(6).view(2, 3).t())
        assert (tensors["epoch"], metadata) == (7, None)
    assert reads == ["old.pt"]


def test_the_least_recently_used_leaves(tmp_path, budget, reads, caplog):
    budget(2)
    a, b, c, d = (write(tmp_path, f"{name}.safetensors") for name in "abcd")
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        for path in (a, b, c, a, d):
            read_lora(path)
    assert [os.path.basename(version.path)[0] for version in lora_files.kept] == ["c", "a", "d"]
    assert reads == [f"{name}.safetensors" for name in "abcd"]
    assert caplog.messages[-2:] == [
        "GGUF Native: LoRA b.safetensors leaves memory: preload_loras is 2 MB.",
        "GGUF Native: LoRA d.safetensors stays in memory (0.5 MB).",
    ]
    read_lora(b)
    assert reads[4:] == ["b.safetensors"]


def test_what_left_memory_stays_valid_for_who_has_it(tmp_path, budget):
    budget(1)
    tensors, _ = read_lora(write(tmp_path, "a.safetensors", 3.0))
    read_lora(write(tmp_path, "b.safetensors", 4.0))
    assert len(lora_files.kept) == 1
    assert torch.equal(tensors["a.lora_up.weight"], torch.full((VALUES,), 3.0))


def test_a_file_that_has_changed_is_read_anew(tmp_path, budget, reads):
    budget(2)
    path = write(tmp_path, "a.safetensors", 1.0)
    old, _ = read_lora(path)
    status = os.stat(path)
    os.replace(write(tmp_path, "new.safetensors", 2.0), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    new, _ = read_lora(path)
    assert len(reads) == 2
    assert len(lora_files.kept) == 1
    assert new["a.lora_up.weight"][0] == 2
    # Not the file's pages: what a sampler still uses is as it was.
    assert old["a.lora_up.weight"][0] == 1


def test_files_larger_than_the_budget_are_held_as_the_host_reads_them(tmp_path, budget, reads, caplog, monkeypatch):
    budget(1)
    monkeypatch.setattr(mm, "pin_memory", lambda buffer: pytest.fail("pinned"))
    a, b, c = (write(tmp_path, f"{name}.safetensors", n_values=2**19) for name in "abc")
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        first = read_lora(a)[0]
        assert all(first[key] is tensor for key, tensor in read_lora(a)[0].items())
        first.clear()
        for path in (b, a, c):
            assert read_lora(path)[0]["a.alpha"] == 4
    # As many as the node has inputs for.
    assert settings().max_loras == 2
    assert [os.path.basename(version.path)[0] for version in lora_files.kept] == ["a", "c"]
    assert reads == ["a.safetensors", "b.safetensors", "c.safetensors"]
    said = [
        f"GGUF Native: LoRA {name}.safetensors, larger than preload_loras (1 MB), is not pinned, so it comes from its "
        "file, which is slower."
        for name in "abc"
    ]
    assert caplog.messages == [*said[:2], "GGUF Native: LoRA b.safetensors leaves memory: max_loras is 2.", said[2]]


def test_a_larger_file_whose_pages_are_pinned_is_said_once(tmp_path, budget, caplog, monkeypatch):
    budget(1)
    monkeypatch.setattr(lora_files, "pin_pages", lambda tensors: True)
    path = write(tmp_path, "a.safetensors", n_values=2**19)
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        read_lora(path)
        read_lora(path)
    assert caplog.messages == ["GGUF Native: LoRA a.safetensors is pinned where the system has its file."]


def test_a_file_larger_than_the_budget_takes_nothing_of_it(tmp_path, budget, reads):
    budget(1)
    small, large = write(tmp_path, "small.safetensors"), write(tmp_path, "large.safetensors", n_values=2**19)
    for path in (large, small, large, small):
        read_lora(path)
    assert reads == ["large.safetensors", "small.safetensors"]
    # What makes room for another small one is the small one.
    read_lora(write(tmp_path, "other.safetensors"))
    assert [os.path.basename(version.path) for version in lora_files.kept] == ["large.safetensors", "other.safetensors"]


def test_a_file_larger_than_the_budget_is_not_preloaded(tmp_path, budget, reads, caplog):
    budget(1)
    small, large = write(tmp_path, "small.safetensors"), write(tmp_path, "large.safetensors", n_values=2**19)
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        for path in (large, small):
            preload_lora(path)
    assert reads == ["small.safetensors"]
    assert [os.path.basename(version.path) for version in lora_files.kept] == ["small.safetensors"]
    assert [message.split()[3] for message in caplog.messages] == ["large.safetensors", "small.safetensors"]


def test_nothing_is_kept_where_the_setting_is_zero(tmp_path, budget, reads, caplog):
    budget(0)
    path = write(tmp_path, "a.safetensors")
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        read_lora(path)
        read_lora(path)
    assert len(reads) == 2
    assert not lora_files.kept and not caplog.messages


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_broken_file_is_named_and_not_kept(tmp_path, budget, request, name, dynamic):
    if dynamic:
        request.getfixturevalue("dynamic_vram_on_cpu")
    budget(1)
    (tmp_path / name).write_bytes(b"\xff" * 64)
    with pytest.raises(LoraFileError, match=rf"^{name}: cannot be read as a LoRA: .*Download"):
        read_lora(str(tmp_path / name))
    assert not lora_files.kept


def test_what_is_pinned_is_unpinned_when_it_leaves(tmp_path, budget, monkeypatch):
    """ComfyUI pins nothing without a GPU; this holds that each buffer is given to both of its functions once."""
    pinned, unpinned = [], []
    monkeypatch.setattr(mm, "pin_memory", lambda buffer: pinned.append(buffer) or True)
    monkeypatch.setattr(mm, "unpin_memory", unpinned.append)
    budget(1)
    tensors, _ = read_lora(write(tmp_path, "a.safetensors"))
    (buffer,) = pinned
    assert (buffer.dtype, buffer.is_contiguous()) == (torch.uint8, True)
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == {buffer.data_ptr()}
    assert unpinned == []
    read_lora(write(tmp_path, "b.safetensors"))
    assert len(pinned) == 2
    assert [gone is buffer for gone in unpinned] == [True]
