"""Whole workflows over HTTP in the real server: GGUF files against ComfyUI's own nodes on the same decoded weights."""

import itertools
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from host.client import Graph, WorkflowError
from host.server import Server, running_server
from host.workflows import from_page, node, text_to_image
from safetensors.torch import save_file
from samples import random_blocks

WORKFLOWS = Path(__file__).with_name("workflows")
NO_COMPILER = "torch.compile on a CPU needs a C++ compiler, and there is none here"

# Two pictures of the same weights whose arithmetic differs in the last bits of float32, in steps of 255.
LAST_BITS = 2
SEEDS = itertools.count(100)
MANY_LORAS = "LoRAs on one model, more than max_loras, which "


# Text encoders in float32, as blocks decode: by default the host rounds them to float16. Attention that torch.compile
# takes whole: the host's own for CPUs asks how much memory is free.
ARGUMENTS = ["--fp32-text-enc", "--use-pytorch-cross-attention"]


@pytest.fixture(scope="module")
def exact(comfyui, samples, tmp_path_factory):
    """A server with arithmetic that GGUF files and their decoded weights share."""
    base = tmp_path_factory.mktemp("exact")
    with running_server(comfyui, base, samples.MODELS, ARGUMENTS, settings={"TORCH_LOGS": "graph_breaks"}) as server:
        yield server


def picture(server: Server, graph: Graph) -> np.ndarray:
    """int [height, width, 3] of the one picture that a workflow makes."""
    (image,) = server.run(graph).pictures()
    return np.asarray(image).astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def model(samples: ModuleType, name: str, type_name: str) -> tuple[dict, dict]:
    """(the pack's loader on a GGUF file, ComfyUI's on what it decodes to)"""
    decoded = samples.decoded(name, type_name, torch.float32).name
    return (
        node("UnetLoaderGGUF", unet_name=samples.gguf(name, type_name).name),
        node("UNETLoader", unet_name=decoded, weight_dtype="default"),
    )


def vae(samples: ModuleType, name: str, type_name: str) -> tuple[dict, dict]:
    decoded = samples.decoded(name, type_name, torch.float32).name
    return node("VAELoaderGGUF", vae_name=samples.gguf(name, type_name).name), node("VAELoader", vae_name=decoded)


def encoder(name: str, type_name: str, kind: str, samples: ModuleType) -> tuple[dict, dict]:
    decoded = samples.decoded(name, type_name, torch.float32).name
    return (
        node("CLIPLoaderGGUF", clip_name=samples.gguf(name, type_name).name, type=kind),
        node("CLIPLoader", clip_name=decoded, type=kind),
    )


def small_flux_encoders(samples: ModuleType) -> tuple[dict, dict]:
    """ComfyUI's own node knows no shrunken encoders: its engine gets the decoded ones through the pack's node."""
    packed = [samples.gguf("tiny_clip_l", "Q8_0"), samples.gguf("tiny_t5", "Q4_K", "llama.cpp")]
    decoded = [samples.decoded(*sample, torch.float32) for sample in (("tiny_clip_l", "Q8_0"), ("tiny_t5", "Q4_K"))]
    return tuple(
        node("DualCLIPLoaderGGUF", clip_name1=first.name, clip_name2=second.name, type="flux")
        for first, second in (packed, decoded)
    )


def small_umt5(samples: ModuleType) -> tuple[dict, dict]:
    """As `small_flux_encoders`; of F16, whose decoded weights are those of the sample, which has its tokenizer too."""
    files = [samples.gguf("tiny_umt5", "F16", "llama.cpp"), samples.sample("tiny_umt5")]
    return tuple(node("CLIPLoaderGGUF", clip_name=file.name, type="wan") for file in files)


# Diffusion model, text encoders, VAE; then what the workflow changes of the usual one.
MODELS = {
    "flux": (("tiny_flux_256", "Q5_K"), small_flux_encoders, ("tiny_flux_vae", "Q8_0"), {}),
    "flux, CLIP-L alone": (
        ("tiny_flux", "Q4_K"),
        partial(encoder, "clip_l", "Q5_K", "stable_diffusion"),
        ("tiny_flux_vae", "Q4_0"),
        {},
    ),
    "flux, T5-base": (
        ("tiny_flux", "IQ4_XS"),
        partial(encoder, "t5_base", "Q4_K", "stable_audio"),
        ("tiny_flux_taesd", "Q8_0"),
        {},
    ),
    "sd3": (("tiny_sd3", "Q6_K"), partial(encoder, "clip_l", "Q4_1", "sd3"), ("tiny_flux_vae", "Q8_0"), {}),
    "wan": (("tiny_wan", "Q3_K"), small_umt5, ("tiny_wan_vae", "Q8_0"), {"latent": "EmptyHunyuanLatentVideo"}),
    "sd15": (
        ("tiny_sd15", "Q8_0"),
        partial(encoder, "clip_l", "Q5_K", "stable_diffusion"),
        ("tiny_sd15_vae", "Q8_0"),
        {"latent": "EmptyLatentImage", "cfg": 7.0},
    ),
}


def both_graphs(samples: ModuleType, name: str) -> tuple[Graph, Graph]:
    model_files, encoders, vae_files, options = MODELS[name]
    loaders = zip(model(samples, *model_files), encoders(samples), vae(samples, *vae_files), strict=True)
    graphs = tuple(text_to_image(*nodes, **options) for nodes in loaders)
    if name == "wan":
        for graph in graphs:
            graph["latent"]["inputs"]["length"] = 1
    return graphs


@pytest.mark.parametrize("name", MODELS)
def test_picture_is_that_of_the_decoded_weights(exact, samples, name):
    ours, hosts = both_graphs(samples, name)
    actual = picture(exact, ours)
    assert actual.std() > 1
    assert difference(actual, picture(exact, hosts)) == 0


# The encoders that SD3 wants beside CLIP-L. ComfyUI takes CLIP-G, where it is not alone, at its full size only.
SD3_ENCODERS = {
    "clip_g-TQ2_0.gguf": (
        "clip_l",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
    ),
    "t5_4096-TQ2_0.gguf": (
        "t5",
        "t5_config_xxl.json",
        {"d_model": 4096, "d_ff": 256, "d_kv": 64, "num_heads": 4, "num_layers": 2},
    ),
}
INCUMBENT = {
    "UnetLoaderGGUF": ["unet_name"],
    "UnetLoaderGGUFAdvanced": ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
    "CLIPLoaderGGUF": ["clip_name", "type"],
    "DualCLIPLoaderGGUF": ["clip_name1", "clip_name2", "type"],
    "TripleCLIPLoaderGGUF": ["clip_name1", "clip_name2", "clip_name3"],
    "QuadrupleCLIPLoaderGGUF": ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
}


def write_gguf(path: Path, tensors: dict) -> None:
    """A GGUF file of {name: array, or (blocks uint8 [..., bytes of a row], type)}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "test")
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Random TQ2_0 blocks for a matrix whose rows fit them, else the gain or bias of a norm that does nothing."""
    if len(shape) < 2 or shape[-1] % 256:
        return np.full(shape, not key.endswith("bias"), np.float32)
    n_blocks = int(np.prod(shape)) // 256
    pool = random_blocks("TQ2_0", 4096)
    blocks = pool.repeat(-(-n_blocks // len(pool)), 1)[:n_blocks]
    return blocks.reshape(*shape[:-1], -1).numpy(), gguf.GGMLQuantizationType.TQ2_0


@pytest.fixture(scope="module")
def sd3_encoders(exact):
    """Files of SD3_ENCODERS in a folder where the server looks for text encoders."""
    from host import architectures

    for file, (shapes, *arguments) in SD3_ENCODERS.items():
        table = getattr(architectures, shapes)(*arguments)
        write_gguf(exact.base / "output" / "clip" / file, {key: random_tensor(key, table[key]) for key in table})


@pytest.fixture
def incumbent(exact, samples, sd3_encoders):
    """A workflow made for the incumbent, as the API takes it."""
    for name, type_name in (("tiny_flux_256", "Q5_K"), ("tiny_flux", "Q4_K"), ("tiny_sd3", "Q6_K"), ("clip_l", "Q5_K")):
        samples.gguf(name, type_name)
    samples.gguf("tiny_t5", "Q4_K", "llama.cpp")
    samples.sample("tiny_clip_l")
    samples.sample("tiny_flux_vae")
    return json.loads((WORKFLOWS / "incumbent_api.json").read_text())


def test_a_workflow_of_the_incumbent_runs_unchanged(exact, incumbent):
    pictures = [np.asarray(image) for image in exact.run(incumbent).pictures()]
    assert len(pictures) == 3
    assert all(picture.std() > 1 for picture in pictures)
    assert {entry["class_type"] for entry in incumbent.values()} >= INCUMBENT.keys()


def test_a_page_of_the_incumbent_is_the_same_workflow(exact, incumbent):
    page = json.loads((WORKFLOWS / "incumbent_page.json").read_text())
    assert from_page(page, exact.object_info()) == incumbent


@pytest.mark.parametrize("name", INCUMBENT)
def test_inputs_are_those_of_the_incumbent(exact, name):
    inputs = exact.object_info()[name]["input"]
    assert list(inputs["required"]) == INCUMBENT[name]
    assert list(inputs["optional"]) == ["compute"]


def test_three_encoders_of_both_kinds_in_any_order(exact, samples, sd3_encoders):
    model_node, _ = model(samples, "tiny_sd3", "Q6_K")
    _, vae_node = vae(samples, "tiny_flux_vae", "Q8_0")
    clip_l = [samples.gguf("clip_l", "Q5_K"), samples.decoded("clip_l", "Q5_K", torch.float32)]
    clip_g, t5 = SD3_ENCODERS
    pictures = []
    for names in ((clip_l[0].name, clip_g, t5), (t5, clip_l[1].name, clip_g)):
        names = {f"clip_name{number}": name for number, name in enumerate(names, 1)}
        graph = text_to_image(model_node, node("TripleCLIPLoaderGGUF", **names), vae_node)
        graph["sampler"]["inputs"]["negative"] = ["positive", 0]
        pictures.append(picture(exact, graph))
    assert difference(*pictures) == 0


def test_a_llama_among_four_encoders_is_named(exact, samples, sd3_encoders):
    """HiDream's fourth encoder is a language model, which this version does not load."""
    llama = exact.base / "output" / "clip" / "llama.gguf"
    write_gguf(llama, {"token_embd.weight": np.ones((8, 8), np.float32), "blk.0.attn_norm.weight": np.ones(8, "f")})
    names = (samples.gguf("clip_l", "Q5_K").name, *SD3_ENCODERS, llama.name)
    loader = node("QuadrupleCLIPLoaderGGUF", **{f"clip_name{number}": name for number, name in enumerate(names, 1)})
    with pytest.raises(WorkflowError, match=r"llama\.gguf: .*language model.* later version") as caught:
        exact.run(
            text_to_image(model(samples, "tiny_flux", "Q4_K")[0], loader, vae(samples, "tiny_flux_vae", "Q8_0")[0])
        )
    assert caught.value.node == "QuadrupleCLIPLoaderGGUF"


def saved(server: Server, folder: str) -> Path:
    """The one file that a node has just saved, taken from its folder under output/, which the server reads too."""
    (file,) = (server.base / "output" / folder).glob("saved_*.safetensors")
    return file


@pytest.fixture
def clean_output(exact):
    """Nothing saved by a test is left for the next."""
    yield
    for file in (exact.base / "output").rglob("saved_*.safetensors"):
        file.unlink()


def flux_with_clip_l(samples: ModuleType) -> Graph:
    return both_graphs(samples, "flux, CLIP-L alone")[0]


def with_loras(graph: Graph, *names_and_strengths: tuple[str, float, float]) -> Graph:
    """The graph with LoraLoaderGGUF between loaders and what they feed."""
    inputs = {}
    for number, (name, strength_model, strength_clip) in enumerate(names_and_strengths, 1):
        inputs[f"lora_{number}"] = name
        inputs[f"strength_model_{number}"] = strength_model
        inputs[f"strength_clip_{number}"] = strength_clip
    return fed_by(graph, node("LoraLoaderGGUF", model=["model", 0], clip=["clip", 0], **inputs))


def with_host_loras(graph: Graph, *names_and_strengths: tuple[str, float, float]) -> Graph:
    """The same with a chain of ComfyUI's own LoraLoader."""
    for name, strength_model, strength_clip in names_and_strengths:
        inputs = {"lora_name": name, "strength_model": strength_model, "strength_clip": strength_clip}
        source = {"model": graph["sampler"]["inputs"]["model"], "clip": graph["positive"]["inputs"]["clip"]}
        graph = fed_by(graph, node("LoraLoader", **source, **inputs), name=f"lora_{len(graph)}")
    return graph


def fed_by(graph: Graph, loader: dict, name: str = "lora") -> Graph:
    """A copy whose sampler and prompts take model and text encoder from `loader`."""
    graph = json.loads(json.dumps(graph)) | {name: loader}
    graph["sampler"]["inputs"]["model"] = [name, 0]
    graph["positive"]["inputs"]["clip"] = graph["negative"]["inputs"]["clip"] = [name, 1]
    return graph


@pytest.fixture
def loras(samples):
    return samples.sample("tiny_flux_lora").name, samples.sample("clip_l_lora").name


def test_a_saved_model_gives_the_same_picture(exact, samples, clean_output):
    graph = flux_with_clip_l(samples)
    save = node("ModelSave", model=["model", 0], filename_prefix="diffusion_models/saved")
    exact.run({"model": graph["model"], "save": save})
    again = graph | {
        "model": node("UNETLoader", unet_name=saved(exact, "diffusion_models").name, weight_dtype="default")
    }
    assert difference(picture(exact, again), picture(exact, graph)) == 0


def test_a_model_saved_with_a_lora_has_it_inside(exact, samples, loras, clean_output):
    graph = flux_with_clip_l(samples)
    with_lora = with_loras(graph, (loras[0], 1.0, 0.0))
    save = node("ModelSave", model=["lora", 0], filename_prefix="diffusion_models/saved")
    exact.run({key: with_lora[key] for key in ("model", "clip", "lora")} | {"save": save})
    again = graph | {
        "model": node("UNETLoader", unet_name=saved(exact, "diffusion_models").name, weight_dtype="default")
    }
    merged = picture(exact, again)
    assert difference(merged, picture(exact, with_lora)) <= LAST_BITS
    assert difference(merged, picture(exact, graph)) > 10 * LAST_BITS


def test_a_saved_checkpoint_gives_the_same_picture(exact, samples, clean_output):
    graph, _ = both_graphs(samples, "sd15")
    save = node(
        "CheckpointSave", model=["model", 0], clip=["clip", 0], vae=["vae", 0], filename_prefix="checkpoints/saved"
    )
    exact.run({key: graph[key] for key in ("model", "clip", "vae")} | {"save": save})
    again = graph | {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=saved(exact, "checkpoints").name)}
    again["sampler"]["inputs"]["model"] = ["checkpoint", 0]
    again["positive"]["inputs"]["clip"] = again["negative"]["inputs"]["clip"] = ["checkpoint", 1]
    again["image"]["inputs"]["vae"] = ["checkpoint", 2]
    for loader in ("model", "clip", "vae"):
        del again[loader]
    expected = picture(exact, both_graphs(samples, "sd15")[0])
    assert difference(picture(exact, again), expected) == 0


def test_loras_on_off_and_on_again(exact, samples, loras):
    graph = flux_with_clip_l(samples)
    on = with_loras(graph, (loras[0], 1.0, 0.0), (loras[1], 0.0, 1.0))
    plain = picture(exact, graph)
    strong = picture(exact, on)
    weak = picture(exact, with_loras(graph, (loras[0], 0.25, 0.0), (loras[1], 0.0, 1.0)))
    only_model = picture(exact, with_loras(graph, (loras[0], 1.0, 0.0)))
    only_clip = picture(exact, with_loras(graph, (loras[1], 0.0, 1.0)))
    distinct = {one.tobytes() for one in (plain, strong, weak, only_model, only_clip)}
    assert len(distinct) == 5
    # Not from the server's cache.
    exact.free()
    assert difference(picture(exact, on), strong) == 0
    assert difference(picture(exact, graph), plain) == 0
    assert difference(picture(exact, with_loras(graph, (loras[0], 0.0, 0.0))), plain) == 0


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_lora_nodes_of_the_host_give_the_same_picture(exact, samples, loras, strength):
    both = (loras[0], strength, 0.0), (loras[1], 0.0, strength)
    graph, decoded = both_graphs(samples, "flux, CLIP-L alone")
    ours = picture(exact, with_loras(graph, *both))
    assert difference(ours, picture(exact, with_host_loras(graph, *both))) == 0
    # There the host merges the LoRA into the dense weight: the same sum in another order.
    assert difference(ours, picture(exact, with_host_loras(decoded, *both))) <= LAST_BITS


def test_the_model_only_node_of_the_host_gives_the_same_picture(exact, samples, loras):
    graph = flux_with_clip_l(samples)
    alone = graph | {"lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=loras[0], strength_model=0.7)}
    alone["sampler"] = node("KSampler", **alone["sampler"]["inputs"] | {"model": ["lora", 0]})
    assert difference(picture(exact, alone), picture(exact, with_loras(graph, (loras[0], 0.7, 0.0)))) == 0


def test_a_lora_for_another_model_says_so(exact, samples):
    name = "stranger.safetensors"
    folder = exact.base / "output" / "loras"
    folder.mkdir(exist_ok=True)
    save_file({f"lora_unet_nowhere.lora_{way}.weight": torch.ones(4, 4) for way in ("up", "down")}, folder / name)
    with pytest.raises(WorkflowError, match=r"stranger\.safetensors: none of its 2 keys .* lora_unet_nowhere\.lora_"):
        exact.run(with_loras(flux_with_clip_l(samples), (name, 1.0, 1.0)))


def test_more_loras_than_max_loras_are_applied_and_their_cost_is_said_once(exact, samples, loras):
    """In one node, as a workflow saved with a larger max_loras has them, and in chained ones of both kinds."""
    graph = flux_with_clip_l(samples)
    two = with_loras(graph, (loras[0], 0.5, 0.0), (loras[0], 0.25, 0.0))
    picture(exact, two)
    assert MANY_LORAS not in exact.log()
    three = with_loras(graph, *[(loras[0], strength, 0.0) for strength in (0.5, 0.25, 0.125)])
    pictures = [
        picture(exact, three),
        picture(exact, with_host_loras(two, (loras[0], 0.125, 0.0))),
        picture(exact, with_loras(graph, (loras[0], 0.875, 0.0))),
    ]
    assert difference(pictures[0], pictures[1]) == 0
    assert difference(pictures[0], pictures[2]) <= LAST_BITS
    assert exact.log().count(MANY_LORAS) == 1
    assert re.search(MANY_LORAS + r"is 2\..* now [0-9.]+ % more multiplications in .* and [0-9.]+ MB", exact.log())


def test_loras_are_read_once_and_ahead(exact, samples, loras):
    """The server's log has one line for each file that comes into memory."""
    graph = flux_with_clip_l(samples)
    ahead = exact.base / "output" / "loras" / "ahead.safetensors"
    ahead.parent.mkdir(exist_ok=True)
    shutil.copyfile(samples.sample("tiny_flux_lora"), ahead)
    stays = f"LoRA {ahead.name} stays in memory"
    with_list = with_loras(graph, (loras[0], 0.75, 0.0))
    # As the page sends a list: bare, two of them would be a link to another node.
    with_list["lora"]["inputs"]["preload"] = {"__value__": [ahead.name, loras[0]]}
    before = picture(exact, with_list)
    assert exact.log().count(stays) == 1
    # From memory: the file is not there any more, but for its name and its version.
    status = ahead.stat()
    ahead.write_bytes(bytes(status.st_size))
    os.utime(ahead, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert difference(picture(exact, with_loras(graph, (ahead.name, 0.75, 0.0))), before) == 0
    assert exact.log().count(stays) == 1
    os.utime(ahead)
    with pytest.raises(WorkflowError, match=r"ahead\.safetensors: cannot be read as a LoRA"):
        exact.run(with_loras(graph, (ahead.name, 0.7, 0.0)))
    ahead.unlink()


def compiled(graph: Graph) -> Graph:
    """A copy with TorchCompileModel before the sampler."""
    inputs = graph["sampler"]["inputs"]
    compiler = node("TorchCompileModel", model=inputs["model"], backend="inductor")
    return graph | {"compiled": compiler, "sampler": node("KSampler", **inputs | {"model": ["compiled", 0]})}


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason=NO_COMPILER)
def test_compiled_model_gives_the_same_picture(exact, samples, loras):
    """Slow: half a minute of compiling with a LoRA, and a quarter of one without it."""
    plain = text_to_image(*(flux_with_clip_l(samples)[key] for key in ("model", "clip", "vae")), steps=1)
    for graph in (with_loras(plain, (loras[0], 1.0, 0.0)), plain):
        assert difference(picture(exact, compiled(graph)), picture(exact, graph)) <= LAST_BITS
    assert "Graph break" not in exact.log()


def truncated(samples: ModuleType, path: Path) -> None:
    whole = samples.gguf("tiny_flux", "Q4_K").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def of_no_model(samples: ModuleType, path: Path) -> None:
    write_gguf(path, {"strange.weight": np.ones((8, 8), np.float32)})


def text_encoder(samples: ModuleType, path: Path) -> None:
    shutil.copyfile(samples.gguf("tiny_t5", "Q4_K", "llama.cpp"), path)


def sampled_anew(graph: Graph, **changes: int) -> Graph:
    """A copy with a seed of its own, so that nothing comes from the server's cache."""
    inputs = graph["sampler"]["inputs"] | {"seed": next(SEEDS), **changes}
    return graph | {"sampler": node("KSampler", **inputs)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, r"bad\.gguf: [\d,]+ bytes are missing"),
        (of_no_model, r"bad\.gguf: holds no diffusion model .*strange\.weight"),
        (text_encoder, r"bad\.gguf: holds no diffusion model .*text encoder belongs into a CLIP loader"),
    ],
)
def test_a_bad_file_is_named_and_the_server_goes_on(exact, samples, make, message):
    graph = flux_with_clip_l(samples)
    bad = exact.base / "output" / "diffusion_models" / "bad.gguf"
    bad.parent.mkdir(exist_ok=True)
    make(samples, bad)
    with pytest.raises(WorkflowError, match=message) as caught:
        exact.run(graph | {"model": node("UnetLoaderGGUF", unet_name=bad.name)})
    assert caught.value.node == "UnetLoaderGGUF"
    assert picture(exact, sampled_anew(graph)).std() > 1


def test_cancel_stops_sampling(exact, samples):
    graph = flux_with_clip_l(samples)
    done = []

    def cancel(node_class: str, step: int, steps: int) -> None:
        done.append(step)
        exact.request("/interrupt", {})

    with pytest.raises(WorkflowError, match="interrupted"):
        exact.run(sampled_anew(graph, steps=5000), cancel)
    assert max(done) < 1000
    assert picture(exact, sampled_anew(graph)).std() > 1
