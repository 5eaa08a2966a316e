"""The `compute` of a loaded model: which layers take it, what keeps it, and that without a GPU it changes nothing."""

import dataclasses
import logging

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

from gguf_native.config import settings
from gguf_native.loader import diffusion_model, text_encoder
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.loader.residency import ATTACHMENT
from gguf_native.loader.text_encoder import load_text_encoder
from gguf_native.loader.vae import load_vae
from gguf_native.ops import compute
from gguf_native.ops.layers import GGUFOps
from sampling import sample

FLUX = ("tiny_flux_256", "Q4_K")
# Sample -> what the names of its faster layers and of its exact ones begin with, after `diffusion_model.`.
FLUX_OUTSIDE = {"img_in", "time_in", "vector_in", "guidance_in", "txt_in", "final_layer"}
LAYERS = {
    "tiny_flux_256": ({"double_blocks", "single_blocks"}, FLUX_OUTSIDE),
    "tiny_sd3": ({"joint_blocks"}, {"context_embedder", "t_embedder", "y_embedder", "final_layer"}),
    "tiny_wan": ({"blocks"}, {"text_embedding", "time_embedding", "time_projection", "head"}),
    # What lies in middle_block beside its transformer takes the embedded time.
    "tiny_sd15": ({"input_blocks", "middle_block", "output_blocks"}, {"time_embed", "middle_block"}),
}
SAID = "GGUF Native: some layers compute exactly instead of in %s, which is slower: it needs an NVIDIA GPU."


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture
def said(caplog):
    """Function -> the pack's log lines about layers that compute exactly, as if nothing had been said before."""
    compute.log_exact.cache_clear()
    with caplog.at_level(logging.INFO, "gguf_native"):
        yield lambda: [line for line in caplog.messages if "compute exactly" in line]


def diffusion(samples, **options):
    return load_diffusion_model(str(samples.gguf(*FLUX)), **options)


def test_each_input_of_the_advanced_loader_arrives(samples, monkeypatch):
    from gguf_native.nodes import folders
    from gguf_native.nodes.load_diffusion_model import UnetLoaderGGUFAdvanced

    monkeypatch.setattr(folders, "full_path", lambda kind, name: str(samples.gguf(*FLUX)))
    for dequant, patch, on_device, compute_name in (
        ("float32", "float16", True, "fp8"),
        ("default", "bfloat16", False, "auto"),
        ("target", "target", False, "exact"),
    ):
        (model,) = UnetLoaderGGUFAdvanced.execute("a file", dequant, patch, on_device, compute_name).args
        packed = packed_layers(model.model).values()
        assert {layer.decode_dtype for layer in packed} == {getattr(torch, dequant, None)}
        attachment = model.get_attachment(ATTACHMENT)
        assert attachment["patch_dtype"] == getattr(torch, patch, None)
        assert attachment["patch_on_device"] is on_device
        assert computes(model.model) == {compute_name}


def test_each_input_of_a_clip_loader_arrives(samples, monkeypatch):
    from gguf_native.nodes import folders
    from gguf_native.nodes.load_text_encoder import CLIPLoaderGGUF

    monkeypatch.setattr(folders, "full_path", lambda kind, name: str(samples.gguf("clip_l", "Q5_K")))
    for compute_name in ("fp8", "exact"):
        (clip,) = CLIPLoaderGGUF.execute("a file", "stable_diffusion", compute_name).args
        assert computes(clip.patcher.model) == {compute_name}


def linears(model: torch.nn.Module) -> dict[str, GGUFOps.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, GGUFOps.Linear)}


def computes(model: torch.nn.Module) -> set[str]:
    """What the layers within the model's lists of blocks compute with."""
    faster = {layer.compute for layer in linears(model).values()} - {"exact"}
    return faster or {"exact"}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_repeated_blocks_are_faster(samples, name):
    model = load_diffusion_model(str(samples.gguf(name, "Q8_0")), compute="int8")
    layers = linears(model.model.diffusion_model)
    faster = {key for key, layer in layers.items() if layer.compute == "int8"}
    assert {layers[key].compute for key in layers.keys() - faster} == {"exact"}
    starts = tuple({key.partition(".")[0] for key in keys} for keys in (faster, layers.keys() - faster))
    assert starts == LAYERS[name]


def test_in_sd15_the_middle_is_faster_in_its_transformer_alone(samples):
    model = load_diffusion_model(str(samples.gguf("tiny_sd15", "Q8_0")), compute="int8")
    middle = {key: layer.compute for key, layer in linears(model.model.diffusion_model.middle_block).items()}
    faster = {key for key, kind in middle.items() if kind == "int8"}
    assert faster == {key for key in middle if ".transformer_blocks." in key}


def test_in_text_encoders_too(samples):
    paths = [samples.gguf("tiny_t5", "Q8_0", "llama.cpp"), samples.gguf("tiny_clip_l", "Q8_0")]
    clip = load_text_encoder(paths, "flux", compute="fp8")
    layers = linears(clip.cond_stage_model)
    faster = {key for key, layer in layers.items() if layer.compute == "fp8"}
    assert faster == {key for key in layers if ".block." in key or ".layers." in key}
    assert len(faster) == 2 * 7 + 2 * 6  # q, k, v, o and three of a gated MLP; q, k, v, out and two of an MLP


def test_a_vae_is_exact(samples, monkeypatch):
    monkeypatch.setattr("gguf_native.loader.vae.settings", lambda: dataclasses.replace(settings(), compute="fp8"))
    vae = load_vae(str(samples.gguf("tiny_wan_vae", "Q8_0")))
    assert {layer.compute for layer in linears(vae.first_stage_model).values()} <= {"exact"}


@pytest.mark.parametrize("kind", ["fp8", "int8", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
def test_on_a_cpu_the_latent_is_the_exact_one(request, samples, said, kind, dtype, mode):
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    latents = []
    for choice in ("exact", kind):
        model = diffusion(samples, compute=choice)
        model.set_model_compute_dtype(dtype)
        assert model.is_dynamic() == (mode == "dynamic")
        latents.append(sample(model, FLUX[0], steps=1))
    assert torch.equal(*latents)
    # Only at loading is it known before the inputs are; float32 is exact without a word.
    speaks = dtype == torch.bfloat16 or (mode == "legacy" and kind != "auto")
    assert said() == [SAID % kind] * speaks


def test_clones_keep_it(samples, dynamic_vram_on_cpu):
    model = diffusion(samples, compute="int8")
    assert model.is_dynamic()
    deep = model.clone(disable_dynamic=True)
    for clone in (model.clone(), deep, deep.clone()):
        assert computes(clone.model) == {"int8"}
    assert deep.model is not model.model
    assert not deep.is_dynamic()
    assert torch.equal(sample(deep, FLUX[0], steps=1), sample(model, FLUX[0], steps=1))


def test_what_makes_a_model_anew_keeps_it(samples):
    model = diffusion(samples, compute="auto")
    make, arguments = model.cached_patcher_init
    assert computes(make(*arguments).model) == {"auto"}
    assert computes(make(*arguments, disable_dynamic=True).model) == {"auto"}
    paths = [str(samples.gguf("tiny_t5", "Q8_0", "llama.cpp")), str(samples.gguf("tiny_clip_l", "Q8_0"))]
    make, arguments = load_text_encoder(paths, "flux", compute="int8").patcher.cached_patcher_init
    assert computes(make(*arguments).model) == {"int8"}
    assert computes(make(*arguments, disable_dynamic=True).model) == {"int8"}


@pytest.mark.parametrize(("given", "expected"), [(None, "fp8"), ("exact", "exact"), ("int8", "int8")])
def test_what_is_asked_for_goes_before_the_setting(samples, monkeypatch, given, expected):
    changed = dataclasses.replace(settings(), compute="fp8")
    for module in (diffusion_model, text_encoder):
        monkeypatch.setattr(module, "settings", lambda: changed)
    assert computes(diffusion(samples, compute=given).model) == {expected}
    paths = [str(samples.gguf("tiny_clip_l", "Q8_0"))]
    assert computes(load_text_encoder(paths, "stable_diffusion", compute=given).cond_stage_model) == {expected}


def test_by_default_all_is_exact(samples):
    assert settings().compute == "exact"
    assert computes(diffusion(samples).model) == {"exact"}


def test_all_layers_of_a_model_share_one_workspace(samples):
    workspaces = [{id(layer.workspace) for layer in packed_layers(diffusion(samples).model).values()} for _ in range(2)]
    assert [len(ids) for ids in workspaces] == [1, 1]


@pytest.mark.parametrize("is_deep", [False, True])
def test_the_workspace_is_given_back_after_sampling(samples, dynamic_vram_on_cpu, is_deep):
    model = diffusion(samples)
    patcher = model.clone(disable_dynamic=is_deep)
    workspace = next(iter(packed_layers(patcher.model).values())).workspace
    in_use = []

    def watched(apply, options):
        out = apply(options["input"], options["timestep"], **options["c"])
        in_use.append(len(workspace.buffers))
        return out

    patcher.set_model_unet_function_wrapper(watched)
    sample(patcher, FLUX[0], steps=1)
    assert in_use == [1]
    assert not workspace.buffers
