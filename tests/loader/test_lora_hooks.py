"""LoRAs that change in the course of sampling: the latent is that of the host's own hooks on the decoded weights."""

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.hooks
import comfy.model_management as mm
import comfy.sample
from comfy.model_patcher import ModelPatcher
from comfy.utils import get_attr
from comfy_extras import nodes_hooks
from gguf_native.loader.model_patcher import ModelPatcher as PackedPatcher
from gguf_native.loader.text_encoder import load_text_encoder
from lora_models import (
    BOUND,
    FLUX,
    LAYERS,
    SD15,
    adapter_file,
    are_loaded,
    assert_same,
    by_the_host,
    loaded,
    loaded_in_part,
    packed,
    predict,
    share_loaded_in_part,
    with_lora,
)
from safetensors.torch import save_file
from sampling import INPUTS, normal, relative_error, sample


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


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
    assert_same(sample(base, model[0], steps=1), off)
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
    patcher.partially_unload(patcher.offload_device, patcher.model_size() * 0.3)
    patcher.apply_hooks(hooks)
    assert_same(predict(patcher, FLUX[0]), hooked)
    patcher.apply_hooks(None)
    assert relative_error(predict(patcher, FLUX[0]), hooked) > 5 * BOUND


def test_no_memory_goes_while_it_is_pinned(samples, monkeypatch):
    """A bias that hooks patch may be pinned: the host does so with all that has no room on the GPU."""
    pinned = {}
    monkeypatch.setattr(mm, "pin_memory", lambda weight: pinned.setdefault(weight.data_ptr(), weight.nbytes) > 0)
    monkeypatch.setattr(mm, "unpin_memory", lambda weight: pinned.pop(weight.data_ptr()))
    patcher = loaded_in_part(packed(samples, FLUX))
    assert len(pinned) == len(patcher.pinned) > 0
    key = f"diffusion_model.{LAYERS[FLUX][0]}.bias"
    patcher.pinned.add(key)
    pinned[get_attr(patcher.model, key).data_ptr()] = 1
    hooks = comfy.hooks.create_hook_lora(adapter_file(samples, FLUX, "bias"), 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(hooks, target, {})
    for switched in (hooks, None, hooks):
        patcher.apply_hooks(switched)
        assert pinned.keys() == {get_attr(patcher.model, key).data_ptr() for key in patcher.pinned}
    patcher.apply_hooks(None)
    patcher.detach()
    assert not pinned


def test_hooks_do_not_write_into_a_file_that_the_host_has_mapped(samples, dynamic_vram_on_cpu):
    """A safetensors encoder beside a GGUF one: its biases view ComfyUI's own mapping, which ends who writes into it."""
    files = samples.gguf("tiny_t5", "Q4_K", "llama.cpp"), samples.sample("tiny_clip_l")
    patcher = load_text_encoder([str(file) for file in files], "flux", disable_dynamic=True).patcher
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    bias = get_attr(patcher.model, f"{name}.bias")
    assert hasattr(bias.untyped_storage(), "_comfy_tensor_mmap_refs")
    before = bias.clone()
    lora = {f"text_encoders.{name}.diff_b": torch.ones(bias.shape)}
    hooks = comfy.hooks.create_hook_lora(lora, 0.0, 1.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
    patcher.register_all_hook_patches(hooks, target, {})
    loaded(patcher).apply_hooks(hooks)
    assert torch.allclose(get_attr(patcher.model, f"{name}.bias").float(), before.float() + 1, atol=1e-2)
    patcher.apply_hooks(None)
    assert torch.equal(get_attr(patcher.model, f"{name}.bias"), before)


def test_cached_hooks_do_not_write_into_the_file(samples):
    """A model that leaves while sampling gives a patched bias back as the file has it; then the hooks come again."""
    patcher = with_lora(packed(samples, FLUX), adapter_file(samples, FLUX, "bias", seed=100))
    hooks = comfy.hooks.create_hook_lora(adapter_file(samples, FLUX, "bias"), 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(hooks, target, {})
    loaded(patcher).apply_hooks(hooks)
    bias = get_attr(patcher.model, f"diffusion_model.{LAYERS[FLUX][0]}.bias")
    hooked = bias.clone()
    patcher.apply_hooks(None)
    patcher.partially_unload(patcher.offload_device, 1e32)
    patcher.apply_hooks(hooks)
    assert torch.equal(get_attr(patcher.model, f"diffusion_model.{LAYERS[FLUX][0]}.bias"), hooked)
