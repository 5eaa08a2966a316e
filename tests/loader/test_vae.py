"""VAEs from GGUF: the picture is that of ComfyUI's own VAE given the same decoded weights."""

import functools

import gguf
import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
from comfy.model_patcher import ModelPatcherDynamic
from gguf_native.config import settings
from gguf_native.loader.errors import IncompleteModelError, UnknownModelError, WrongShapeError
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.loader.vae import load_vae
from gguf_native.ops.formats import FORMATS
from host import quantise
from safetensors.torch import load_file, save_file
from sampling import normal

# For each sample: shape of a latent, and of a picture or video if the sample has an encoder.
VAES = {
    "tiny_flux_vae": ((1, 16, 4, 4), None),
    "tiny_sd15_vae": ((1, 4, 4, 4), None),
    "tiny_flux_taesd": ((1, 16, 4, 4), (1, 32, 32, 3)),
    "tiny_wan_vae": ((1, 16, 2, 3, 4), (5, 16, 24, 3)),
}
CASES = [(name, "Q8_0") for name in VAES] + [
    ("tiny_flux_vae", "Q4_K"),
    ("tiny_wan_vae", "Q6_K"),
    ("tiny_sd15_vae", "F16"),
]
FLOATS = ("F32", "F16", "BF16")
# The one place of diffusers' names for each of ComfyUI's; blocks of the decoder count the other way round.
TO_DIFFUSERS = [
    ("decoder.up.0.", "decoder.up_blocks.3."),
    ("decoder.up.1.", "decoder.up_blocks.2."),
    ("decoder.up.2.", "decoder.up_blocks.1."),
    ("decoder.up.3.", "decoder.up_blocks.0."),
    (".block.", ".resnets."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.", "mid_block.attentions.0."),
    ("upsample.", "upsamplers.0."),
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
    ("attentions.0.norm.", "attentions.0.group_norm."),
    ("attentions.0.q.", "attentions.0.to_q."),
    ("attentions.0.k.", "attentions.0.to_k."),
    ("attentions.0.v.", "attentions.0.to_v."),
    ("attentions.0.proj_out.", "attentions.0.to_out.0."),
]


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture
def set_slicing(monkeypatch):
    """Function (on or off): the setting `vae_slicing`."""

    def set_to(value: str) -> None:
        monkeypatch.setenv("GGUF_NATIVE_VAE_SLICING", value)
        settings.cache_clear()

    yield set_to
    monkeypatch.undo()
    settings.cache_clear()


@functools.cache
def decoded_weights(path) -> dict[str, torch.Tensor]:
    return dict(quantise.decoded_tensors(path))


def by_the_host(path) -> comfy.sd.VAE:
    return comfy.sd.VAE(sd={key: tensor.clone() for key, tensor in decoded_weights(path).items()})


def packed_names(path) -> list[str]:
    """Keys of the tensors of a file that should stay packed."""
    tensors = gguf.GGUFReader(path).tensors
    return [tensor.name for tensor in tensors if tensor.tensor_type.name not in FLOATS]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("name", "type_name"), CASES)
def test_pictures_are_those_of_the_decoded_weights(samples, request, name, type_name, dynamic):
    path = samples.gguf(name, type_name)
    expected = by_the_host(path)
    if dynamic:
        request.getfixturevalue("dynamic_vram_on_cpu")
    vae = load_vae(str(path))
    assert isinstance(vae.patcher, ModelPatcherDynamic) == dynamic
    latent_shape, pixel_shape = VAES[name]
    latent = normal(*latent_shape, seed=1)
    picture = vae.decode(latent)
    assert picture.std() > 0
    assert torch.equal(picture, expected.decode(latent))
    if pixel_shape:
        pixels = torch.rand(pixel_shape, generator=torch.Generator().manual_seed(2))
        assert torch.equal(vae.encode(pixels), expected.encode(pixels))
    assert sorted(packed_layers(vae.first_stage_model)) == sorted(packed_names(path))


@pytest.mark.parametrize(("name", "type_name"), CASES)
def test_size_is_that_of_the_packed_weights(samples, name, type_name):
    path = samples.gguf(name, type_name)
    vae, dense = load_vae(str(path)), by_the_host(path)
    layers = packed_layers(vae.first_stage_model)
    saved = sum(layer.weight.numel() * dense.vae_dtype.itemsize - layer.weight.nbytes for layer in layers.values())
    assert (saved > 0) == (type_name not in FLOATS)
    assert vae.model_size() == vae.patcher.model_size() == dense.model_size() - saved


@pytest.mark.parametrize("name", ["tiny_flux_vae", "tiny_wan_vae"])
def test_saved_state_is_dense_and_loads(samples, name):
    path = samples.gguf(name, "Q8_0")
    vae = load_vae(str(path))
    state = vae.get_sd()
    weights = decoded_weights(path)
    for key in packed_names(path):
        assert torch.equal(state[key].float(), weights[key])
    latent = normal(*VAES[name][0], seed=1)
    again = comfy.sd.VAE(sd={key: state[key] for key in weights})
    assert torch.equal(again.decode(latent), vae.decode(latent))


@pytest.mark.parametrize("name", ["tiny_flux_vae", "tiny_wan_vae"])
def test_slicing_decodes_one_latent_at_a_time(samples, set_slicing, name):
    vae = load_vae(str(samples.gguf(name, "Q8_0")))
    latents = normal(2, *VAES[name][0][1:], seed=1)
    shapes = []
    decode = vae.first_stage_model.decode

    def recorded(samples, *args, **kwargs):
        shapes.append(len(samples))
        return decode(samples, *args, **kwargs)

    vae.first_stage_model.decode = recorded
    set_slicing("false")
    together = vae.decode(latents)
    assert shapes == [2]
    set_slicing("true")
    shapes.clear()
    assert relative_to_white(vae.decode(latents), together) < 1e-5
    assert shapes == [1, 1]


def relative_to_white(picture: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two pictures in 0..1."""
    assert picture.shape == expected.shape
    return float((picture - expected).abs().max())


def test_picture_too_big_for_the_memory_is_tiled(samples, set_slicing):
    vae = load_vae(str(samples.gguf("tiny_flux_taesd", "Q8_0")))
    latent = normal(1, 16, 2, 96, seed=1)
    tiles = []
    vae.decode_tiled_ = lambda *args, **kwargs: tiles.append(1) or type(vae).decode_tiled_(vae, *args, **kwargs)
    set_slicing("true")
    whole = vae.decode(latent)
    assert not tiles
    estimate = vae.memory_used_decode
    vae.memory_used_decode = lambda shape, dtype: 1e15
    tiled = vae.decode(latent)
    assert len(tiles) == 1
    # Tiles overlap from column 128 on, and this decoder sees a few latents to each side.
    assert relative_to_white(tiled[:, :, :100], whole[:, :, :100]) < 1 / 255
    assert relative_to_white(tiled, whole) < 4 / 255
    set_slicing("false")
    vae.memory_used_decode = estimate
    assert torch.equal(vae.decode(latent), whole)


def diffusers_name(key: str) -> str:
    for ours, theirs in TO_DIFFUSERS:
        key = key.replace(ours, theirs)
    return key


def test_names_of_diffusers(samples, tmp_path):
    """Their attention has matrices where ComfyUI has convolutions of one pixel: the blocks stay packed all the same."""
    tensors = load_file(samples.sample("tiny_sd15_vae"))
    renamed = {diffusers_name(key): tensor for key, tensor in tensors.items()}
    renamed = {key: t.flatten(1) if ".to_" in key and t.ndim == 4 else t for key, t in renamed.items()}
    save_file(renamed, tmp_path / "diffusers.safetensors")
    quantise.quantise(tmp_path / "diffusers.safetensors", tmp_path / "diffusers.gguf", "Q8_0", "vae")
    path = samples.gguf("tiny_sd15_vae", "Q8_0")
    vae = load_vae(str(tmp_path / "diffusers.gguf"))
    latent = normal(1, 4, 4, 4, seed=1)
    expected = by_the_host(tmp_path / "diffusers.gguf").decode(latent)
    assert torch.equal(vae.decode(latent), expected)
    assert torch.equal(load_vae(str(path)).decode(latent), expected)
    assert sorted(packed_layers(vae.first_stage_model)) == sorted(packed_names(path))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda tensors, key: tensors.pop(key), IncompleteModelError, r"vae\.gguf: lacks 1 of the 138 .*conv1\.weight"),
        (
            lambda tensors, key: tensors.update({key: torch.ones(64, 64, 1, 1)}),
            WrongShapeError,
            r"vae\.gguf: .*conv1\.weight",
        ),
    ],
)
def test_missing_and_wrong_tensors_are_named(samples, tmp_path, change, error, named):
    tensors = load_file(samples.sample("tiny_flux_vae"))
    change(tensors, "decoder.mid.block_1.conv1.weight")
    save_file(tensors, tmp_path / "vae.safetensors")
    quantise.quantise(tmp_path / "vae.safetensors", tmp_path / "vae.gguf", "Q8_0", "vae")
    with pytest.raises(error, match=f"(?s){named}"):
        load_vae(str(tmp_path / "vae.gguf"))


@pytest.mark.parametrize("name", ["tiny_flux_256", "tiny_clip_l"])
def test_other_model_is_no_vae(samples, name):
    with pytest.raises(UnknownModelError) as error:
        load_vae(str(samples.gguf(name, "Q8_0")))
    assert f"{name}-Q8_0.gguf: holds no VAE" in str(error.value)
    assert "UNet loader" in str(error.value)


def test_clone_without_dynamic_vram(samples, dynamic_vram_on_cpu):
    vae = load_vae(str(samples.gguf("tiny_flux_vae", "Q8_0")))
    clone = vae.patcher.clone(disable_dynamic=True)
    assert vae.patcher.is_dynamic()
    assert not clone.is_dynamic()
    assert packed_layers(clone.model).keys() == packed_layers(vae.first_stage_model).keys()


def test_block_formats_are_those_of_the_file(samples):
    vae = load_vae(str(samples.gguf("tiny_wan_vae", "Q6_K")))
    for layer in packed_layers(vae.first_stage_model).values():
        assert layer.weight.nbytes == layer.weight.numel() // FORMATS["Q6_K"].block_size * FORMATS["Q6_K"].block_bytes
