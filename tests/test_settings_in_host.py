"""What each setting does in the real server: what stays loaded, what the process maps, how a batch is decoded."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from adapters import pairs, tensors
from host.client import Graph
from host.environment import ROOT
from host.server import PACK, Server, running_server
from host.workflows import node, text_to_image
from safetensors.torch import save_file

SECONDS_TO_LET_GO = 20
# In steps of 255: torch rounds a convolution of one picture otherwise than that of a batch, in the last bits.
BY_SLICING = 1
UNLOADING = re.compile(r"GGUF Native: unloading (\w+) \((.+)\): (.+)\.")
COMPUTE = re.compile(r"GGUF Native: some layers compute exactly instead of in (\w+), which is slower: (.+)\.")
MANY_LORAS = "2 LoRAs on one model, more than max_loras, which"
LORA_FILES = re.compile(r"GGUF Native: LoRA (\w+)\.safetensors (stays in|leaves) memory")
KEPT = re.compile(r"GGUF Native: quant_cache_size: (\d+) of (\d+) decoded weights are kept while sampling, ([\d.]+) MB")
DECODING = "GGUF Native: decoding 2 latent(s) one at a time (vae_slicing)."
STRIPS = "do not fit for one picture: decoding it in strips of rows."
TILES = "do not fit for one picture: decoding it in tiles."
# Pixels at the left and the right of 768 that tiles decode as the whole: the decoder of tiny_flux_taesd sees 19 latents
# of 8 pixels to each side, and the outermost tile is 32 wide.
UNSEAMED = (32 - 19) * 8
# Loaded models as the log names them.
TEXT, FLUX = ("FluxClipModel_", "text encoder"), ("Flux", "diffusion model")
LOADING_VAE = "Requested to load AutoencodingEngine"

# A node of the tests alone, by which the server tells what it holds: names of models, the most recently used first.
TELL_LOADED_MODELS = """
import comfy.model_management
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/loaded_models")
async def loaded_models(request):
    loaded = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return web.json_response([patcher.model.__class__.__name__ for patcher in loaded if patcher is not None])
"""
# A node of the tests alone, by which the host finds little memory free, as on a small card.
LITTLE_MEMORY = """
import comfy.model_management

NODE_CLASS_MAPPINGS = {}
comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (
    (2**26, 2**26) if torch_free_too else 2**26
)
"""
VAE = "AutoencodingEngine"
MANY_STEPS = 8
# Two cores that other processes use make two threads wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

needs_memory_maps = pytest.mark.skipif(
    not hasattr(psutil.Process, "memory_maps"), reason="this system does not tell what a process has mapped"
)


@contextmanager
def server_with(
    comfyui: Path, samples: ModuleType, base: Path, config_json: str | None = None, **settings: str
) -> Iterator[Server]:
    """A server with GGUF_NATIVE_<key> in its environment, and with a config.json in a copy of the pack."""
    if config_json is not None:
        pack = base / "custom_nodes" / PACK
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".*", "tests", "docs", "config.json"))
        (pack / "config.json").write_text(config_json)
    (base / "custom_nodes").mkdir(exist_ok=True)
    (base / "custom_nodes" / "tell_loaded_models.py").write_text(TELL_LOADED_MODELS)
    variables = {f"GGUF_NATIVE_{key.upper()}": value for key, value in settings.items()}
    with running_server(comfyui, base, samples.MODELS, settings=ONE_THREAD | variables) as server:
        yield server


def flux(samples: ModuleType, prompt: str = "a cat") -> Graph:
    """A batch of two pictures from GGUF files alone."""
    clip_names = {
        "clip_name1": samples.gguf("tiny_clip_l", "Q8_0").name,
        "clip_name2": samples.gguf("tiny_t5", "Q4_K", "llama.cpp").name,
    }
    graph = text_to_image(
        node("UnetLoaderGGUF", unet_name=samples.gguf("tiny_flux_256", "Q5_K").name),
        node("DualCLIPLoaderGGUF", type="flux", **clip_names),
        node("VAELoaderGGUF", vae_name=samples.gguf("tiny_flux_vae", "Q8_0").name),
    )
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["positive"]["inputs"]["text"] = prompt
    return graph


def two_models(samples: ModuleType, prompt: str) -> Graph:
    """The same, sampled by one diffusion model and then by another."""
    graph = flux(samples, prompt)
    second = graph["sampler"]["inputs"] | {"model": ["second", 0], "latent_image": ["sampler", 0]}
    graph["second"] = node("UnetLoaderGGUF", unet_name=samples.gguf("tiny_flux_256", "Q8_0").name)
    graph["second_sampler"] = node("KSampler", **second)
    graph["image"]["inputs"]["samples"] = ["second_sampler", 0]
    return graph


def unloaded(log: str) -> list[tuple[str, str, str]]:
    """(model, kind, reason) of every model that the pack unloaded, in the log's order."""
    return UNLOADING.findall(log)


def held(server: Server) -> list[str]:
    """The models that hold memory now, the most recently used first."""
    return server.request("/loaded_models")


def held_while_sampling(server: Server, graph: Graph) -> list[list[str]]:
    """What was held at the first step of each sampler, by name; there are so many that the answer is not late."""
    for sampler in graph.values():
        if sampler["class_type"] == "KSampler":
            sampler["inputs"]["steps"] = MANY_STEPS
    seen = []
    server.run(graph, lambda node_class, step, steps: seen.append(sorted(held(server))) if step == 1 else None)
    return seen


def mapped(server: Server) -> bool:
    """Whether the server has the diffusion model of `flux` mapped, as far as the system says."""
    maps = psutil.Process(server.pid).memory_maps(grouped=False)
    return any(Path(entry.path).name == "tiny_flux_256-Q5_K.gguf" for entry in maps)


def lets_go(server: Server) -> bool:
    """Whether the file is no longer mapped soon after the host was asked to forget its models."""
    server.free()
    deadline = time.monotonic() + SECONDS_TO_LET_GO
    while mapped(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not mapped(server)


def pictures(server: Server, graph: Graph) -> np.ndarray:
    """int [2, height, width, 3]"""
    return np.stack([np.asarray(picture).astype(int) for picture in server.run(graph).pictures()])


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


@pytest.fixture(scope="module")
def plain(comfyui, samples, tmp_path_factory):
    """A server with the defaults."""
    with server_with(comfyui, samples, tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def plain_pictures(plain, samples):
    return pictures(plain, flux(samples))


def test_by_default_the_least_recently_used_of_two_leaves(plain, samples, plain_pictures):
    assert unloaded(plain.log()) == []
    assert held(plain) == [VAE, FLUX[0], TEXT[0]]
    reason = "max_parallel_models is 2"
    while_sampling = held_while_sampling(plain, two_models(samples, "a dog"))
    assert unloaded(plain.log()) == [(*TEXT, reason)]
    # The second model takes the place of the encoder, where the first is used before it.
    assert while_sampling == [[VAE, FLUX[0], TEXT[0]], [VAE, FLUX[0], FLUX[0]]]
    assert held(plain) == [VAE, FLUX[0], FLUX[0]]
    plain.run(two_models(samples, "a fox"))
    # For the encoder the first model leaves, for the first the second, for the second the encoder.
    assert unloaded(plain.log())[1:] == [(*FLUX, reason), (*FLUX, reason), (*TEXT, reason)]


@needs_memory_maps
def test_a_streamed_file_is_mapped_while_its_model_is_there(plain, samples, plain_pictures):
    plain.run(flux(samples, "a wolf"))
    assert mapped(plain)
    assert lets_go(plain)


def test_compute_without_a_gpu_is_exact_and_says_so_once(plain, samples, plain_pictures):
    graph = flux(samples)
    for loader in ("model", "clip"):
        graph[loader]["inputs"]["compute"] = "fp8"
    assert difference(pictures(plain, graph), plain_pictures) == 0
    assert COMPUTE.findall(plain.log()) == [("fp8", "it needs an NVIDIA GPU")]


def test_decoded_weights_are_kept(comfyui, samples, tmp_path, plain, plain_pictures):
    """All of the small model by default; as many as fit a megabyte, the same picture."""
    assert all(kept == of for kept, of, _ in KEPT.findall(plain.log()))
    assert KEPT.search(plain.log())
    with server_with(comfyui, samples, tmp_path, quant_cache_size="1") as server:
        assert difference(pictures(server, flux(samples)), plain_pictures) == 0
        ((kept, of, megabytes),) = KEPT.findall(server.log())
        assert 0 < int(kept) < int(of)
        assert float(megabytes) <= 1


def test_one_at_a_time_and_nothing_mapped(comfyui, samples, tmp_path, plain_pictures):
    settings = {"max_parallel_models": "1", "streaming_loading": "off", "quant_cache_size": "0"}
    with server_with(comfyui, samples, tmp_path, **settings) as server:
        assert difference(pictures(server, flux(samples)), plain_pictures) == 0
        assert unloaded(server.log()) == [(*TEXT, "max_parallel_models is 1")]
        assert KEPT.findall(server.log()) == []
        assert held(server) == [VAE, FLUX[0]]
        assert not (hasattr(psutil.Process, "memory_maps") and mapped(server))


def test_aggressive_leaves_the_memory_to_decoding(comfyui, samples, tmp_path, plain_pictures):
    with server_with(comfyui, samples, tmp_path, memory_mode="aggressive") as server:
        assert difference(pictures(server, flux(samples)), plain_pictures) == 0
        before, loading_vae, after = server.log().partition(LOADING_VAE)
        expected = [(*TEXT, "before the diffusion model loads"), (*FLUX, "memory_mode is aggressive")]
        assert unloaded(before) == expected
        assert loading_vae
        assert unloaded(after) == []
        assert held(server) == [VAE]


def test_sequential_processing_and_vae_slicing(comfyui, samples, tmp_path, plain_pictures):
    settings = {"sequential_processing": "yes", "vae_slicing": "1"}
    with server_with(comfyui, samples, tmp_path, **settings) as server:
        assert difference(pictures(server, flux(samples)), plain_pictures) <= BY_SLICING
        text_leaves = (*TEXT, "before the diffusion model loads")
        assert unloaded(server.log()) == [text_leaves]
        assert server.log().count(DECODING) == 1
        # Gone before, not while, the other loads.
        _, _, after = server.log().partition("Requested to load Flux\n")
        assert after.index("unloading FluxClipModel_") < after.index("loaded completely")
        assert held_while_sampling(server, flux(samples, "a dog")) == [[VAE, FLUX[0]]]
        assert unloaded(server.log()) == [text_leaves, (*FLUX, "before the text encoder loads"), text_leaves]


def peak(server: Server, graph: Graph) -> int:
    """The most bytes that the server had in RAM within a run, beyond what it had before."""
    process = Path(f"/proc/{server.pid}")
    (process / "clear_refs").write_text("5")
    before = psutil.Process(server.pid).memory_info().rss
    server.run(graph)
    return int(re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[1]) * 1024 - before


@pytest.fixture(scope="module")
def small(comfyui, samples, tmp_path_factory):
    """A server with vae_slicing that finds little memory free."""
    base = tmp_path_factory.mktemp("small")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "little_memory.py").write_text(LITTLE_MEMORY)
    with server_with(comfyui, samples, base, vae_slicing="on") as server:
        yield server


def one_picture(samples: ModuleType, width: int, height: int) -> Graph:
    graph = flux(samples)
    graph["latent"]["inputs"] |= {"width": width, "height": height, "batch_size": 1}
    graph["sampler"]["inputs"]["steps"] = 1
    return graph


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of a process")
def test_vae_slicing_of_a_picture_that_does_not_fit(samples, plain, small):
    """The picture by the first run, the peak by a second one that samples nothing."""
    large = one_picture(samples, 512, 512)
    again = large | {"image": node("VAEDecode", samples=["latent", 0], vae=["vae", 0])}
    expected = pictures(plain, large)
    assert difference(pictures(small, large), expected) <= BY_SLICING
    peaks = peak(small, again), peak(plain, again)
    assert small.log().count(STRIPS) == 2
    assert STRIPS not in plain.log()
    assert peaks[0] < 0.7 * peaks[1]


def test_vae_slicing_of_a_picture_that_goes_in_tiles(samples, plain, small):
    """A decoder that strips do not know; at both ends of the picture a tile sees all that the whole one shows it."""
    wide = one_picture(samples, 768, 64)
    wide["vae"]["inputs"]["vae_name"] = samples.gguf("tiny_flux_taesd", "Q8_0").name
    expected, tiled = pictures(plain, wide), pictures(small, wide)
    assert difference(tiled[:, :, :UNSEAMED], expected[:, :, :UNSEAMED]) <= BY_SLICING
    assert difference(tiled[:, :, -UNSEAMED:], expected[:, :, -UNSEAMED:]) <= BY_SLICING
    # What a tile does not see shows at its seams.
    assert difference(tiled, expected) > BY_SLICING
    assert small.log().count(TILES) == 1
    assert TILES not in plain.log()


def with_loras(graph: Graph, *names: str) -> Graph:
    """A copy with a chain of LoraLoaderGGUF before the sampler, one LoRA in each."""
    graph = graph | {"sampler": node("KSampler", **graph["sampler"]["inputs"])}
    for name in names:
        model = graph["sampler"]["inputs"]["model"]
        graph[name] = node("LoraLoaderGGUF", model=model, lora_1=name, strength_model_1=0.5)
        graph["sampler"]["inputs"]["model"] = [name, 0]
    return graph


def test_preload_loras_and_max_loras(comfyui, samples, tmp_path, plain_pictures):
    """A megabyte of memory for two LoRAs of 0.6 each: with each change of them one leaves."""
    folder = tmp_path / "output" / "loras"
    folder.mkdir(parents=True)
    shapes = pairs(".lora_B.weight", ".lora_A.weight", {"diffusion_model.single_blocks.0.linear1": (1792, 256)})
    for seed, name in enumerate(("one.safetensors", "two.safetensors")):
        unused = {"of another model": torch.zeros(2**17 + 2**14)}
        save_file(tensors(shapes, seed) | unused, folder / name)
    with server_with(comfyui, samples, tmp_path, preload_loras="1", max_loras="1") as server:
        assert "lora_1" in (inputs := server.object_info()["LoraLoaderGGUF"]["input"]["optional"])
        assert "lora_2" not in inputs
        one = pictures(server, with_loras(flux(samples), "one.safetensors"))
        assert difference(one, plain_pictures) > 0
        assert MANY_LORAS not in server.log()
        both = pictures(server, with_loras(flux(samples), "one.safetensors", "two.safetensors"))
        assert difference(both, one) > 0
        assert server.log().count(MANY_LORAS + " is 1.") == 1
        assert LORA_FILES.findall(server.log()) == [("one", "stays in"), ("one", "leaves"), ("two", "stays in")]
        assert "leaves memory: preload_loras is 1 MB." in server.log()


def test_environment_goes_before_config_json(comfyui, samples, tmp_path, plain_pictures):
    """And conservative mode does not enforce max_parallel_models."""
    config_json = '{"memory_mode": "aggressive", "vae_slicing": true, "max_parallel_models": 1}'
    with server_with(comfyui, samples, tmp_path, config_json, memory_mode="conservative") as server:
        assert difference(pictures(server, flux(samples)), plain_pictures) <= BY_SLICING
        assert unloaded(server.log()) == []
        assert held(server) == [VAE, FLUX[0], TEXT[0]]
        server.run(two_models(samples, "a dog"))
        assert held(server) == [VAE, FLUX[0], FLUX[0], TEXT[0]]
        assert DECODING in server.log()


def test_a_bad_value_is_said_at_the_start(comfyui, samples, tmp_path):
    """The host starts without the pack's nodes and says why, as for every pack that it cannot import."""
    with server_with(comfyui, samples, tmp_path, max_parallel_models="0") as server:
        assert not any("GGUF" in name for name in server.object_info())
        assert re.search(r"'GGUF_NATIVE_MAX_PARALLEL_MODELS' is 0; allowed is a whole number of models", server.log())
        assert re.search(rf"IMPORT FAILED.*{PACK}", server.log())
