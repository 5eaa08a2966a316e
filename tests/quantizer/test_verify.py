"""`verify` finds what is damaged in a sound header's tensors, and how far a file is from its original."""

import json
import subprocess
import sys

import pytest
import torch
from gguf_bytes import F32, model
from gguf_native.__main__ import main
from gguf_native.loader import open_gguf
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer import checks
from gguf_native.quantizer.compare import allowed_error
from gguf_native.quantizer.measure import type_error
from gguf_native.quantizer.verify import verify
from host.environment import ROOT
from safetensors.torch import load_file, save_file
from samples import random_blocks, set_half

ROWS, COLUMNS = 64, 512


def blocks_of(name="Q4_K"):
    return random_blocks(name, ROWS * COLUMNS // FORMATS[name].block_size)


def write(path, blocks, name="Q4_K"):
    """A file of one matrix beside a bias of zeros, which is nothing unusual."""
    dims = (COLUMNS, ROWS)
    tensors = {"a.weight": (dims, FORMATS[name].number, blocks.numpy().tobytes()), "a.bias": ((4,), F32, bytes(16))}
    path.write_bytes(model(tensors))
    return path


def with_scale(value, name="Q4_K", block=17):
    """The blocks with one scale replaced."""
    blocks = blocks_of(name)
    one = blocks[block : block + 1]
    set_half(name, one, 0, torch.tensor([value]).half())
    return blocks


DAMAGE = {
    "not finite": with_scale(float("nan")),
    "absurd": with_scale(60000.0),
    "wild scale": with_scale(50.0),
    "all zero": torch.zeros_like(blocks_of()),
}


def faults(path):
    with open_gguf(path) as file:
        return verify(file).faults


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ4_XS", "TQ1_0", "F16"])
def test_a_sound_file_has_no_faults(tmp_path, name):
    assert faults(write(tmp_path / "a.gguf", blocks_of(name), name)) == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_where_it_is(tmp_path, kind):
    found = {fault.check: fault for fault in faults(write(tmp_path / "a.gguf", DAMAGE[kind]))}
    fault = found[kind]
    assert fault.tensor == "a.weight"
    expected = (ROWS * COLUMNS, 0) if kind == "all zero" else (256, 17 * 256)
    if kind == "absurd":
        assert 0 < fault.values <= 256 and 17 * 256 <= fault.first < 18 * 256
    else:
        assert (fault.values, fault.first) == expected


def test_slices_add_up(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", with_scale(float("nan"), block=100))
    whole = faults(path)
    monkeypatch.setattr(checks, "SLICE", 1024)
    assert faults(path) == whole
    assert whole[0].first == 100 * 256


def test_a_bias_of_zeros_and_integers_are_nothing_unusual(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(model({"ids": ((4, 2), FORMATS["I32"].number, bytes(32)), "b.bias": ((4,), F32, bytes(16))}))
    assert faults(path) == []


def status(*words):
    return main(["verify", *map(str, words)])


def test_exit_statuses(tmp_path, samples, capsys):
    whole = samples.gguf("tiny_flux", "Q4_K")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert status(whole) == 0
    assert status(write(tmp_path / "nan.gguf", DAMAGE["not finite"])) == 1
    assert status(cut) == 1
    assert "bytes are missing" in capsys.readouterr().err
    assert status(tmp_path / "absent.gguf") == 2
    assert status(samples.sample("tiny_flux")) == 2
    assert status(whole, "--against", tmp_path / "absent.safetensors") == 2


def test_exit_status_of_the_program(tmp_path):
    path = write(tmp_path / "nan.gguf", DAMAGE["not finite"])
    done = subprocess.run([sys.executable, ROOT, "verify", path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "256 of 32,768 values are NaN or infinite, the first is number 4,352" in done.stdout


def test_against_the_original_every_tensor_fits(samples, capsys):
    file, original = samples.gguf("tiny_flux", "Q4_K"), samples.sample("tiny_flux")
    assert status(file, "--against", original, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    comparison = report["comparison"]
    assert report["fine"] and not (comparison["missing"] or comparison["extra"] or comparison["shapes"])
    errors = {one["tensor"]: one["error"] for one in comparison["differences"]}
    assert errors.keys() == load_file(original).keys()
    assert errors["double_blocks.0.img_mlp.0.weight"] == pytest.approx(0.0714, rel=0.02)
    assert errors["double_blocks.0.img_mlp.0.bias"] == 0


def test_names_of_llama_cpp_are_those_of_the_original(samples):
    assert status(samples.gguf("tiny_t5", "Q4_K", "llama.cpp"), "--against", samples.sample("tiny_t5")) == 0


def test_convolutions_are_compared_in_their_own_shape(samples):
    assert status(samples.gguf("tiny_sd15", "Q8_0"), "--against", samples.sample("tiny_sd15")) == 0


def test_a_checkpoint_is_compared_by_its_part(samples, tmp_path):
    tensors = {f"model.diffusion_model.{name}": t for name, t in load_file(samples.sample("tiny_sd15")).items()}
    save_file(tensors | {"first_stage_model.decoder.conv_in.weight": torch.ones(2)}, tmp_path / "all.safetensors")
    assert status(samples.gguf("tiny_sd15", "Q8_0"), "--against", tmp_path / "all.safetensors") == 0


def altered(tensors, change):
    key, tensors = "double_blocks.1.img_attn.qkv.weight", dict(tensors)
    return key, change(key, tensors)


CHANGES = {
    "differences": lambda key, tensors: tensors | {key: -tensors[key]},
    "extra": lambda key, tensors: {name: tensor for name, tensor in tensors.items() if name != key},
    "missing": lambda key, tensors: tensors | {f"{key}.more": torch.ones(4)},
    "shapes": lambda key, tensors: tensors | {key: tensors[key][:-1].clone()},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_difference_from_the_original_is_named(samples, tmp_path, capsys, what):
    key, tensors = altered(load_file(samples.sample("tiny_flux")), CHANGES[what])
    save_file(tensors, tmp_path / "original.safetensors")
    words = samples.gguf("tiny_flux", "Q4_K"), "--against", tmp_path / "original.safetensors"
    assert status(*words, "--json") == 1
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    if what == "differences":
        too_much = [one for one in comparison[what] if one["too_much"]]
        assert [(one["tensor"], round(one["error"])) for one in too_much] == [(key, 2)]
    else:
        assert len(comparison[what]) == 1 and comparison[what][0].startswith(key)
    assert status(*words) == 1
    assert key in capsys.readouterr().out


def test_an_original_that_is_not_finite_is_too_much(samples, tmp_path, capsys):
    tensors = load_file(samples.sample("tiny_flux"))
    tensors["img_in.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "original.safetensors")
    words = samples.gguf("tiny_flux", "Q4_K"), "--against", tmp_path / "original.safetensors"
    assert status(*words) == 1
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("img_in.weight"))
    assert "not finite" in first


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K"])
def test_more_than_five_times_the_error_of_a_type_is_a_problem(name):
    """As docs/looking.md says."""
    assert allowed_error(name) == pytest.approx(5 * type_error(name))
