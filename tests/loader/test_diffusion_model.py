"""Diffusion models from GGUF: the latent is that of ComfyUI's own loader given the same decoded weights."""

import os
import re
from pathlib import Path

import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
from safetensors.torch import load_file

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
import comfy.utils
from gguf_native.loader import state_dict
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.errors import (
    FileUnreadableError,
    IncompleteModelError,
    OriginalShapeError,
    TruncatedFileError,
    UnknownModelError,
    WrongShapeError,
)
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.ops.formats import FORMATS
from host import quantise
from sampling import relative_error, sample

NUMBERS = ("F64", "I8", "I16", "I32", "I64")
QUANTISED = [name for name in FORMATS if name not in ("F32", "F16", "BF16", *NUMBERS)]
# Every type in a model whose rows fit them all, and other kinds of models.
MODELS = [
    ("tiny_flux", "Q6_K"),
    ("tiny_sd3", "Q5_K"),
    ("tiny_wan", "Q3_K"),
    ("tiny_sd15", "Q8_0"),
    ("tiny_sd15", "Q4_K"),
    *(("tiny_flux_256", name) for name in FORMATS if name not in NUMBERS),
]


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


def by_the_host(tensors) -> ModelPatcher:
    """The model that ComfyUI's own loader makes of dense tensors."""
    return comfy.sd.load_diffusion_model_state_dict({key: tensor.float() for key, tensor in dict(tensors).items()})


@pytest.fixture
def write_gguf(tmp_path):
    def write(tensors: dict, metadata: dict | None = None, architecture: str = "flux") -> str:
        """A GGUF file of {name: tensor, or (blocks uint8 [rows, bytes], type name)}; halves are stored as F32."""
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (metadata or {}).items():
            writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
        for name, value in tensors.items():
            if isinstance(value, tuple):
                blocks, type_name = value
                writer.add_tensor(name, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType[type_name])
            else:
                is_half = value.dtype in (torch.float16, torch.bfloat16)
                writer.add_tensor(name, (value.float() if is_half else value).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    return write


@pytest.mark.parametrize(("name", "type_name"), MODELS)
def test_latent_is_that_of_the_decoded_weights(samples, name, type_name):
    path = samples.gguf(name, type_name)
    model = load_diffusion_model(str(path))
    expected = by_the_host(quantise.decoded_tensors(path))
    assert bool(packed_layers(model.model)) == (type_name in QUANTISED)
    assert model.model.get_dtype() == expected.model.get_dtype()
    latent = sample(model, name, steps=1)
    assert latent.isfinite().all()
    assert torch.equal(latent, sample(expected, name, steps=1))


def test_packed_weights_are_views_of_the_file(samples):
    path = samples.gguf("tiny_flux_256", "Q4_K")
    model = load_diffusion_model(str(path))
    layers = packed_layers(model.model)
    assert sum(layer.weight.nbytes for layer in layers.values()) < path.stat().st_size
    assert model.model_size() < 1.5 * path.stat().st_size


@pytest.mark.parametrize(("dequant_dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_decode_dtype_rounds_the_weights(samples, dequant_dtype, bound):
    path = str(samples.gguf("tiny_flux_256", "Q4_K"))
    exact = sample(load_diffusion_model(path), "tiny_flux_256")
    rounded = sample(load_diffusion_model(path, decode_dtype=dequant_dtype), "tiny_flux_256")
    assert 0 < relative_error(rounded, exact) < bound


def test_prefix_of_a_checkpoint_is_taken_off(samples, write_gguf):
    path = str(samples.sample("tiny_flux_256"))
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in load_file(path).items()}
    model = load_diffusion_model(write_gguf(tensors, architecture="a tag nobody knows"))
    assert torch.equal(sample(model, "tiny_flux_256"), sample(comfy.sd.load_diffusion_model(path), "tiny_flux_256"))


def test_dynamic_vram_is_kept(samples, dynamic_vram_on_cpu):
    model = load_diffusion_model(str(samples.gguf("tiny_flux_256", "Q4_K")))
    expected = by_the_host(quantise.decoded_tensors(samples.gguf("tiny_flux_256", "Q4_K")))
    assert isinstance(model, ModelPatcherDynamic)
    assert model.is_dynamic()
    assert torch.equal(sample(model, "tiny_flux_256"), sample(expected, "tiny_flux_256"))
    assert model.loaded_size() > 0


def test_dynamic_weights_carry_their_slice_of_the_file(samples, dynamic_vram_on_cpu):
    path = samples.gguf("tiny_flux_256", "Q4_K")
    model = load_diffusion_model(str(path))
    data = path.read_bytes()
    for layer in packed_layers(model.model).values():
        storage = layer.weight._qdata.untyped_storage()
        piece = storage._comfy_tensor_file_slice
        assert piece.size == layer.weight.nbytes == storage.nbytes()
        assert data[piece.offset : piece.offset + piece.size] == layer.weight._qdata.numpy().tobytes()


def test_clone_without_dynamic_vram(samples, dynamic_vram_on_cpu):
    model = load_diffusion_model(str(samples.gguf("tiny_flux_256", "Q4_K")))
    clone = model.clone(disable_dynamic=True)
    assert not clone.is_dynamic()
    assert torch.equal(sample(clone, "tiny_flux_256"), sample(model, "tiny_flux_256"))


@pytest.mark.parametrize("name", ["tiny_flux_256", "tiny_sd15"])
def test_saved_checkpoint_loads_in_the_host(samples, tmp_path, name):
    model = load_diffusion_model(str(samples.gguf(name, "Q8_0")))
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert torch.equal(sample(saved, name), sample(model, name))


def test_torch_compile_has_no_break_in_a_linear(samples):
    model = load_diffusion_model(str(samples.gguf("tiny_flux_256", "Q5_K")))
    sample(model, "tiny_flux_256", steps=1)
    with torch.inference_mode(False), torch.no_grad():
        layer = next(iter(packed_layers(model.model).values()))
        x = torch.randn(3, layer.in_features)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_unknown_model_is_named(samples, write_gguf):
    with pytest.raises(UnknownModelError) as error:
        load_diffusion_model(write_gguf({"first.weight": torch.ones(4, 4), "second.bias": torch.ones(4)}))
    for part in ("model.gguf", "first.weight, second.bias", "'flux'", "model.diffusion_model."):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("double_blocks.1.img_mlp.2.weight", "double_blocks.1.img_mlp.2.weight"),
        ("double_blocks.1.img_mlp.2.bias", "double_blocks.1.img_mlp.2.bias"),
        ("double_blocks.1.img_attn.norm.query_norm.scale", "double_blocks.1.img_attn.norm.query_norm.weight"),
    ],
)
def test_missing_tensor_is_named(samples, write_gguf, given, named):
    tensors = load_file(samples.sample("tiny_flux_256"))
    del tensors[given]
    with pytest.raises(IncompleteModelError, match=re.escape(named)):
        load_diffusion_model(write_gguf(tensors))


@pytest.mark.parametrize(
    ("given", "shape", "named"),
    [
        ("img_mlp.2.weight", (256, 512), "img_mlp.2.weight' has shape [256, 512]; the model needs [256, 1024]"),
        ("img_attn.qkv.bias", (1,), "img_attn.qkv.bias' has shape [1]; the model needs [768]"),
        ("img_attn.norm.key_norm.scale", (64,), "img_attn.norm.key_norm.weight' has shape [64]; the model needs [128]"),
    ],
)
def test_wrong_shape_is_named(samples, write_gguf, given, shape, named):
    tensors = load_file(samples.sample("tiny_flux_256"))
    tensors[f"double_blocks.1.{given}"] = torch.ones(shape)
    with pytest.raises(WrongShapeError, match=re.escape(named)):
        load_diffusion_model(write_gguf(tensors))


@pytest.mark.parametrize("shape", [[3, 5], [-1, -65536], [2**30, 2**30], [], ["a"]])
def test_impossible_original_shape_is_refused(samples, write_gguf, shape):
    metadata = {"comfy.gguf.orig_shape.img_in.weight": shape or ["x"]}
    with pytest.raises(OriginalShapeError, match=r"img_in\.weight"):
        load_diffusion_model(write_gguf(load_file(samples.sample("tiny_flux_256")), metadata))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int16, torch.int32, torch.int64])
def test_double_and_integer_tensors_are_numbers(samples, write_gguf, dtype):
    tensors = load_file(samples.sample("tiny_flux_256"))
    key = "double_blocks.0.img_mlp.0.bias"
    tensors[key] = (tensors[key].float() * 40).to(dtype)
    model = load_diffusion_model(write_gguf(tensors))
    assert tensors[key].any()
    assert torch.equal(sample(model, "tiny_flux_256", 1), sample(by_the_host(tensors), "tiny_flux_256", 1))


def test_leading_ones_that_ggml_drops_come_back(samples, write_gguf):
    tensors = load_file(samples.sample("tiny_wan"))
    squeezed = {key: t[0] if key.endswith(".modulation") else t for key, t in tensors.items()}
    model = load_diffusion_model(write_gguf(squeezed))
    expected = comfy.sd.load_diffusion_model(str(samples.sample("tiny_wan")))
    assert torch.equal(sample(model, "tiny_wan"), sample(expected, "tiny_wan"))


def test_shape_comes_from_the_model_when_the_file_lost_it(samples, write_gguf):
    tensors = load_file(samples.sample("tiny_sd15"))
    key = "middle_block.0.in_layers.2.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    flat = tensors[key].float().reshape(-1, 256).numpy()
    blocks = quantise.encode(flat, kind)
    packed = write_gguf({**tensors, key: (torch.from_numpy(blocks), "Q8_0")}, architecture="sd1")
    model = load_diffusion_model(packed)
    values = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).reshape(tensors[key].shape)
    expected = by_the_host({**tensors, key: values})
    assert torch.equal(sample(model, "tiny_sd15"), sample(expected, "tiny_sd15"))


def test_quantised_bare_parameter_works(samples, write_gguf):
    tensors = load_file(samples.sample("tiny_wan"))
    key = "blocks.0.modulation"
    blocks = torch.from_numpy(quantise.encode(tensors[key].float().numpy()[0], gguf.GGMLQuantizationType.Q8_0))
    model = load_diffusion_model(write_gguf({**tensors, key: (blocks, "Q8_0")}))
    values = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q8_0))[None]
    expected = by_the_host({**tensors, key: values})
    assert torch.equal(sample(model, "tiny_wan"), sample(expected, "tiny_wan"))


def test_a_file_that_shrinks_while_it_is_read_up_front_is_named(write_gguf, monkeypatch):
    path = Path(write_gguf({"img_in.weight": torch.ones(8, 8), "txt_in.weight": torch.ones(8, 8)}))
    opened = state_dict.open_gguf(path)
    os.truncate(path, path.stat().st_size - 100)
    monkeypatch.setattr(state_dict, "open_gguf", lambda path: opened)
    with pytest.raises(TruncatedFileError, match=r"model.gguf: ends 100 bytes early in tensor 'txt_in.weight'"):
        state_dict.read_state_dict(str(path), streaming=False)
    with pytest.raises(FileUnreadableError, match=r"model.gguf: was replaced or cut while it was read"):
        state_dict.read_state_dict(str(path), streaming=True)


def test_a_file_that_is_replaced_while_it_is_read_is_named(write_gguf, tmp_path, monkeypatch):
    """By one of the same size, whose tensors lie elsewhere."""
    path = Path(write_gguf({"img_in.weight": torch.ones(8, 8), "txt_in.weight": torch.ones(8, 8)}))
    opened, first = state_dict.open_gguf(path), path.read_bytes()
    path.rename(tmp_path / "before.gguf")
    path.write_bytes(first.replace(b"txt_in", b"any_in"))
    monkeypatch.setattr(state_dict, "open_gguf", lambda path: opened)
    with pytest.raises(FileUnreadableError, match=r"model.gguf: was replaced or cut while it was read"):
        state_dict.read_state_dict(str(path), streaming=True)
    path.write_bytes(first)
    assert state_dict.read_state_dict(str(path), streaming=True)[0].keys() == opened.tensors.keys()
