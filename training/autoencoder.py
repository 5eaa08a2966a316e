"""The small autoencoder: the TAESD layout with 16 latent channels, as ComfyUI's VAELoader takes it.

Its encoder is set, not trained: the 16 principal components of 8x8 pixels, written into the layout's convolutions,
whose blocks let them pass. So latents are known before any training, and one product makes them.
"""

from collections.abc import Callable

import comfy.latent_formats
import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD, Block

from .optimise import optimise, process
from .scenes import SIDE, draw, in_new_colour, random_captions
from .scorer import accuracy

BATCH, RATES = 24, (0.01, 1e-3)
# Added to the latents, so that the decoder forgives what the flow model gets slightly wrong.
NOISE = 0.1
LOOKED_AT = 64
MEASURED = 512
# One caption in so many comes again with the colour that the LoRA will teach: the decoder has to paint it.
NEW_EVERY = 4
# Pixels of a cell's side, of which a latent is; cells of a picture's side, and of the cutting that a step learns from.
CELL = 8
CELLS, CUT = SIDE // CELL, 8
LATENTS = comfy.latent_formats.Flux()


def kernels(part: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [module for module in part.modules() if isinstance(module, torch.nn.Conv2d)]


def build(device: torch.device) -> TAESD:
    """Blocks begin by letting through what they get."""
    vae = TAESD(latent_channels=LATENTS.latent_channels)
    for layer in kernels(vae):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)
    for block in vae.modules():
        if isinstance(block, Block):
            torch.nn.init.zeros_(block.conv[-1].weight)
    last = vae.taesd_decoder[-1]
    torch.nn.init.normal_(last.weight, std=0.01)
    torch.nn.init.constant_(last.bias, 0.5)
    vae.requires_grad_(False)
    return vae.to(device, memory_format=torch.channels_last)


def components(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The strongest of 8x8 pixels, float32 [16, 3, 8, 8], and the mean of each, [16]: of unit variance all together.

    A component's deviation is the square root of what it was, so that edges are not lost beside areas.
    """
    cells = F.unfold(pictures, CELL, stride=CELL).movedim(1, 2).flatten(0, 1).double()
    mean = cells.mean(0)
    variances, directions = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    chosen = slice(-LATENTS.latent_channels, None)
    gains = variances[chosen] ** -0.25 / variances[chosen].sqrt().mean().sqrt()
    rows = (directions[:, chosen] * gains).T
    return rows.view(-1, 3, CELL, CELL).float(), (rows @ mean).float()


def set_encoder(vae: TAESD, rows: torch.Tensor, means: torch.Tensor) -> None:
    """Write `components` into the encoder; no block changes what is positive, so each is there with both signs."""
    encoder, count = vae.taesd_encoder, len(rows)
    for layer in kernels(encoder):
        layer.weight.zero_()
    first, halves, last = encoder[0], [layer for layer in kernels(encoder) if layer.stride == (2, 2)], encoder[-1]
    for colour in range(3):
        first.weight[colour, colour, 1, 1] = 1
    # The first two move 2x2 pixels into channels, in the order of pixel_unshuffle.
    for layer, channels in zip(halves, (3, 12), strict=False):
        for channel in range(channels):
            for place in range(4):
                layer.weight[4 * channel + place, channel, 1 + place // 2, 1 + place % 2] = 1
    folded = F.pixel_unshuffle(F.pixel_unshuffle(rows, 2), 2)
    halves[2].weight[:count, : folded.shape[1], 1:, 1:] = folded
    halves[2].weight[count : 2 * count, : folded.shape[1], 1:, 1:] = -folded
    for row in range(count):
        last.weight[row, row, 1, 1] = 1
        last.weight[row, count + row, 1, 1] = -1
    last.bias.copy_(-means)
    vae.vae_scale.fill_(LATENTS.scale_factor)
    vae.vae_shift.fill_(LATENTS.shift_factor)
    # As it is saved.
    vae.taesd_encoder.bfloat16().float()
    vae.vae_scale.copy_(vae.vae_scale.bfloat16())
    vae.vae_shift.copy_(vae.vae_shift.bfloat16())


def half_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def encode(vae: TAESD, pictures: torch.Tensor) -> torch.Tensor:
    """[N, 3, height, width] of 0 to 1 -> latents as the flow model sees them, near unit variance, float32.

    What the host's encoder gives, in the one product that it is.
    """
    count = LATENTS.latent_channels
    folded = vae.taesd_encoder[10].weight[:count, : 3 * (CELL // 2) ** 2, 1:, 1:]
    rows = F.pixel_shuffle(F.pixel_shuffle(folded, 2), 2)
    raw = F.conv2d(pictures, rows, vae.taesd_encoder[-1].bias, stride=CELL)
    return LATENTS.process_in(raw / vae.vae_scale + vae.vae_shift)


def to_raw(vae: TAESD, latents: torch.Tensor) -> torch.Tensor:
    """What the decoder's layers get of latents."""
    return (LATENTS.process_out(latents) - vae.vae_shift) * vae.vae_scale


@torch.no_grad()
def decode(vae: TAESD, latents: torch.Tensor) -> torch.Tensor:
    with half_precision(latents.device):
        pictures = vae.taesd_decoder(to_raw(vae, latents))
    return pictures.float().clamp(0, 1)


def quality(vae: TAESD, device: torch.device) -> str:
    captions = random_captions(LOOKED_AT, seed=11)
    captions[::NEW_EVERY] = in_new_colour(captions[::NEW_EVERY], seed=17)
    pictures = draw(captions, torch.Generator().manual_seed(12), device)
    decoded = torch.cat([decode(vae, encode(vae, few)) for few in pictures.split(16)])
    error = F.mse_loss(decoded, pictures)
    return f"PSNR {-10 * error.log10().item():.1f} dB, scorer {accuracy(decoded, captions):.2%}"


def cut(pictures: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of each picture with an edge in it, [N, 3, 64, 64], and of its latents, [N, 16, 8, 8]."""
    spread = F.max_pool2d(pictures, CELL) + F.max_pool2d(-pictures, CELL)
    edges = (spread.amax(1) > 0.1).flatten(1).float()
    chosen = torch.multinomial(edges, 1)[:, 0].cpu()
    strays = torch.randint(CUT, (2, len(pictures)))
    rows = (chosen // CELLS - strays[0]).clamp(0, CELLS - CUT).tolist()
    columns = (chosen % CELLS - strays[1]).clamp(0, CELLS - CUT).tolist()
    places = list(enumerate(zip(rows, columns, strict=True)))
    side = CUT * CELL
    return (
        torch.stack([pictures[n, :, CELL * y : CELL * y + side, CELL * x : CELL * x + side] for n, (y, x) in places]),
        torch.stack([latents[n, :, y : y + CUT, x : x + CUT] for n, (y, x) in places]),
    )


def begin(device: torch.device) -> TAESD:
    """Its encoder as it stays."""
    torch.manual_seed(1)
    vae = build(device)
    captions = random_captions(MEASURED, seed=13)
    set_encoder(vae, *components(draw(captions, torch.Generator().manual_seed(14), device)))
    return vae


def train(vae: TAESD, seconds: float, device: torch.device, batch: int, keep: Callable[[TAESD], None]) -> None:
    """The decoder; `keep` gets the autoencoder now and then, and at the end."""
    captions = random_captions(8192, seed=13)
    captions += in_new_colour(captions[::NEW_EVERY], seed=16)
    # Each process has pictures and noise of its own.
    torch.manual_seed(15 + process())
    generator = torch.Generator().manual_seed(25 + process())

    def loss_of_step() -> torch.Tensor:
        chosen = torch.randint(len(captions), (batch,), generator=generator).tolist()
        drawn = draw([captions[row] for row in chosen], generator, device)
        pictures, latents = cut(drawn, encode(vae, drawn))
        raw = to_raw(vae, latents + NOISE * torch.randn_like(latents))
        with half_precision(device):
            decoded = vae.taesd_decoder(raw.contiguous(memory_format=torch.channels_last)).float()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)

    def look() -> str:
        keep(vae)
        return quality(vae, device)

    trained = list(vae.taesd_decoder.requires_grad_(True).parameters())
    matrices = [layer.weight for layer in kernels(vae.taesd_decoder)[:-1]]
    others = [parameter for parameter in trained if all(parameter is not matrix for matrix in matrices)]
    optimise("autoencoder", matrices, others, loss_of_step, seconds, RATES, look)
