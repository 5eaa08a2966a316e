"""The scaffolding itself: samples are what ComfyUI takes, the server runs and stops, errors come back as they are."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import gguf
import pytest
import torch
from host import quantise, workflows
from host.client import WorkflowError
from host.environment import HERE, ROOT, requirements
from host.server import running_server
from safetensors.torch import load_file

CLIP_L_FLUX = [
    workflows.node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
    workflows.node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
    workflows.node("VAELoader", vae_name="tiny_flux_vae.safetensors"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny_flux", "Flux"), ("tiny_sd3", "SD3"), ("tiny_wan", "WAN21"), ("tiny_sd15", "BaseModel")],
)
def test_diffusion_samples_are_recognised(host, samples, name, expected):
    assert type(host.sd.load_diffusion_model(str(samples.sample(name))).model).__name__ == expected


@pytest.mark.parametrize(
    ("name", "channels"),
    [("tiny_flux_vae", 16), ("tiny_sd15_vae", 4), ("tiny_flux_taesd", 16), ("tiny_wan_vae", 16)],
)
def test_vae_samples_are_recognised(host, samples, name, channels):
    assert host.sd.VAE(sd=host.utils.load_torch_file(str(samples.sample(name)))).latent_channels == channels


def test_dynamic_vram_can_be_had_on_the_cpu(host, samples, dynamic_vram_on_cpu):
    model = host.sd.load_diffusion_model(str(samples.sample("tiny_flux")))
    assert type(model).__name__ == "ModelPatcherDynamic"


def test_without_the_fixture_the_cpu_has_the_plain_patcher(host, samples):
    assert type(host.sd.load_diffusion_model(str(samples.sample("tiny_flux")))).__name__ == "ModelPatcher"


@pytest.mark.parametrize("name", ["tiny_sd15", "tiny_wan", "tiny_wan_vae", "tiny_clip_l"])
def test_decoding_gives_back_names_and_shapes(samples, name):
    source = load_file(samples.sample(name))
    decoded = load_file(samples.decoded(name, "Q8_0", torch.float32))
    assert {key: tensor.shape for key, tensor in decoded.items()} == {
        key: tensor.shape for key, tensor in source.items()
    }
    for key, tensor in decoded.items():
        torch.testing.assert_close(tensor, source[key].float(), rtol=0, atol=tensor.abs().max().item() / 120)


def test_quantised_convolutions_keep_their_shape_in_metadata(samples):
    reader = gguf.GGUFReader(samples.gguf("tiny_sd15", "Q4_K"))
    field = reader.get_field(quantise.ORIGINAL_SHAPE + "input_blocks.1.0.in_layers.2.weight")
    assert field.contents() == [320, 320, 3, 3]
    assert not reader.get_field(quantise.ORIGINAL_SHAPE + "time_embed.0.weight")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("tiny_flux_256", {"img_in.weight"}),
        ("tiny_sd3", set()),
        ("tiny_wan", {"blocks.0.modulation", "blocks.1.modulation", "patch_embedding.weight"}),
    ],
)
def test_all_matrices_but_a_few_known_ones_are_quantised(samples, name, plain):
    tensors = gguf.GGUFReader(samples.gguf(name, "Q4_K")).tensors
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.n_elements > quantise.SMALL]
    assert {tensor.name for tensor in matrices if tensor.tensor_type.name != "Q4_K"} == plain


def test_t5_has_llama_cpp_names(samples):
    names = {tensor.name for tensor in gguf.GGUFReader(samples.gguf("tiny_t5", "Q8_0", "llama.cpp")).tensors}
    assert {"token_embd.weight", "enc.output_norm.weight", "enc.blk.1.ffn_gate.weight"} <= names
    assert all(re.match(r"token_embd|enc\.", name) for name in names)


def test_same_seed_gives_the_same_picture(server, samples):
    for name in ("tiny_flux", "clip_l", "tiny_flux_vae"):
        samples.sample(name)
    steps = []
    first = server.run(workflows.text_to_image(*CLIP_L_FLUX, seed=7), lambda *step: steps.append(step))
    assert steps[-1] == ("KSampler", 2, 2)
    server.free()
    again = server.run(workflows.text_to_image(*CLIP_L_FLUX, seed=7))
    other = server.run(workflows.text_to_image(*CLIP_L_FLUX, seed=8))
    (one,), (two,), (three,) = first.pictures(), again.pictures(), other.pictures()
    assert one.size == (64, 64)
    assert one.tobytes() == two.tobytes() != three.tobytes()


def test_a_refused_workflow_names_the_node(server):
    missing = [workflows.node("UNETLoader", unet_name="absent.safetensors", weight_dtype="default"), *CLIP_L_FLUX[1:]]
    with pytest.raises(WorkflowError, match=r"^UNETLoader: .*absent\.safetensors"):
        server.run(workflows.text_to_image(*missing))


def test_a_failing_node_is_named_with_its_message(server, samples):
    samples.sample("tiny_sd15_vae")
    samples.sample("tiny_flux")
    wrong = [*CLIP_L_FLUX[:2], workflows.node("VAELoader", vae_name="tiny_sd15_vae.safetensors")]
    with pytest.raises(WorkflowError) as caught:
        server.run(workflows.text_to_image(*wrong))
    assert caught.value.node == "VAEDecode"
    assert "channels" in caught.value.message


def test_the_server_stops_with_its_block(comfyui, samples, tmp_path):
    with running_server(comfyui, tmp_path, samples.MODELS) as client:
        assert client.request("/system_stats")["system"]["comfyui_version"]
    with pytest.raises(URLError):
        client.request("/system_stats")


def test_a_server_that_cannot_start_says_why(comfyui, samples, tmp_path):
    starting = running_server(comfyui, tmp_path, samples.MODELS, ["--no-such-option"])
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"):
        starting.__enter__()


def test_the_pack_is_imported_by_the_server(server):
    names = server.object_info()
    assert {"UnetLoaderGGUF", "DualCLIPLoaderGGUF", "VAELoaderGGUF", "LoraLoaderGGUF"} <= names.keys()


def test_the_big_web_packages_are_left_out(comfyui):
    names = " ".join(requirements(comfyui))
    assert "comfyui-frontend-package" in names
    assert "comfyui-workflow-templates" not in names


def test_environment_runs_a_command_with_the_right_interpreter(comfyui):
    code = "import host.environment, sys; print(sys.executable)"
    script = [sys.executable, str(HERE / "environment.py"), "-c", code]
    settings = {"COMFYUI_PYTHON": sys.executable, "COMFYUI_PATH": str(comfyui)}
    done = subprocess.run(script, capture_output=True, text=True, env=settings)
    assert Path(done.stdout.splitlines()[-1]) == Path(sys.executable), done.stderr


def test_the_example_workflow_is_what_the_nodes_take(server, samples):
    samples.make_example_files()
    page = json.loads((ROOT / "example_workflows" / "flux_gguf.json").read_text())
    graph = workflows.from_page(page, server.object_info())
    assert graph["4"]["inputs"]["model"] == ["1", 0]
    assert graph["8"]["inputs"]["steps"] == 20
