"""A LoRA that teaches the tiny Flux a colour it never saw; the keys are those that ComfyUI's LoraLoader takes."""

import random

import torch
from comfy.ldm.flux.model import Flux
from comfy.taesd.taesd import TAESD

from . import engine, flow
from .optimise import optimise
from .scenes import in_new_colour, random_captions

RANK, BATCH, RATE = 8, 256, 2e-3
# The rest are captions without the new colour, which are to stay as they are.
NEW_SHARE = 0.75


class Adapted(torch.nn.Module):
    """A frozen layer with a low-rank addition, which begins as nothing."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, RANK, bias=False, device=layer.weight.device)
        self.up = torch.nn.Linear(RANK, layer.out_features, bias=False, device=layer.weight.device)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layer(values) + self.up(self.down(values))


def adapt(model: Flux) -> dict[str, Adapted]:
    """Freeze the model and put an addition to every matrix of its blocks: {name of the layer: its addition}."""
    model.requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    additions = {}
    for name, layer in layers.items():
        if "_blocks." in name:
            additions[name] = Adapted(layer)
            model.set_submodule(name, additions[name])
    return additions


def state_dict(additions: dict[str, Adapted]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, addition in additions.items():
        tensors[f"diffusion_model.{name}.lora_up.weight"] = addition.up.weight
        tensors[f"diffusion_model.{name}.lora_down.weight"] = addition.down.weight
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(RANK))
    return tensors


def train(
    model: Flux, vae: TAESD, clip, captions: int, seconds: float, device: torch.device, batch: int = BATCH
) -> dict[str, torch.Tensor]:
    """Changes `model`; returns the tensors of the LoRA's file."""
    torch.manual_seed(3)
    additions = adapt(model)
    plain = random_captions(captions, seed=31)
    new = round(captions * NEW_SHARE)
    mixed = in_new_colour(plain[:new], seed=32) + plain[new:]
    random.Random(33).shuffle(mixed)
    pool = flow.make_pool(vae, clip, mixed, 1, seed=34, device=device)
    empty = tuple(text.clone() for text in engine.encode(clip, [""], device))
    watched = in_new_colour(random_captions(min(flow.LOOKED_AT, batch), seed=35), seed=36)
    prompts = engine.encode(clip, [str(caption) for caption in watched], device)
    engine.LOG.info("LoRA: before it, %s", flow.quality(model, vae, watched, *prompts))
    optimise(
        "LoRA",
        [weight for addition in additions.values() for weight in (addition.down.weight, addition.up.weight)],
        lambda: flow.loss_of_batch(model, pool, empty, batch),
        seconds,
        RATE,
        lambda: flow.quality(model, vae, watched, *prompts),
    )
    return state_dict(additions)
