"""LoRAs of every kind beside packed weights: the latent is that of the host's own LoRA on the decoded weights."""

import functools

import pytest
import torch
from adapters import ADAPTERS, KEY_STYLES, KOHYA, LOW_RANK, PEFT, RANK, pairs, tensors, values
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.hooks
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
from comfy_extras import nodes_hooks, nodes_model_merging
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.lora import LoraMismatchError, apply_lora
from gguf_native.loader.model_patcher import ModelPatcher as PackedPatcher
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.loader.text_encoder import load_text_encoder
from gguf_native.nodes.apply_lora import LoraLoaderGGUF
from host import quantise
from sampling import INPUTS, normal, relative_error, sample

BOUND = 1e-3
CPU = torch.device("cpu")
FLUX, SD15 = ("tiny_flux_256", "Q4_K"), ("tiny_sd15", "Q8_0")
LAYERS = {
    FLUX: ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.1.linear1"),
    SD15: (
        "input_blocks.1.0.in_layers.2",
        "middle_block.1.transformer_blocks.0.attn1.to_q",
        "middle_block.2.out_layers.3",
        "output_blocks.0.0.skip_connection",
    ),
}


# Of its size, that a model is given to be loaded in part; the host also reserves room for its largest weight, decoded.
SHARES = (0.6, 0.95, 3.5, 4, 5, 6, 7, 8)
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


@functools.cache
def decoded_weights(path) -> dict[str, torch.Tensor]:
    return dict(quantise.decoded_tensors(path))


def by_the_host(samples, model) -> ModelPatcher:
    """What ComfyUI's own loader makes of the same weights, decoded."""
    weights = {key: tensor.clone() for key, tensor in decoded_weights(samples.gguf(*model)).items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, disable_dynamic=True)


def packed(samples, model) -> ModelPatcher:
    return load_diffusion_model(str(samples.gguf(*model)))


def adapter_file(samples, model, adapter: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file: one adapter for each of LAYERS, or what the tool of a key style writes."""
    if adapter in KEY_STYLES:
        return tensors(KEY_STYLES[adapter][1], seed)
    weights, shapes = decoded_weights(samples.gguf(*model)), {}
    for layer in LAYERS[model]:
        for end, shape in ADAPTERS[adapter](tuple(weights[f"{layer}.weight"].shape)).items():
            shapes[f"diffusion_model.{layer}.{end}"] = shape
    return tensors(shapes, seed)


def with_lora(model: ModelPatcher, lora: dict, strength: float = 1.0) -> ModelPatcher:
    """As the host's node LoraLoader does it."""
    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


def predict(patcher: ModelPatcher, name: str) -> torch.Tensor:
    """What the model makes of noise, loaded as it is now."""
    shape, context, pooled = INPUTS[name]
    noise, model = normal(*shape, seed=1), patcher.model
    conditions = model.extra_conds(
        noise=noise,
        device=CPU,
        cross_attn=normal(1, 12, context, seed=2),
        pooled_output=normal(1, pooled, seed=3),
        guidance=3.5,
    )
    sigma = model.model_sampling.sigma_max.reshape(1)
    return model.apply_model(noise, sigma, **{key: value.cond for key, value in conditions.items()})


def are_loaded(patcher: ModelPatcher) -> set[bool]:
    """Whether packed layers are loaded, without DynamicVRAM: both where some are and some are not."""
    return {getattr(layer, "comfy_patched_weights", False) for layer in packed_layers(patcher.model).values()}


def share_loaded_in_part(patcher: ModelPatcher) -> float:
    """Which of SHARES has some layers loaded and some not; so the model is then."""
    for share in SHARES:
        patcher.detach()
        patcher.patch_model(CPU, patcher.model_size() * share)
        if are_loaded(patcher) == {True, False}:
            return share
    pytest.fail("the host never loads this model in part")


def loaded_in_part(patcher: ModelPatcher) -> ModelPatcher:
    """Have some layers loaded and some not, then some more unloaded: as in a full VRAM without DynamicVRAM."""
    share_loaded_in_part(patcher)
    assert patcher.partially_unload(CPU, patcher.loaded_size() * 0.3) > 0
    return patcher


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


def loaded(patcher: ModelPatcher) -> ModelPatcher:
    patcher.partially_load(CPU, 1e32)
    return patcher


def assert_nothing_merged(patcher: ModelPatcher, n_packed: int) -> None:
    layers = packed_layers(patcher.model)
    assert len(layers) == n_packed
    for layer in layers.values():
        assert not any(getattr(f, "is_lowvram_patch", False) for f in layer.weight_function)
        assert getattr(layer, "weight_lowvram_function", None) is None


@pytest.mark.parametrize(("model", "adapter"), CASES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_latent_is_that_of_the_host_with_the_lora(samples, expected, request, run, model, adapter):
    mode = request.node.callspec.params["run"]
    if (mode, adapter) == ("dynamic", "bias"):
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

    assert torch.equal(run(base, model[0]), without_it)
    assert_nothing_merged(base, n_packed)
    assert all(layer.side_path is None for layer in packed_layers(base.model).values())
    for key, layer in packed_layers(base.model).items():
        assert torch.equal(layer.weight._qdata, blocks[key])


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
    assert torch.equal(sample(mixed[0], FLUX[0], 1), sample(dense[0], FLUX[0], 1))


def hooked_sample(model: ModelPatcher, name: str, hooks: comfy.hooks.HookGroup):
    """Three steps with the hooks on the positive prompt alone: the host switches them on and off in each step."""
    shape, context, pooled = INPUTS[name]
    extra = {"pooled_output": normal(1, pooled, seed=3), "guidance": 3.5}
    positive = comfy.hooks.set_hooks_for_conditioning([[normal(1, 12, context, seed=2), dict(extra)]], hooks)
    negative = [[normal(1, 12, context, seed=5), dict(extra)]]
    return comfy.sample.sample(
        model,
        normal(*shape, seed=1),
        3,
        2.0,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros(shape),
        disable_pbar=True,
        seed=1,
    )


@pytest.fixture
def lora_folder(tmp_path, monkeypatch):
    _, extensions = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def scheduled_lora(lora: dict, folder) -> comfy.hooks.HookGroup:
    """The host's nodes: a LoRA that is off, then weak, then strong, in the course of sampling."""
    save_file(lora, folder / "hooked.safetensors")
    (hooks,) = nodes_hooks.CreateHookLora().create_hook("hooked.safetensors", 1.0, 0.0)
    frames = None
    for strength, start in ((0.0, 0.0), (0.5, 0.2), (1.5, 0.6)):
        (frames,) = nodes_hooks.CreateHookKeyframe().create_hook_keyframe(strength, start, frames)
    return nodes_hooks.SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]


def sampled_in_part(patcher: ModelPatcher, monkeypatch) -> None:
    """From now on the host finds so much memory for packed models that it loads this one in part, whenever it does."""
    share = share_loaded_in_part(patcher)
    patcher.detach()

    def partially_load(self, device, extra_memory=0, **options):
        room = self.model_size() * share - self.model.model_loaded_weight_memory
        return load_as_before(self, device, room, **options)

    load_as_before = PackedPatcher.partially_load
    monkeypatch.setattr(PackedPatcher, "partially_load", partially_load)


# A LoRA with a low-rank form and one of each way to have none; the others differ in the host's arithmetic alone.
HOOKED = ["lora", "bias", "dora", "loha", "lokr", "oft", "diff"]
HOOK_CASES = [(FLUX, adapter) for adapter in HOOKED] + [(SD15, adapter) for adapter in ("lora", "lokr")]


@pytest.mark.parametrize("mode", ["complete", "in part", "dynamic"])
@pytest.mark.parametrize(
    ("model", "adapter"), HOOK_CASES, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_lora_hooks_with_keyframes(samples, request, monkeypatch, lora_folder, model, adapter, mode):
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    lora = adapter_file(samples, model, adapter)
    base, reference = packed(samples, model), by_the_host(samples, model)
    if mode == "in part":
        sampled_in_part(base, monkeypatch)
    # A LoRA of the ordinary kind under the hooks.
    under = adapter_file(samples, model, "lora", seed=100)
    off = sample(base, model[0], steps=1)
    latents = [
        hooked_sample(with_lora(m, under), model[0], scheduled_lora(lora, lora_folder)) for m in (base, reference)
    ]
    unhooked = hooked_sample(with_lora(base, under), model[0], None)
    assert relative_error(*latents) < BOUND
    assert relative_error(unhooked, latents[1]) > 5 * BOUND
    assert torch.equal(sample(base, model[0], steps=1), off)
    assert mode != "in part" or are_loaded(base) == {True, False}


def test_model_as_lora_hook(samples):
    other = by_the_host(samples, (FLUX[0], "Q5_K"))
    weights = comfy.hooks.get_patch_weights_from_model(other)
    base, reference = packed(samples, FLUX), by_the_host(samples, FLUX)
    under = adapter_file(samples, FLUX, "lora")
    latents = []
    for model in (base, reference):
        hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.5, 0.0)
        latents.append(hooked_sample(with_lora(model, under), FLUX[0], hooks))
    assert relative_error(*latents) < BOUND
    assert relative_error(hooked_sample(with_lora(base, under), FLUX[0], None), latents[1]) > 0.003


def test_hooks_survive_a_partial_unload(samples):
    lora = adapter_file(samples, FLUX, "lora")
    patcher = packed(samples, FLUX)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(hooks, target, {})
    loaded(patcher).apply_hooks(hooks)
    hooked = predict(patcher, FLUX[0])
    patcher.partially_unload(CPU, patcher.model_size() * 0.3)
    patcher.apply_hooks(hooks)
    assert torch.equal(predict(patcher, FLUX[0]), hooked)
    patcher.apply_hooks(None)
    assert relative_error(predict(patcher, FLUX[0]), hooked) > 5 * BOUND


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


TEXT = (("tiny_t5", "Q4_K", "llama.cpp"), ("tiny_clip_l", "Q8_0", "comfyui"))
TEXT_LAYERS = {
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (256, 256),
    "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo": (256, 512),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (512, 256),
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding": (49408, 256),
}
# As the tools that train Flux name the layers of CLIP-L and of T5.
TEXT_STYLES = {
    "Kohya, OneTrainer": (
        KOHYA,
        {
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (256, 256),
            "lora_te2_encoder_block_0_layer_0_SelfAttention_v": (256, 256),
            "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0": (512, 256),
        },
    ),
    "diffusers": (PEFT, {"text_encoder.text_model.encoder.layers.1.self_attn.out_proj": (256, 256)}),
}
TEXT_CASES = ["lora", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set", *TEXT_STYLES]


def text_file(adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file for the encoders of TEXT."""
    if adapter in TEXT_STYLES:
        ends, stems = TEXT_STYLES[adapter]
        return tensors(pairs(*ends, stems))
    named = {
        f"{layer}.{end}": of for layer, shape in TEXT_LAYERS.items() for end, of in ADAPTERS[adapter](shape).items()
    }
    return tensors(named)


def with_text_lora(clip: comfy.sd.CLIP, lora: dict, strength: float = 1.0) -> comfy.sd.CLIP:
    return comfy.sd.load_lora_for_models(None, clip, dict(lora), 0, strength)[1]


def encoding(clip: comfy.sd.CLIP) -> torch.Tensor:
    """What the text encoders make of a prompt, loaded as they are now."""
    tokens = clip.tokenize("a small test of a prompt")
    return torch.cat([part.flatten() for part in clip.cond_stage_model.encode_token_weights(tokens)[:2]])


@pytest.fixture(scope="module")
def decoded_clip(samples) -> comfy.sd.CLIP:
    """What ComfyUI's own loader makes of the encoders' decoded weights."""
    files = [str(samples.decoded(name, kind, torch.float32)) for name, kind, _ in TEXT]
    options = {"t5xxl_model_config": {**samples.TINY_T5}, "model_config": {**samples.TINY_CLIP_L}}
    return comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType.FLUX, model_options=options | {"dtype": torch.float32})


@pytest.mark.parametrize("adapter", TEXT_CASES)
@pytest.mark.parametrize("mode", ["complete", "in part", "dynamic"])
def test_lora_on_text_encoders(samples, decoded_clip, request, mode, adapter):
    expected = encoding(loaded_clip(with_text_lora(decoded_clip, text_file(adapter))))
    without = encoding(loaded_clip(decoded_clip))
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    load = loaded_clip_in_part if mode == "in part" else loaded_clip
    base = load_text_encoder([str(samples.gguf(*file)) for file in TEXT], "flux")
    assert base.is_dynamic() == (mode == "dynamic")
    n_packed = len(packed_layers(base.cond_stage_model))
    lora = load(with_text_lora(base, text_file(adapter)))
    on = encoding(lora)
    assert relative_error(on, expected) < BOUND
    assert relative_error(expected, without) > 5 * BOUND
    layers = packed_layers(base.cond_stage_model)
    assert lora.patcher.patches.keys() <= layers.keys()
    for key in lora.patcher.patches:
        assert (layers[key].side_path.low_rank is not None) == (adapter in (*LOW_RANK, *TEXT_STYLES))
    assert torch.equal(encoding(load(base)), without)
    assert len(packed_layers(base.cond_stage_model)) == n_packed


def loaded_clip(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    clip.load_model()
    return clip


def loaded_clip_in_part(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    loaded_in_part(clip.patcher)
    return clip


def test_node_puts_a_lora_on_a_text_encoder(samples):
    lora = samples.sample("tiny_clip_l_lora")
    clip = load_text_encoder([str(samples.gguf("tiny_clip_l", "Q8_0"))], "stable_diffusion")
    by_host = encoding(loaded_clip(with_text_lora(clip, load_file(lora), -0.5)))
    by_loader = apply_lora(packed(samples, FLUX), clip, str(lora), 1.0, -0.5)[1]
    assert torch.equal(encoding(loaded_clip(by_loader)), by_host)
    assert relative_error(encoding(loaded_clip(clip)), by_host) > 5 * BOUND


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
