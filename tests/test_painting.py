"""The trained model does its job: quantised, with its LoRA and by the fast ways to compute, as the scorer sees it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
import painting
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.lora import apply_lora
from gguf_native.quantizer import convert
from gguf_native.training import scenes, scorer
from host import workflows
from host.environment import ROOT
from safetensors.torch import load_file

CAPTIONS = painting.fixed_captions(32)
IN_BROWN = scenes.in_new_colour(CAPTIONS[:12], seed=42)
# Enough that more change nothing for the scorer, and half of what the demo takes.
STEPS = 10
TWO_POINTS, ONE_POINT = 0.02, 0.01
FAST = ("fp8", "int8", "auto")


@dataclass(frozen=True)
class Painter:
    vae: comfy.sd.VAE
    # Encoded once: it takes as long as painting.
    texts: dict[scenes.Caption, tuple[torch.Tensor, torch.Tensor]]

    def latents(self, model, captions: list[scenes.Caption]) -> torch.Tensor:
        contexts, pooled = zip(*(self.texts[caption] for caption in captions), strict=True)
        return painting.paint(model, (torch.stack(contexts), torch.stack(pooled)), STEPS)

    def pictures(self, model, captions: list[scenes.Caption]) -> torch.Tensor:
        return painting.decode(self.vae, self.latents(model, captions))

    def accuracy(self, model, captions: list[scenes.Caption] = CAPTIONS) -> float:
        return scorer.accuracy(self.pictures(model, captions), captions)


@pytest.fixture(scope="module", autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def painter(inference, samples):
    captions = CAPTIONS + IN_BROWN
    texts = zip(*painting.encode(painting.load_clip(), captions), strict=True)
    vae = comfy.sd.VAE(sd=load_file(samples.trained("tiny_vae")))
    return Painter(vae, dict(zip(captions, texts, strict=True)))


@pytest.fixture(scope="module")
def original(painter, samples) -> float:
    """Accuracy of the bfloat16 weights, by the host's own loader."""
    return painter.accuracy(comfy.sd.load_diffusion_model(str(samples.trained("tiny_flux"))))


@pytest.fixture
def quantised(samples, tmp_path):
    def load(file_type: str):
        convert(samples.trained("tiny_flux"), tmp_path / "quantised.gguf", file_type)
        return load_diffusion_model(str(tmp_path / "quantised.gguf"))

    return load


@pytest.fixture(scope="module")
def four_bits(inference, samples):
    return load_diffusion_model(str(samples.trained_gguf("Q4_K_M")))


def share_with_brown(pictures: torch.Tensor) -> float:
    readings = scorer.read(pictures)
    return sum(any(seen.thing.colour == "brown" for seen in reading.seen) for reading in readings) / len(readings)


def test_the_original_paints_what_captions_ask(original):
    assert original > 0.9


@pytest.mark.parametrize("file_type", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"])
def test_a_quantised_model_paints_what_the_original_does(painter, quantised, original, file_type):
    assert painter.accuracy(quantised(file_type)) >= original - TWO_POINTS


def test_the_scorer_sees_a_model_that_was_quantised_too_far(painter, quantised, original):
    assert painter.accuracy(quantised("Q2_K"), CAPTIONS[:8]) < original - 2 * TWO_POINTS


def test_the_lora_paints_its_colour_until_it_is_removed(painter, four_bits, samples):
    before = painter.latents(four_bits, IN_BROWN)
    adapted, _ = apply_lora(four_bits, None, str(samples.trained("tiny_lora")), 1.0, 0.0)
    with_lora = painter.pictures(adapted, IN_BROWN)
    without = painting.decode(painter.vae, before)
    assert share_with_brown(without) < 0.4 < 0.8 < share_with_brown(with_lora)
    assert scorer.accuracy(with_lora, IN_BROWN) > scorer.accuracy(without, IN_BROWN)
    assert torch.equal(painter.latents(four_bits, IN_BROWN), before)


def test_both_pictures_of_the_demo_show_what_was_asked(server, samples):
    encoder, vae = samples.sample("clip_l").name, samples.trained("tiny_vae").name
    loaders = (
        workflows.node("UNETLoader", unet_name=samples.trained("tiny_flux").name, weight_dtype="default"),
        workflows.node("UnetLoaderGGUF", unet_name=samples.trained_gguf("Q4_K_M").name),
    )
    for loader in loaders:
        (picture,) = server.run(workflows.painting(loader, encoder, vae, str(scenes.EXAMPLE))).pictures()
        (reading,) = scorer.read(torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 255)
        assert all(is_right for _, is_right in scorer.judge(scenes.EXAMPLE, reading)), (loader, reading)


@pytest.mark.cuda
def test_fast_ways_to_compute_paint_as_exact_does(comfyui, tmp_path):
    (tmp_path / "gguf_native").symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, ROOT / "benchmarks" / "quality.py", comfyui, tmp_path, "Q8_0", "Q4_K_M"]
    command += ["--captions", "256", "--compute", "exact", *FAST]
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    accuracy = {(row["type"], row["compute"]): row["scores"]["all"] for row in rows}
    lost = {pair: accuracy[pair[0], "exact"] - right for pair, right in accuracy.items() if pair[1] in FAST}
    assert len(lost) == 2 * len(FAST) and max(lost.values()) <= ONE_POINT, lost
    # Not all of them computed exactly.
    assert len({row["latent_error"] for row in rows if row["type"] == "Q4_K_M"}) > 1
