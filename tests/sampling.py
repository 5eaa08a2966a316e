"""Short, seeded runs of the host's own sampler in this process: what a workflow does between loader and VAE."""

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

# For each sample: shape of the latent, width of the text context, width of the pooled text.
INPUTS = {
    "tiny_flux": ((1, 16, 8, 8), 768, 768),
    "tiny_flux_256": ((1, 16, 8, 8), 256, 256),
    "tiny_sd3": ((1, 16, 8, 8), 4096, 2048),
    "tiny_wan": ((1, 16, 1, 8, 8), 4096, 768),
    "tiny_sd15": ((1, 4, 8, 8), 768, 768),
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(model: ModelPatcher, name: str, steps: int = 2, hooks: object = None) -> torch.Tensor:
    """The latent after `steps` euler steps from fixed noise and a fixed prompt."""
    shape, context, pooled = INPUTS[name]
    extra = {"pooled_output": normal(1, pooled, seed=3), "guidance": 3.5}
    if hooks is not None:
        extra["hooks"] = hooks
    prompt = [[normal(1, 12, context, seed=2), extra]]
    noise = normal(*shape, seed=1)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros(shape), disable_pbar=True, seed=1
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN wherever there is one."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
