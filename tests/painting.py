"""Many captions painted at once by the host's own sampler in this process, each from the noise of its own seed."""

from collections.abc import Sequence

import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from gguf_native.training.scenes import SIDE, Caption, random_captions
from host import samples

# Of the captions that training/train.py evaluates; no picture of them was trained on, but by chance.
SEED = 41
STEPS = 20
# Painted at once.
BATCH = 64
LATENT = (16, SIDE // 8, SIDE // 8)


def fixed_captions(count: int) -> list[Caption]:
    return random_captions(count, SEED)


def load_clip() -> comfy.sd.CLIP:
    """The random text encoder that the trained model knows."""
    return comfy.sd.load_clip([str(samples.sample("clip_l"))], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def encode(clip: comfy.sd.CLIP, captions: Sequence[Caption]) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIPTextEncode gives: contexts [N, 77, 768] and pooled texts [N, 768]."""
    parts = [clip.encode_from_tokens_scheduled(clip.tokenize(str(caption)))[0] for caption in captions]
    return torch.cat([context for context, _ in parts]), torch.cat([extra["pooled_output"] for _, extra in parts])


def noise(count: int) -> torch.Tensor:
    """As KSampler makes it for seeds 0, 1, 2, ... and one picture each."""
    empty = torch.zeros(1, *LATENT)
    return torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in range(count)])


def paint(model: ModelPatcher, texts: tuple[torch.Tensor, torch.Tensor], steps: int = STEPS) -> torch.Tensor:
    """Latents [N, 16, 16, 16] of N encoded captions: Euler, `simple`, CFG 1."""
    batches = zip(*(values.split(BATCH) for values in (noise(len(texts[0])), *texts)), strict=True)
    return torch.cat([paint_batch(model, *batch, steps) for batch in batches])


def paint_batch(
    model: ModelPatcher, start: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, steps: int
) -> torch.Tensor:
    prompt = [[context, {"pooled_output": pooled}]]
    return comfy.sample.sample(
        model, start, steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(start), disable_pbar=True, seed=0
    ).float()


def decode(vae: comfy.sd.VAE, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, 128, 128] of 0 to 1, as the scorer takes them."""
    return vae.decode(latents).movedim(-1, 1).float().cpu()
