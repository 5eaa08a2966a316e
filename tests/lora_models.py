"""Models with and without packed weights, LoRA files for them, and a model loaded in part."""

import functools

import comfy.model_management
import comfy.sd
import pytest
import torch
from adapters import ADAPTERS, KEY_STYLES, tensors
from comfy.model_patcher import ModelPatcher
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.packed_layers import packed_layers
from host import quantise
from sampling import INPUTS, normal, relative_error

BOUND = 1e-3
DEVICE = comfy.model_management.get_torch_device()
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


# Of its size, that a model is given to be loaded in part; the host also reserves room for its largest weights, decoded:
# for one on a CPU, for three on a GPU.
SHARES = (0.6, 0.95, 1, 3.5, 4, 5, 6, 7, 8)


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
    noise, model = normal(*shape, seed=1).to(DEVICE), patcher.model
    conditions = model.extra_conds(
        noise=noise,
        device=DEVICE,
        cross_attn=normal(1, 12, context, seed=2),
        pooled_output=normal(1, pooled, seed=3),
        guidance=3.5,
    )
    sigma = model.model_sampling.sigma_max.reshape(1).to(DEVICE)
    given = {key: value.cond.to(DEVICE) for key, value in conditions.items()}
    return model.apply_model(noise, sigma, **given).cpu()


def assert_same(latent: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; on a GPU all but, where few rows have a product of their own."""
    assert torch.equal(latent, expected) or (DEVICE.type == "cuda" and relative_error(latent, expected) < 1e-5)


def are_loaded(patcher: ModelPatcher) -> set[bool]:
    """Whether packed layers are loaded, without DynamicVRAM: both where some are and some are not."""
    return {getattr(layer, "comfy_patched_weights", False) for layer in packed_layers(patcher.model).values()}


def share_loaded_in_part(patcher: ModelPatcher) -> float:
    """Which of SHARES has some layers loaded and some not; so the model is then."""
    for share in SHARES:
        patcher.detach()
        patcher.patch_model(DEVICE, patcher.model_size() * share)
        if are_loaded(patcher) == {True, False}:
            return share
    pytest.fail("the host never loads this model in part")


def loaded_in_part(patcher: ModelPatcher) -> ModelPatcher:
    """Have some layers loaded and some not, then some more unloaded: as in a full VRAM without DynamicVRAM."""
    share_loaded_in_part(patcher)
    assert patcher.partially_unload(patcher.offload_device, patcher.loaded_size() * 0.3) > 0
    return patcher


def loaded(patcher: ModelPatcher) -> ModelPatcher:
    patcher.partially_load(DEVICE, 1e32)
    return patcher
