"""The small autoencoder: the TAESD layout with 16 latent channels, as ComfyUI's VAELoader takes it."""

import comfy.latent_formats
import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD

from .optimise import optimise
from .scenes import draw, random_captions
from .scorer import accuracy

BATCH, RATE = 64, 1e-3
# Added to the latents, of their deviation, so that the decoder forgives what the flow model gets slightly wrong.
NOISE = 0.1
# How much a deviation other than one counts: the decoder begins with a tanh that is steep up to three.
SPREAD = 0.01
LOOKED_AT = 64
MEASURED = 128
LATENTS = comfy.latent_formats.Flux()


def build(device: torch.device) -> TAESD:
    vae = TAESD(latent_channels=LATENTS.latent_channels)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            # The host's layers leave theirs unset.
            torch.nn.Conv2d.reset_parameters(module)
    vae.vae_scale.requires_grad_(False)
    vae.vae_shift.requires_grad_(False)
    return vae.to(device, memory_format=torch.channels_last)


def half_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def encode(vae: TAESD, pictures: torch.Tensor) -> torch.Tensor:
    """[N, 3, height, width] of 0 to 1 -> latents as the flow model sees them, near unit variance, float32."""
    with half_precision(pictures.device):
        latents = vae.encode(pictures.contiguous(memory_format=torch.channels_last) * 2 - 1)
    return LATENTS.process_in(latents.float()).contiguous()


@torch.no_grad()
def decode(vae: TAESD, latents: torch.Tensor) -> torch.Tensor:
    with half_precision(latents.device):
        pictures = vae.decode(LATENTS.process_out(latents))
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def to_unit_variance(vae: TAESD, pictures: torch.Tensor) -> None:
    """Set scale and shift so that latents fit the host's Flux format, then round all weights as they are saved."""
    with torch.no_grad():
        latents = vae.taesd_encoder(pictures)
        scale = latents.std() * LATENTS.scale_factor
        vae.vae_scale.copy_(scale)
        vae.vae_shift.copy_(LATENTS.shift_factor - latents.mean() / scale)
    vae.bfloat16().float()


def quality(vae: TAESD, device: torch.device) -> str:
    captions = random_captions(LOOKED_AT, seed=11)
    pictures = draw(captions, torch.Generator().manual_seed(12), device)
    with torch.no_grad(), half_precision(device):
        decoded = vae.taesd_decoder(vae.taesd_encoder(pictures)).float().clamp(0, 1)
    error = F.mse_loss(decoded, pictures)
    return f"PSNR {-10 * error.log10().item():.1f} dB, scorer {accuracy(decoded, captions):.2%}"


def train(seconds: float, device: torch.device, batch: int = BATCH) -> TAESD:
    torch.manual_seed(1)
    vae = build(device)
    captions = random_captions(max(8192, batch), seed=13)
    generator = torch.Generator().manual_seed(14)

    def loss_of_step() -> torch.Tensor:
        chosen = torch.randint(len(captions), (batch,), generator=generator).tolist()
        pictures = draw([captions[row] for row in chosen], generator, device).contiguous(
            memory_format=torch.channels_last
        )
        with half_precision(device):
            latents = vae.taesd_encoder(pictures)
            deviation = latents.float().std()
            noise = torch.randn_like(latents) * (NOISE * deviation.detach())
            decoded = vae.taesd_decoder(latents + noise).float()
        spread = SPREAD * (deviation - 1).square()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + spread

    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimise("autoencoder", trained, loss_of_step, seconds, RATE, lambda: quality(vae, device))
    to_unit_variance(vae, draw(captions[:MEASURED], generator, device))
    return vae
