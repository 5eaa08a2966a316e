"""Importance files: llama.cpp's GGUF and older binary form are read, and what is written is what was given."""

import logging
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf_native.loader import open_gguf
from gguf_native.quantizer import convert
from gguf_native.quantizer.errors import ImportanceError
from gguf_native.quantizer.importance import read_importance, write_importance
from safetensors.torch import save_file

SUMS = {"blk.0.attn_q.weight": [4.0, 0.0, 8.0], "blk.0.ffn_up.weight": [3.0, 6.0]}
COUNTS = {"blk.0.attn_q.weight": 4, "blk.0.ffn_up.weight": 3}
MEANS = {"blk.0.attn_q.weight": [1.0, 0.0, 2.0], "blk.0.ffn_up.weight": [1.0, 2.0]}
NAME = "double_blocks.0.img_attn.proj.weight"


def as_lists(found: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    assert all(values.dtype == torch.float32 for values in found.values())
    return {name: values.tolist() for name, values in found.items()}


def dat(entries: dict[str, list[float]], counts: dict[str, int]) -> bytes:
    raw = struct.pack("<i", len(entries))
    for name, sums in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", counts[name], len(sums))
        raw += struct.pack(f"<{len(sums)}f", *sums)
    return raw + struct.pack("<ii", 10, 4) + b"text"


def test_gguf_as_llama_cpp_writes_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    for name, sums in SUMS.items():
        writer.add_tensor(f"{name}.in_sum2", np.array([sums], np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[COUNTS[name]]], np.float32))
    # Two experts, of which one was asked three times as often.
    writer.add_tensor("experts.weight.in_sum2", np.array([[1, 2], [7, 6]], np.float32))
    writer.add_tensor("experts.weight.counts", np.array([[1], [3]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert as_lists(read_importance(tmp_path / "imatrix.gguf")) == {**MEANS, "experts.weight": [2.0, 2.0]}


def test_the_older_binary_form(tmp_path):
    (tmp_path / "imatrix.dat").write_bytes(dat(SUMS, COUNTS))
    assert as_lists(read_importance(tmp_path / "imatrix.dat")) == MEANS


def test_the_older_form_is_held_once(tmp_path):
    names = [f"blk.{number}.weight" for number in range(64)]
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat(dict.fromkeys(names, [2.0] * 16384), dict.fromkeys(names, 2)))
    tracemalloc.start()
    read_importance(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * path.stat().st_size


@pytest.mark.parametrize("length", [0, 3, 9, 20, 50])
def test_a_cut_file_is_refused(tmp_path, length):
    (tmp_path / "imatrix.dat").write_bytes(dat(SUMS, COUNTS)[:length])
    with pytest.raises(ImportanceError, match=r"imatrix\.dat"):
        read_importance(tmp_path / "imatrix.dat")


def test_what_is_written_is_read_again(tmp_path):
    sums = {name: torch.tensor(values) for name, values in SUMS.items()}
    write_importance(tmp_path / "out.gguf", sums, COUNTS, "forty prompts")
    assert as_lists(read_importance(tmp_path / "out.gguf")) == MEANS
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.metadata["general.type"] == "imatrix"
        assert file.metadata["imatrix.datasets"] == ["forty prompts"]
        assert file.tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, 3)
        assert file.tensors["blk.0.attn_q.weight.counts"].shape == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_value_that_cannot_be_is_named(tmp_path, bad):
    write_importance(tmp_path / "out.gguf", {"a.weight": torch.tensor([1.0, bad])}, {"a.weight": 1}, "")
    with pytest.raises(ImportanceError, match=r"a\.weight"):
        read_importance(tmp_path / "out.gguf")


def test_a_gguf_file_of_something_else_is_refused(tmp_path):
    save_file({NAME: torch.randn(256, 512)}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(ImportanceError, match="holds no importance"):
        read_importance(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [("another.weight", 512, "knows none of the 2 matrices"), (NAME, 256, rf"256 columns for '{NAME}', which has 512")],
)
def test_importance_of_another_model_is_refused(tmp_path, name, columns, message):
    save_file(
        {NAME: torch.randn(256, 512), "double_blocks.0.a.weight": torch.randn(8, 512)}, tmp_path / "m.safetensors"
    )
    write_importance(tmp_path / "imatrix.gguf", {name: torch.ones(columns)}, {name: 1}, "")
    with pytest.raises(ImportanceError, match=message):
        convert(tmp_path / "m.safetensors", tmp_path / "m.gguf", "Q4_K_M", importance=tmp_path / "imatrix.gguf")


def test_matrices_without_importance_are_counted(tmp_path, caplog):
    save_file(
        {NAME: torch.randn(256, 512), "double_blocks.0.a.weight": torch.randn(8, 512)}, tmp_path / "m.safetensors"
    )
    write_importance(tmp_path / "imatrix.gguf", {NAME: torch.ones(512)}, {NAME: 1}, "")
    with caplog.at_level(logging.WARNING, "gguf_native"):
        convert(tmp_path / "m.safetensors", tmp_path / "m.gguf", "Q4_K_M", importance=tmp_path / "imatrix.gguf")
    assert "imatrix.gguf knows 1 of 2 matrices" in caplog.text
    with open_gguf(tmp_path / "m.gguf") as file:
        assert '"importance": "imatrix.gguf"' in file.metadata["gguf_native.recipe"]
