"""A LoRA that teaches the tiny Flux a colour it never saw; the keys are those that ComfyUI's LoraLoader takes."""

import functools
from collections.abc import Callable

import torch
from comfy.ldm.flux.model import Flux
from comfy.taesd.taesd import TAESD

from . import engine, flow, text
from .optimise import optimise, process
from .scenes import in_new_colour, random_captions

RANK, BATCH, RATES = 8, 32, (0.0, 2e-3)
# The rest are captions without the new colour, which are to stay as they are.
NEW_SHARE = 0.75
PICTURES_EACH = 4


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
    model: Flux,
    vae: TAESD,
    clip,
    captions: int,
    seconds: float,
    device: torch.device,
    batch: int,
    keep: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    """Changes `model`; `keep` gets the tensors of the LoRA's file now and then, and at the end."""
    torch.manual_seed(3)
    additions = adapt(model)
    # Each process has captions, pictures and noise of its own.
    torch.manual_seed(90 + process())
    plain = random_captions(captions, seed=100 + process())
    new = round(captions * NEW_SHARE)
    mixed = in_new_colour(plain[:new], seed=110 + process()) + plain[new:]
    pool = flow.make_pool(vae, clip, mixed, PICTURES_EACH, 120 + process(), device)
    empty = engine.encode(clip, [""], device, text.TOKENS)
    watched = in_new_colour(random_captions(flow.LOOKED_AT, seed=35), seed=36)
    prompts = engine.encode(clip, [str(caption) for caption in watched], device)
    # Too few steps for compiling to be worth its time.
    moving = functools.partial(flow.velocity, model)

    def look() -> str:
        keep(state_dict(additions))
        return flow.quality(model, vae, watched, *prompts)

    optimise(
        "LoRA",
        [],
        [weight for addition in additions.values() for weight in (addition.down.weight, addition.up.weight)],
        lambda: flow.loss_of_batch(moving, pool, empty, batch),
        seconds,
        RATES,
        look,
    )
