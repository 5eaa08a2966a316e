"""What the converter writes runs in the real ComfyUI: latents, conditioning and pictures near those of the source."""

import numpy as np
import pytest
import torch
from host.client import WorkflowError
from host.workflows import node, text_to_image
from sampling import relative_error, sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
import comfy.utils
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.text_encoder import load_text_encoder
from gguf_native.loader.vae import load_vae
from gguf_native.quantizer import convert
from gguf_native.quantizer.recipes import FILE_TYPES
from safetensors.torch import load_file, save_file

# How far the latent of tiny_flux_256 after two steps may be from the source's: a quarter over what each type does.
BOUNDS = {
    "F32": 1e-6,
    "F16": 1e-5,
    "BF16": 1e-6,
    "Q8_0": 0.005,
    "Q6_K": 0.018,
    "Q5_K_M": 0.034,
    "Q5_K_S": 0.038,
    "Q5_1": 0.035,
    "Q5_0": 0.044,
    "Q4_K_M": 0.07,
    "Q4_K_S": 0.075,
    "Q4_1": 0.075,
    "Q4_0": 0.085,
    "IQ4_NL": 0.075,
    "IQ4_XS": 0.08,
    "MXFP4": 0.14,
    "Q3_K_L": 0.14,
    "Q3_K_M": 0.14,
    "Q3_K_S": 0.16,
    "IQ3_S": 0.13,
    "IQ3_XXS": 0.18,
    "IQ2_S": 0.23,
    "Q2_K": 0.25,
    "TQ1_0": 0.7,
    "TQ2_0": 0.7,
}
# The same for other models; T5 amplifies differences, since random weights make its attention sharp.
DIFFUSION = {
    ("tiny_sd3", "Q8_0"): 0.006,
    ("tiny_sd3", "Q4_K_M"): 0.065,
    ("tiny_wan", "Q8_0"): 0.003,
    ("tiny_wan", "Q4_K_M"): 0.04,
    ("tiny_sd15", "Q8_0"): 0.009,
    ("tiny_sd15", "Q4_K_M"): 0.11,
}
TEXT = {
    ("tiny_clip_l", "Q8_0"): 0.016,
    ("tiny_clip_l", "Q5_K_M"): 0.09,
    ("tiny_t5", "Q8_0"): 0.08,
    ("tiny_t5", "Q5_K_M"): 0.5,
    ("tiny_umt5", "Q8_0"): 0.1,
    ("tiny_umt5", "Q5_K_M"): 0.6,
}
KINDS = {"tiny_clip_l": "stable_diffusion", "tiny_t5": "flux", "tiny_umt5": "wan"}
VAES = {
    ("tiny_flux_vae", "Q8_0"): 0.013,
    ("tiny_flux_vae", "Q4_K_M"): 0.2,
    ("tiny_sd15_vae", "Q8_0"): 0.011,
    ("tiny_sd15_vae", "Q4_K_M"): 0.15,
    ("tiny_wan_vae", "Q8_0"): 0.008,
    ("tiny_wan_vae", "Q4_K_M"): 0.11,
    ("tiny_flux_taesd", "Q8_0"): 0.07,
    ("tiny_flux_taesd", "Q4_K_M"): 0.45,
}


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture
def converted(samples, tmp_path):
    def converted(name: str, type_name: str) -> str:
        (path,) = convert(samples.sample(name), tmp_path / f"{name}-{type_name}.gguf", type_name)
        return str(path)

    return converted


@pytest.fixture(scope="module")
def latents(samples) -> dict[str, torch.Tensor]:
    """Name -> latent of the source, by ComfyUI's own loader."""
    with torch.inference_mode():
        names = ("tiny_flux_256", "tiny_sd3", "tiny_wan", "tiny_sd15")
        return {name: sample(comfy.sd.load_diffusion_model(str(samples.sample(name))), name) for name in names}


@pytest.fixture(scope="module")
def vae(samples):
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(samples.sample("tiny_flux_vae"))))


@pytest.mark.parametrize("type_name", FILE_TYPES)
def test_every_file_type_paints_near_its_source(latents, vae, converted, type_name):
    latent = sample(load_diffusion_model(converted("tiny_flux_256", type_name)), "tiny_flux_256")
    assert relative_error(latent, latents["tiny_flux_256"]) <= BOUNDS[type_name]
    picture, expected = (vae.decode(one).double() for one in (latent, latents["tiny_flux_256"]))
    assert expected.std() > 0.01
    # A decoder of random weights amplifies differences a little.
    assert (picture - expected).square().mean().sqrt() <= 1.2 * BOUNDS[type_name] * expected.std()


@pytest.mark.parametrize(("name", "type_name"), DIFFUSION)
def test_every_kind_of_model_samples_near_its_source(latents, converted, name, type_name):
    error = relative_error(sample(load_diffusion_model(converted(name, type_name)), name), latents[name])
    assert 0 < error <= DIFFUSION[name, type_name]


@pytest.mark.parametrize("bits", ["Q4_K", "Q5_K"])
def test_medium_is_nearer_than_small(latents, converted, bits):
    medium, small = (
        sample(load_diffusion_model(converted("tiny_flux_256", f"{bits}_{letter}")), "tiny_flux_256") for letter in "MS"
    )
    assert relative_error(medium, latents["tiny_flux_256"]) < relative_error(small, latents["tiny_flux_256"])


@pytest.mark.parametrize(("name", "type_name"), TEXT)
def test_text_encoders_keep_their_names_and_load(samples, converted, name, type_name):
    kind = KINDS[name]
    paths = [[converted(name, type_name)], [str(samples.sample(name))]]
    if kind == "flux":
        paths = [[str(samples.sample("tiny_clip_l")), *path] for path in paths]
    actual, expected = (
        clip.encode_from_tokens(clip.tokenize("a red cat on a mat"))
        for clip in (load_text_encoder(path, kind) for path in paths)
    )
    assert 0 < relative_error(actual, expected) <= TEXT[name, type_name]


@pytest.mark.parametrize(("name", "type_name"), VAES)
def test_vaes_with_packed_convolutions_decode_near_their_source(samples, converted, name, type_name):
    expected = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(samples.sample(name))))
    channels = 4 if "sd15" in name else 16
    shape = (1, channels, 1, 8, 8) if "wan" in name else (1, channels, 8, 8)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    error = relative_error(load_vae(converted(name, type_name)).decode(latent), expected.decode(latent))
    assert 0 < error <= VAES[name, type_name]


def test_a_part_of_a_full_checkpoint_runs(latents, samples, tmp_path):
    tensors = {f"model.diffusion_model.{key}": value for key, value in load_file(samples.sample("tiny_sd15")).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in load_file(samples.sample("tiny_sd15_vae")).items()}
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    for part, load in (("unet", load_diffusion_model), ("vae", load_vae)):
        (path,) = convert(tmp_path / "checkpoint.safetensors", tmp_path / f"{part}.gguf", "Q8_0", part=part)
        loaded = load(str(path))
        if part == "unet":
            assert relative_error(sample(loaded, "tiny_sd15"), latents["tiny_sd15"]) <= DIFFUSION["tiny_sd15", "Q8_0"]


def test_scaled_fp8_runs_as_the_host_runs_it(samples, tmp_path):
    tensors = load_file(samples.sample("tiny_flux_256"))
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "blocks" in name:
            scale = tensor.abs().max().float() / 448
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[name] = tensor
    save_file(scaled, tmp_path / "fp8.safetensors")
    (path,) = convert(tmp_path / "fp8.safetensors", tmp_path / "fp8.gguf", "Q8_0")
    expected = sample(comfy.sd.load_diffusion_model(str(tmp_path / "fp8.safetensors")), "tiny_flux_256")
    error = relative_error(sample(load_diffusion_model(str(path)), "tiny_flux_256"), expected)
    assert error <= BOUNDS["Q8_0"]


def pictures(server, samples, *loaders) -> list[np.ndarray]:
    """float [height, width, 3], 0 to 255, of a Flux by each loader."""
    encoders = [samples.gguf("tiny_clip_l", "Q8_0").name, samples.gguf("tiny_t5", "Q4_K", "llama.cpp").name]
    clip = node("DualCLIPLoaderGGUF", clip_name1=encoders[0], clip_name2=encoders[1], type="flux")
    vae = node("VAELoader", vae_name=samples.sample("tiny_flux_vae").name)
    graphs = [text_to_image(loader, clip, vae) for loader in loaders]
    return [np.asarray(server.run(graph).pictures()[0]).astype(float) for graph in graphs]


@pytest.fixture
def made(samples):
    """The file that the node is asked for; it goes afterwards, since all samples of a folder are listed."""
    path = samples.MODELS / "diffusion_models" / "made by the node.gguf"
    yield path
    path.unlink(missing_ok=True)


def quantize(samples, made, type_name: str) -> dict:
    model = f"diffusion_models/{samples.sample('tiny_flux_256').name}"
    return {
        "quantize": node("GGUFQuantize", model=model, type=type_name, part="whole file", name=made.stem, device="CPU")
    }


def test_the_node_converts_and_the_picture_is_that_of_the_source(server, samples, made):
    said = server.run(quantize(samples, made, "Q8_0")).outputs["quantize"]["text"]
    assert said == [f"{made}: {made.stat().st_size / 1e6:,.1f} MB"]
    actual, expected = pictures(
        server,
        samples,
        node("UnetLoaderGGUF", unet_name=made.name),
        node("UNETLoader", unet_name=samples.sample("tiny_flux_256").name, weight_dtype="default"),
    )
    assert expected.std() > 1
    assert np.abs(actual - expected).mean() < 1


def test_the_node_never_replaces_a_file(server, samples, made):
    made.write_bytes(b"precious")
    with pytest.raises(WorkflowError, match="exists already"):
        server.run(quantize(samples, made, "Q8_0"))
    assert made.read_bytes() == b"precious"


def test_cancel_stops_the_node_and_leaves_nothing(server, samples, made):
    def cancel(*progress: object) -> None:
        server.request("/interrupt", {})

    with pytest.raises(WorkflowError, match="interrupted"):
        server.run(quantize(samples, made, "Q2_K"), cancel)
    assert not list(made.parent.glob(f"{made.name}*"))


@pytest.mark.parametrize("name", ["../outside", "a/b", "a\\b"])
def test_the_node_writes_into_no_other_folder(server, samples, made, name):
    graph = quantize(samples, made, "Q8_0")
    graph["quantize"]["inputs"]["name"] = name
    with pytest.raises(WorkflowError, match="is no name of a file"):
        server.run(graph)


def test_the_node_takes_a_part_of_a_checkpoint(server, samples, tmp_path):
    """The checkpoint lies in models/checkpoints, the result in the folder of its kind under a name of its own."""
    checkpoint = samples.MODELS / "checkpoints" / "checkpoint made for the node.safetensors"
    result = samples.MODELS / "vae" / f"{checkpoint.stem}-vae-Q8_0.gguf"
    tensors = {f"first_stage_model.{key}": value for key, value in load_file(samples.sample("tiny_sd15_vae")).items()}
    tensors["model.diffusion_model.time_embed.0.weight"] = torch.zeros(8, 8)
    checkpoint.parent.mkdir(exist_ok=True)
    save_file(tensors, checkpoint)
    inputs = {"model": f"checkpoints/{checkpoint.name}", "type": "Q8_0", "part": "vae", "name": "", "device": "CPU"}
    try:
        server.run({"quantize": node("GGUFQuantize", **inputs)})
        assert load_vae(str(result)).first_stage_model is not None
    finally:
        checkpoint.unlink()
        result.unlink(missing_ok=True)
