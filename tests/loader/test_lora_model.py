"""LoRAs of every kind beside packed weights: the latent is that of the host's own LoRA on the decoded weights.

On the CPU, and with TEST_DEVICE=cuda on a GPU.
"""

import functools

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
from adapters import ADAPTERS, KEY_STYLES, LOW_RANK, RANK, values
from comfy.model_patcher import ModelPatcher
from comfy_extras import nodes_model_merging
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.lora import LoraMismatchError, apply_lora
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.nodes.apply_lora import LoraLoaderGGUF
from lora_models import (
    BOUND,
    DEVICE,
    FLUX,
    LAYERS,
    SD15,
    adapter_file,
    assert_same,
    by_the_host,
    loaded,
    loaded_in_part,
    packed,
    predict,
    with_lora,
)
from safetensors.torch import save_file
from sampling import relative_error, sample

# Flux in Q8_0 has img_in packed too, which LoRAs of BFL change.
FAMILIES = {"flux": ("tiny_flux_256", "Q8_0"), "sd15": SD15, "sd3": ("tiny_sd3", "Q6_K"), "wan": ("tiny_wan", "Q8_0")}
# A convolution is decoded for every call in any case: its LoRAs go the way of the other adapters.
OF_CONVOLUTIONS = ("tucker", "loha tucker")
NOT_OF_CONVOLUTIONS = ("alpha", "dora of columns", "loha with dora", "lokr with dora", "old glora", "oft with alpha")
CASES = [(FLUX, adapter) for adapter in ADAPTERS if adapter not in OF_CONVOLUTIONS]
CASES += [(SD15, adapter) for adapter in ADAPTERS if adapter not in NOT_OF_CONVOLUTIONS]
CASES += [(FAMILIES[family], style) for style, (family, _) in KEY_STYLES.items()]


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture(params=["complete", "in part", "dynamic"])
def run(request):
    """Function (patcher, name of the sample) -> latent, in one memory mode.

    complete: without DynamicVRAM, all loaded, as on a CPU and on a GPU that has the room. in part: the same on one that
    has not. dynamic: DynamicVRAM's patcher.
    """
    if request.param == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    if request.param == "in part":
        return lambda patcher, name: predict(loaded_in_part(patcher), name)
    return lambda patcher, name: sample(patcher, name, steps=1)


@pytest.fixture(scope="module")
def expected(samples):
    """Function (model, adapter, loaded in part) -> (latent of the host with the LoRA, without it), computed once."""

    host_model = functools.cache(lambda model: by_the_host(samples, model))

    @functools.cache
    def latents(model, adapter, in_part):
        base = host_model(model)
        lora = with_lora(base, adapter_file(samples, model, adapter))
        if not in_part:
            return sample(lora, model[0], steps=1), sample(base, model[0], steps=1)
        return tuple(predict(loaded(patcher), model[0]) for patcher in (lora, base))

    return latents


def assert_nothing_merged(patcher: ModelPatcher, n_packed: int) -> None:
    layers = packed_layers(patcher.model)
    assert len(layers) == n_packed
    for layer in layers.values():
        assert not any(getattr(f, "is_lowvram_patch", False) for f in layer.weight_function)
        assert getattr(layer, "weight_lowvram_function", None) is None


@pytest.mark.parametrize(("model", "adapter"), CASES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_latent_is_that_of_the_host_with_the_lora(samples, expected, request, run, model, adapter):
    mode = request.node.callspec.params["run"]
    if (mode, adapter, DEVICE.type) == ("dynamic", "bias", "cpu"):
        pytest.skip("on a CPU the host itself does not patch plain tensors under DynamicVRAM")
    base = packed(samples, model)
    n_packed = len(packed_layers(base.model))
    blocks = {key: layer.weight._qdata.clone() for key, layer in packed_layers(base.model).items()}
    assert base.is_dynamic() == (mode == "dynamic")

    lora = with_lora(base, adapter_file(samples, model, adapter))
    latent = run(lora, model[0])
    with_it, without_it = expected(model, adapter, mode == "in part")
    assert relative_error(latent, with_it) < BOUND
    assert relative_error(with_it, without_it) > 5 * BOUND
    assert_nothing_merged(lora, n_packed)
    layers = packed_layers(lora.model)
    for key in lora.patches.keys() & layers.keys():
        assert layers[key].side_path is not None
        if adapter in ADAPTERS:
            is_matrix = len(layers[key].weight.shape) == 2
            assert (layers[key].side_path.low_rank is not None) == (is_matrix and adapter in LOW_RANK)

    assert_same(run(base, model[0]), without_it)
    assert_nothing_merged(base, n_packed)
    assert all(layer.side_path is None for layer in packed_layers(base.model).values())
    for key, layer in packed_layers(base.model).items():
        assert torch.equal(layer.weight._qdata.cpu(), blocks[key])


def path_shape(patcher: ModelPatcher, layer: str) -> tuple[int, ...]:
    return tuple(packed_layers(patcher.model)[f"diffusion_model.{layer}.weight"].weight.shape)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.0])
def test_strength(samples, strength):
    lora = adapter_file(samples, FLUX, "alpha")
    base = packed(samples, FLUX)
    without = sample(base, FLUX[0], steps=1)
    latent = sample(with_lora(base, lora, strength), FLUX[0], steps=1)
    assert relative_error(latent, sample(with_lora(by_the_host(samples, FLUX), lora, strength), FLUX[0], 1)) < BOUND
    assert torch.equal(latent, without) == (strength == 0)


def test_two_loras_are_one_pair_of_factors(samples):
    first, second = adapter_file(samples, FLUX, "lora"), adapter_file(samples, FLUX, "alpha", seed=100)
    base, reference = packed(samples, FLUX), by_the_host(samples, FLUX)
    both = with_lora(with_lora(base, first), second, 0.7)
    latent = sample(both, FLUX[0], steps=1)
    assert relative_error(latent, sample(with_lora(with_lora(reference, first), second, 0.7), FLUX[0], 1)) < BOUND
    for layer in LAYERS[FLUX]:
        low_rank = packed_layers(both.model)[f"diffusion_model.{layer}.weight"].side_path.low_rank
        out, into = path_shape(both, layer)
        assert low_rank.down.shape == (2 * RANK, into)
        assert low_rank.up.shape == (out, 2 * RANK)


def test_lora_and_another_adapter_on_the_same_weights(samples):
    first, second = adapter_file(samples, FLUX, "lora"), adapter_file(samples, FLUX, "loha", seed=100)
    both = with_lora(with_lora(packed(samples, FLUX), first), second)
    expected = with_lora(with_lora(by_the_host(samples, FLUX), first), second)
    assert relative_error(sample(both, FLUX[0], steps=1), sample(expected, FLUX[0], steps=1)) < BOUND


@pytest.mark.parametrize("adapter", ["lora", "lokr"])
def test_on_and_off_and_on_again(samples, adapter):
    base = packed(samples, FLUX)
    lora = with_lora(base, adapter_file(samples, FLUX, adapter))
    stronger = with_lora(base, adapter_file(samples, FLUX, adapter), 2.0)
    off, on = sample(base, FLUX[0], steps=1), sample(lora, FLUX[0], steps=1)
    changed = sample(stronger, FLUX[0], steps=1)
    assert not torch.equal(changed, on)
    assert torch.equal(sample(base, FLUX[0], steps=1), off)
    assert torch.equal(sample(lora, FLUX[0], steps=1), on)
    assert torch.equal(sample(stronger, FLUX[0], steps=1), changed)


def test_patches_added_to_a_loaded_model_count(samples):
    lora = with_lora(packed(samples, FLUX), adapter_file(samples, FLUX, "lora"))
    once = sample(lora, FLUX[0], steps=1)
    for key, patches in list(lora.patches.items()):
        lora.add_patches({key: patches[0][1]}, 1.0)
    twice = sample(lora, FLUX[0], steps=1)
    expected = with_lora(by_the_host(samples, FLUX), adapter_file(samples, FLUX, "lora"), 2.0)
    assert not torch.equal(twice, once)
    assert relative_error(twice, sample(expected, FLUX[0], steps=1)) < BOUND


def test_unloaded_model_keeps_no_lora(samples):
    lora = with_lora(packed(samples, FLUX), adapter_file(samples, FLUX, "lora"))
    sample(lora, FLUX[0], steps=1)
    assert any(layer.side_path for layer in packed_layers(lora.model).values())
    lora.detach()
    assert not any(layer.side_path for layer in packed_layers(lora.model).values())


def test_slices_of_a_fused_matrix_are_one_pair_of_factors(samples):
    """Files for diffusers name q, k and v of Flux apart; ComfyUI has them in one matrix."""
    lora = with_lora(packed(samples, FLUX), adapter_file(samples, FLUX, "diffusers"))
    loaded(lora)
    fused = packed_layers(lora.model)["diffusion_model.double_blocks.0.img_attn.qkv.weight"].side_path.low_rank
    assert fused.down.shape == (3 * RANK, 256)
    assert fused.up.shape == (768, 3 * RANK)


@pytest.mark.parametrize("mode", ["complete", "dynamic"])
def test_lora_that_widens_a_matrix(samples, request, mode):
    """Flux control LoRAs double the channels of img_in; the host reads the new number off the weight."""
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    model = ("tiny_flux_256", "Q8_0")
    lora = {
        "diffusion_model.img_in.lora_A.weight": values("down", (RANK, 128), 1),
        "diffusion_model.img_in.lora_B.weight": values("lora_up.weight", (256, RANK), 2),
        "diffusion_model.img_in.reshape_weight": torch.tensor([256, 128]),
    }
    base = packed(samples, model)
    n_packed = len(packed_layers(base.model))
    off = sample(base, model[0], steps=1)
    on = sample(with_lora(base, lora), model[0], steps=1)
    assert base.model.diffusion_model.img_in.weight.shape == (256, 128)
    reference = with_lora(by_the_host(samples, model), lora)
    assert relative_error(on, sample(reference, model[0], steps=1)) < BOUND
    assert relative_error(on, off) > 5 * BOUND
    assert torch.equal(sample(base, model[0], steps=1), off)
    assert len(packed_layers(base.model)) == n_packed


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("packed_one", [1, 2, "both"])
def test_merge_of_two_models(samples, packed_one, ratio):
    """ModelMergeSimple of GGUF and safetensors in either order; the other model has the weights in another type."""
    other = (FLUX[0], "Q8_0")
    dense = [by_the_host(samples, FLUX), by_the_host(samples, other)]
    mixed = list(dense)
    if packed_one in (1, "both"):
        mixed[0] = packed(samples, FLUX)
    if packed_one in (2, "both"):
        mixed[1] = packed(samples, other)
    merge = nodes_model_merging.ModelMergeSimple().merge
    latent = sample(merge(*mixed, ratio)[0], FLUX[0], steps=1)
    assert relative_error(latent, sample(merge(*dense, ratio)[0], FLUX[0], steps=1)) < 1e-5
    assert_same(sample(mixed[0], FLUX[0], 1), sample(dense[0], FLUX[0], 1))


def test_nodes_of_host_and_pack_take_the_same_path(samples, lora_folder):
    lora = adapter_file(samples, FLUX, "alpha")
    save_file(lora, lora_folder / "first.safetensors")
    base = packed(samples, FLUX)
    by_host = sample(with_lora(base, lora, 0.8), FLUX[0], steps=1)
    by_loader = apply_lora(base, None, str(lora_folder / "first.safetensors"), 0.8, 0)[0]
    by_node = LoraLoaderGGUF.execute(base, lora_1="first.safetensors", strength_model_1=0.8, lora_2="none").args
    assert torch.equal(sample(by_loader, FLUX[0], steps=1), by_host)
    assert torch.equal(sample(by_node[0], FLUX[0], steps=1), by_host)
    assert by_node[1] is None


def test_node_without_an_effect_gives_the_model_back(samples, lora_folder):
    save_file(adapter_file(samples, FLUX, "lora"), lora_folder / "first.safetensors")
    base = packed(samples, FLUX)
    off = LoraLoaderGGUF.execute(base, lora_1="first.safetensors", strength_model_1=0, strength_clip_1=0)
    assert off.args[0] is base
    # The text encoder's strength stays at 1 where none is connected.
    assert LoraLoaderGGUF.execute(base, lora_1="first.safetensors", strength_model_1=0).args[0] is base
    # With one, the file is read, and the model stays as it is too.
    assert apply_lora(base, None, str(lora_folder / "first.safetensors"), 0, 1)[0] is base


def test_lora_of_another_model_is_named(samples):
    base = packed(samples, FLUX)
    with pytest.raises(LoraMismatchError) as error:
        apply_lora(base, None, str(samples.sample("tiny_clip_l_lora")), 1.0, 1.0)
    for part in ("tiny_clip_l_lora.safetensors", "lora_te1_text_model_encoder_layers_0", "Flux model.", "choose"):
        assert part in str(error.value)


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr"])
@pytest.mark.parametrize(("patch_dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_patch_dtype_and_device(samples, adapter, patch_dtype, bound):
    lora = adapter_file(samples, FLUX, adapter)
    path = str(samples.gguf(*FLUX))
    exact = sample(with_lora(load_diffusion_model(path), lora), FLUX[0], steps=1)
    model = with_lora(load_diffusion_model(path, patch_dtype=patch_dtype, patch_on_device=True), lora)
    latent = sample(model, FLUX[0], steps=1)
    assert relative_error(latent, exact) < bound
    assert torch.equal(latent, exact) == (patch_dtype == torch.float32)
    for layer in LAYERS[FLUX] if adapter == "lora" else ():
        low_rank = packed_layers(model.model)[f"diffusion_model.{layer}.weight"].side_path.low_rank
        assert low_rank.up.dtype == low_rank.down.dtype == patch_dtype


@pytest.mark.parametrize("adapter", ["lora", "loha"])
def test_saved_model_has_the_lora_in_it(samples, tmp_path, adapter):
    model = with_lora(packed(samples, FLUX), adapter_file(samples, FLUX, adapter))
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert relative_error(sample(saved, FLUX[0], 1), sample(model, FLUX[0], 1)) < BOUND
