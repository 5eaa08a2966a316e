"""Many runs in one server: models, sizes, batches and LoRAs change at random, and no picture ever depends on the past.

SOAK_RUNS sets how many; 40 take about a minute on two idle cores.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import pytest
from host.client import Graph
from host.server import Server, running_server
from host.workflows import node, text_to_image

RUNS = int(os.environ.get("SOAK_RUNS", "40"))
# Every model without LoRAs, with one and with two; so few that each returns several times.
N_SETTINGS = 15
# Only what the last run made is kept: whatever returns later is computed again.
ARGUMENTS = ["--cache-classic"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
LEAKS = ("memory leak", "Traceback", "Ran out of memory")


def flux_clip(samples: ModuleType) -> dict:
    names = samples.gguf("tiny_clip_l", "Q8_0").name, samples.gguf("tiny_t5", "Q4_K", "llama.cpp").name
    return node("DualCLIPLoaderGGUF", clip_name1=names[0], clip_name2=names[1], type="flux")


def wan_clip(samples: ModuleType) -> dict:
    return node("CLIPLoaderGGUF", clip_name=samples.gguf("tiny_umt5", "F16", "llama.cpp").name, type="wan")


def clip_l(samples: ModuleType, kind: str) -> dict:
    return node("CLIPLoaderGGUF", clip_name=samples.gguf("clip_l", "Q5_K").name, type=kind)


@dataclass(frozen=True)
class Model:
    """Samples for a picture: diffusion model, text encoders, VAE; then the node of its latents and its guidance."""

    diffusion: tuple[str, str]
    encoders: Callable[[ModuleType], dict]
    vae: tuple[str, str]
    latent: str = "EmptySD3LatentImage"
    cfg: float = 1.0
    loras: tuple[str, ...] = ()


FLUX_LORAS = ("tiny_flux_256_lora", "tiny_clip_l_lora")
MODELS = {
    "flux Q5_K": Model(("tiny_flux_256", "Q5_K"), flux_clip, ("tiny_flux_vae", "Q8_0"), loras=FLUX_LORAS),
    "flux Q4_K": Model(("tiny_flux_256", "Q4_K"), flux_clip, ("tiny_flux_taesd", "Q8_0"), loras=FLUX_LORAS),
    "sd3": Model(("tiny_sd3", "Q6_K"), partial(clip_l, kind="sd3"), ("tiny_flux_vae", "Q8_0")),
    "wan": Model(("tiny_wan", "Q3_K"), wan_clip, ("tiny_wan_vae", "Q8_0"), "EmptyHunyuanLatentVideo"),
    "sd15": Model(
        ("tiny_sd15", "Q8_0"),
        partial(clip_l, kind="stable_diffusion"),
        ("tiny_sd15_vae", "Q8_0"),
        "EmptyLatentImage",
        7.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """What decides a picture."""

    model: str
    width: int
    height: int
    batch: int
    loras: tuple[tuple[str, float], ...]
    seed: int


def setting(number: int, chance: random.Random) -> Run:
    """Every model in turn, then every number of LoRAs that it has a file for; the rest is drawn."""
    name = list(MODELS)[number % len(MODELS)]
    known = MODELS[name].loras[: number // len(MODELS) % 3]
    loras = tuple((lora, chance.choice((0.5, 1.0))) for lora in known)
    width, height, batch = chance.choice((64, 96)), chance.choice((64, 128)), chance.randint(1, 4)
    return Run(name, width, height, batch, loras, seed=number)


def graph(samples: ModuleType, run: Run) -> Graph:
    model = MODELS[run.model]
    made = text_to_image(
        node("UnetLoaderGGUF", unet_name=samples.gguf(*model.diffusion).name),
        model.encoders(samples),
        node("VAELoaderGGUF", vae_name=samples.gguf(*model.vae).name),
        latent=model.latent,
        cfg=model.cfg,
        seed=run.seed,
    )
    made["latent"]["inputs"] |= {"width": run.width, "height": run.height, "batch_size": run.batch}
    if model.latent == "EmptyHunyuanLatentVideo":
        made["latent"]["inputs"]["length"] = 1
    if run.loras:
        inputs = {}
        for number, (name, strength) in enumerate(run.loras, 1):
            inputs |= {f"lora_{number}": samples.sample(name).name}
            inputs |= {f"strength_model_{number}": strength, f"strength_clip_{number}": strength}
        made["lora"] = node("LoraLoaderGGUF", model=["model", 0], clip=["clip", 0], **inputs)
        made["sampler"]["inputs"]["model"] = ["lora", 0]
        made["positive"]["inputs"]["clip"] = made["negative"]["inputs"]["clip"] = ["lora", 1]
    return made


def pictures(server: Server, graph: Graph) -> np.ndarray:
    """uint8 [batch, height, width, 3]; they were sampled now, not kept from before."""
    steps = []
    result = server.run(graph, lambda node_class, step, of: steps.append(node_class))
    assert "KSampler" in steps
    return np.stack([np.asarray(picture) for picture in result.pictures()])


@pytest.fixture(scope="module")
def server(comfyui, samples, tmp_path_factory):
    base = tmp_path_factory.mktemp("soak")
    with running_server(comfyui, base, samples.MODELS, ARGUMENTS, settings=ONE_THREAD) as server:
        yield server


def test_no_run_fails_and_every_picture_is_what_it_was(server, samples):
    chance = random.Random(0)
    choice = [setting(number, chance) for number in range(N_SETTINGS)]
    first: dict[Run, np.ndarray] = {}
    last = None
    for _ in range(RUNS):
        last = chance.choice([run for run in choice if run != last])
        made = pictures(server, graph(samples, last))
        assert made.shape == (last.batch, last.height, last.width, 3)
        assert made.std() > 1
        assert np.array_equal(made, first.setdefault(last, made)), last
    assert RUNS >= 2 * N_SETTINGS
    assert len({made.tobytes() for made in first.values()}) == len(first)
    assert [word for word in LEAKS if word in server.log()] == []
