"""Inputs of the converter: safetensors in one file or many, and broken ones."""

import importlib.util
import json
import struct

import pytest
import torch
from gguf_native.quantizer import safetensors_file
from gguf_native.quantizer.errors import SourceError
from gguf_native.quantizer.sources import open_source
from source_values import assert_same, matrix, values


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool], ids=str
)
def test_every_dtype_is_read_as_it_is(save, dtype):
    tensors = {
        "a": (matrix(3, 5) * 100).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    assert_same(values(save(tensors)), tensors)


def test_metadata_is_read(save):
    assert open_source(save({"a": matrix(2, 2)}, metadata={"config": "{}"})).metadata == {"config": "{}"}


@pytest.fixture
def shards(save, tmp_path):
    """Two shards, their index, and all tensors."""
    parts = [{"a": matrix(4, 8), "b": matrix(3)}, {"c": matrix(5, 5)}]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save(part, name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts[0] | parts[1]


@pytest.mark.parametrize(
    "name", ["", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
)
def test_shards_are_read_together(shards, tmp_path, name):
    assert_same(values(tmp_path / name), shards)


def test_a_folder_of_shards_needs_no_index(shards, tmp_path):
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(values(tmp_path), shards)


def test_a_missing_shard_is_named(shards, tmp_path):
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for name in ("", "model-00001-of-00002.safetensors"):
        with pytest.raises(SourceError, match=r"1 of 2 shards are missing: model-00002-of-00002"):
            open_source(tmp_path / name)


def test_a_folder_with_two_models_is_not_guessed(save, tmp_path):
    save({"a": matrix(2)}, "one.safetensors")
    save({"a": matrix(2)}, "two.safetensors")
    with pytest.raises(SourceError, match=r"one\.safetensors, two\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[]", "no json"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="is not an index"):
        open_source(tmp_path)


@pytest.mark.parametrize("numbers", ["00001-of-00000", "00003-of-00002", "00000-of-00002"])
def test_shards_whose_numbers_cannot_be_are_refused(shards, save, numbers):
    with pytest.raises(SourceError, match=r"is shard \d of \d by its name"):
        open_source(save({"a": matrix(2)}, f"model-{numbers}.safetensors"))


@pytest.mark.parametrize("name", ["none.safetensors", "folder"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / name)


def header(entries: dict, data: bytes = bytes(64)) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 40) + b"{}",
        struct.pack("<Q", 8) + b"not json" + bytes(8),
        struct.pack("<Q", 3) + b"[1]" + bytes(8),
        header(entry(), b"cut"),
        header(entry(shape=(5,))),
        header(entry(shape=(-4,), offsets=(16, 0))),
        header(entry(shape=(2.0, 2))),
        header(entry(offsets=(0, 16, 32))),
        header(entry(shape=(1 << 62, 4))),
        header({"a": {"dtype": "F32"}}),
        header({"a": 3}),
        header(entry(dtype="F3")),
        header(entry(dtype=["F32"])),
        header(entry() | {"__metadata__": "text"}),
        header(entry() | {"__metadata__": ["text"]}),
        header({}),
        header({"__metadata__": {"format": "pt"}}),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, raw):
    (tmp_path / "broken.safetensors").write_bytes(raw)
    with pytest.raises(SourceError, match=r"broken\.safetensors"):
        open_source(tmp_path / "broken.safetensors")


def test_a_torch_without_a_dtype_reads_the_others(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    spec = importlib.util.spec_from_file_location(f"{safetensors_file.__name__}_again", safetensors_file.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.DTYPES.keys() == safetensors_file.DTYPES.keys() - {"F8_E8M0"}


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"\.safetensors.*\.gguf"):
        open_source(tmp_path / "model.onnx")
