"""Inputs of the converter from torch.save: what they may hold, and broken ones."""

import zipfile

import pytest
import torch
from gguf_native.quantizer.errors import SourceError
from gguf_native.quantizer.sources import open_source
from source_values import assert_same, matrix, values


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "params_ema"])
def test_torch_checkpoints(tmp_path, wrapper):
    tensors = {"a": matrix(4, 8), "b": matrix(3).half(), "strided": matrix(4, 6).t()}
    content = tensors if wrapper is None else {wrapper: tensors, "step": 3}
    torch.save(content, tmp_path / "model.pt")
    assert_same(values(tmp_path / "model.pt"), tensors)


def test_a_large_checkpoint_is_mapped_afresh(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_native.quantizer.torch_file.MAPPED_BYTES", 100)
    tensors = {str(number): matrix(64, seed=number) for number in range(8)}
    torch.save(tensors, tmp_path / "model.ckpt")
    assert_same(values(tmp_path / "model.ckpt"), tensors)


class Payload:
    def __reduce__(self):
        return (exit, ())


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {"a": matrix(2)}, "callbacks": Payload()}, tmp_path / "model.ckpt")
    with pytest.raises(SourceError, match="would run code"):
        open_source(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(SourceError, match=r"model\.pth"):
        open_source(tmp_path / "model.pth")


@pytest.mark.parametrize("tensors", [{0: matrix(4)}, {"a": matrix(4), 1: matrix(4)}, {"a": matrix(4, 4).to_sparse()}])
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"model\.pt: tensor .* must be dense and have a string as its name"):
        open_source(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_whose_pickle_is_cut_off_is_refused(tmp_path):
    torch.save({"state_dict": {"a": matrix(2)}}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    for length in range(len(parts[pickled])):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as cut:
            for name, content in parts.items():
                cut.writestr(name, content[:length] if name == pickled else content)
        with pytest.raises(SourceError, match=r"model\.pt: is damaged"):
            open_source(tmp_path / "model.pt")


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match="no tensors"):
        open_source(tmp_path / "model.pt")
