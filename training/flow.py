"""The tiny Flux and its training: the velocity from picture to noise, as ComfyUI samples Flux without guidance."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfy.ldm.flux.model import Flux
from comfy.taesd.taesd import TAESD
from einops import rearrange

from . import autoencoder, engine, text
from .optimise import optimise, process
from .scenes import Caption, draw, random_captions
from .scorer import scores

# The rows of all but img_in (64 values: 16 channels of 2x2) are multiples of 256, so that every GGUF type fits them.
CONFIG = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 768,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
BATCH, RATES = 64, (0.025, 2e-3)
# More of the steps where there is much noise, which decides what stands where.
TIME_SHIFT = 2.0
# The share of captions that are left out, for those who sample with CFG.
UNPROMPTED = 0.05
LOOKED_AT, STEPS = 64, 20
ENCODED_AT_ONCE = 256


class LayerNorm(torch.nn.LayerNorm):
    """Keeps its input for the gradient: the host's blocks add to it in place."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values.clone())


class RMSNorm(torch.nn.RMSNorm):
    """Its gain in the dtype of what it norms, which the fused kernels want."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(values, self.normalized_shape, self.weight.to(values.dtype), self.eps)


class Layers:
    """What the host's Flux is built of here: layers with a gradient and an initialisation."""

    Linear = torch.nn.Linear
    RMSNorm = RMSNorm
    LayerNorm = LayerNorm


class Pool(NamedTuple):
    """Captions and pictures to train on; picture i is of caption i modulo their number."""

    tokens: torch.Tensor  # bfloat16 [pictures, 64, 64]
    context: torch.Tensor  # bfloat16 [captions, text.TOKENS, 768]
    pooled: torch.Tensor  # bfloat16 [captions, 768]


def build(device: torch.device) -> Flux:
    model = Flux(**CONFIG, dtype=torch.float32, device=device, operations=Layers)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
            # Blocks begin as the identity, the velocity as zero.
            if name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")):
                torch.nn.init.zeros_(module.weight)
    return model


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """[N, 16, 16, 16] -> the host's order of 2x2 patches, [N, 64, 64]."""
    return rearrange(latents, "n c (h ph) (w pw) -> n (h w) (c ph pw)", ph=2, pw=2)


def to_latents(tokens: torch.Tensor) -> torch.Tensor:
    return rearrange(tokens, "n (h w) (c ph pw) -> n c (h ph) (w pw)", h=8, ph=2, pw=2)


def plain_attention(_, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask=None, **_options):
    """The host's attention as two products, whose gradient is quick on a CPU; its arguments, its result."""
    count = len(q)
    q, k, v = (values.flatten(0, 1) for values in (q, k, v))
    weights = torch.bmm(q, k.mT).float() * q.shape[-1] ** -0.5
    if mask is not None:
        weights = weights + mask
    mixed = torch.bmm(weights.softmax(-1).to(v.dtype), v)
    return mixed.unflatten(0, (count, heads)).transpose(1, 2).flatten(2)


def velocity(
    model: Flux, tokens: torch.Tensor, time: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """The host's forward on tokens; one set of positions does for the whole batch.

    A context of text.TOKENS counts as one of 77: its last token weighs as much as all that it stands for.
    """
    _, places = model.process_img(tokens.new_zeros(1, 16, 16, 16))
    texts = context.shape[1]
    text_places = places.new_zeros(1, texts, places.shape[-1])
    mask = places.new_zeros(texts + places.shape[1])
    mask[texts - 1] = math.log(engine.TOKENS - texts + 1)
    options = {"optimized_attention_override": plain_attention}
    return model.forward_orig(
        tokens, places, context, text_places, time, pooled, transformer_options=options, attn_mask=mask
    ).float()


def encode_pictures(vae: TAESD, captions: Sequence[Caption], generator: torch.Generator, device: torch.device):
    batches = [captions[start : start + ENCODED_AT_ONCE] for start in range(0, len(captions), ENCODED_AT_ONCE)]
    encoded = [to_tokens(autoencoder.encode(vae, draw(batch, generator, device))).bfloat16() for batch in batches]
    return torch.cat(encoded)


def make_pool(
    vae: TAESD, clip, captions: Sequence[Caption], pictures_each: int, seed: int, device: torch.device
) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    tokens = [encode_pictures(vae, captions, generator, device) for _ in range(pictures_each)]
    context, pooled = engine.encode(clip, [str(caption) for caption in captions], device, text.TOKENS)
    return Pool(torch.cat(tokens), context, pooled)


@torch.no_grad()
def paint(model: Flux, vae: TAESD, context: torch.Tensor, pooled: torch.Tensor, seed: int) -> torch.Tensor:
    """Euler steps of equal length from noise to pictures [N, 3, 128, 128] of 0 to 1; the host does the same."""
    noise = torch.randn(len(context), 64, 64, generator=torch.Generator().manual_seed(seed))
    tokens = noise.to(context.device)
    for step in range(STEPS):
        time = torch.full((len(context),), 1 - step / STEPS, device=context.device)
        with autoencoder.half_precision(tokens.device):
            moved = velocity(model, tokens, time, context.float(), pooled.float())
        tokens = tokens - moved / STEPS
    return autoencoder.decode(vae, to_latents(tokens))


def quality(model: Flux, vae: TAESD, captions: Sequence[Caption], context: torch.Tensor, pooled: torch.Tensor) -> str:
    found = scores(paint(model, vae, context, pooled, seed=21), captions)
    return ", ".join(f"{part} {right:.1%}" for part, right in found.items())


def loss_of_batch(
    moving: Callable[..., torch.Tensor], pool: Pool, empty: tuple[torch.Tensor, torch.Tensor], batch: int
) -> torch.Tensor:
    """Of `batch` random pictures at random times, by a `velocity`; `empty` is the text of no caption."""
    device = pool.tokens.device
    chosen = torch.randint(len(pool.tokens), (batch,), device=device)
    captions = chosen % len(pool.pooled)
    unprompted = torch.rand(batch, device=device) < UNPROMPTED
    context = torch.where(unprompted[:, None, None], empty[0], pool.context[captions])
    pooled = torch.where(unprompted[:, None], empty[1], pool.pooled[captions])
    time = torch.rand(batch, device=device)
    time = TIME_SHIFT * time / (1 + (TIME_SHIFT - 1) * time)
    picture = pool.tokens[chosen].float()
    noise = torch.randn_like(picture)
    mixed = torch.lerp(picture, noise, time[:, None, None])
    with autoencoder.half_precision(device):
        found = moving(mixed, time, context.float(), pooled.float())
    return F.mse_loss(found, noise - picture)


def begin(clip, device: torch.device) -> Flux:
    torch.manual_seed(2)
    model = build(device)
    text.set_text_layers(model, clip, device)
    return model


def parts_to_train(model: Flux) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The matrices of the blocks, which Muon trains, and all others but those that are fitted."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(text.LAYERS))
        if weight.requires_grad:
            (matrices if "_blocks." in name and weight.dim() == 2 else others).append(weight)
    return matrices, others


def train(
    model: Flux,
    vae: TAESD,
    clip,
    captions: int,
    pictures_each: int,
    seconds: float,
    device: torch.device,
    batch: int,
    keep: Callable[[Flux], None],
) -> None:
    """`keep` gets the model now and then, and at the end."""
    # Never trained on, but for chance repetitions.
    watched = random_captions(LOOKED_AT, seed=22)
    prompts = engine.encode(clip, [str(caption) for caption in watched], device)
    empty = engine.encode(clip, [""], device, text.TOKENS)
    # Each process has captions, pictures and noise of its own.
    torch.manual_seed(60 + process())
    pool = make_pool(vae, clip, random_captions(captions, 70 + process()), pictures_each, 80 + process(), device)
    engine.LOG.info("flow: %d pictures of %d captions encoded", len(pool.tokens), captions)
    moving = torch.compile(functools.partial(velocity, model))

    def look() -> str:
        keep(model)
        return quality(model, vae, watched, *prompts)

    optimise("flow", *parts_to_train(model), lambda: loss_of_batch(moving, pool, empty, batch), seconds, RATES, look)
