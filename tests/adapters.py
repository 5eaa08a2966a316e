"""Adapter files for tests: every type that ComfyUI knows, and the key styles of the tools that write them."""

from collections.abc import Mapping

import torch

RANK = 4
Shapes = dict[str, tuple[int, ...]]


def plain(shape):
    """up [out, rank], down [rank, in], and for a convolution its kernel on the way down (LoCon)."""
    ones = (1,) * (len(shape) - 2)
    return {"lora_up.weight": (shape[0], RANK, *ones), "lora_down.weight": (RANK, *shape[1:])}


def tucker(shape):
    """LoCon in three parts: the kernel in the middle."""
    if len(shape) == 2:
        return plain(shape)
    up, down = (shape[0], RANK, 1, 1), (RANK, shape[1], 1, 1)
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": (RANK, RANK, *shape[2:])}


def loha(shape):
    out, into = (shape[0], RANK), (RANK, torch.Size(shape[1:]).numel())
    return {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into}


def loha_tucker(shape):
    if len(shape) == 2:
        return loha(shape)
    out, into, core = (RANK, shape[0]), (RANK, shape[1]), (RANK, RANK, *shape[2:])
    halves = {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into}
    return halves | {"hada_t1": core, "hada_t2": core}


def lokr(shape):
    return {"lokr_w1": (4, 4), "lokr_w2": (shape[0] // 4, shape[1] // 4, *shape[2:])}


def lokr_factors(shape):
    rest = torch.Size(shape[1:]).numel() // 4
    first = {"lokr_w1_a": (4, RANK), "lokr_w1_b": (RANK, 4)}
    return first | {"lokr_w2_a": (shape[0] // 4, RANK), "lokr_w2_b": (RANK, rest), "alpha": ()}


def glora(shape):
    """W + W A + B; a1 and a2 are the factors of A, b1 and b2 those of B."""
    of_a = {"a1.weight": (shape[1], RANK), "a2.weight": (RANK, shape[1])}
    return of_a | {"b1.weight": (shape[0], RANK), "b2.weight": (RANK, torch.Size(shape[1:]).numel())}


def glora_old(shape):
    """As LyCORIS once wrote them: every pair the other way round."""
    of_a = {"a1.weight": (RANK, shape[1]), "a2.weight": (shape[1], RANK)}
    return of_a | {"b1.weight": (RANK, shape[1]), "b2.weight": (shape[0], RANK)}


def oft(shape):
    return {"oft_blocks": (shape[0] // 8, 8, 8)}


def boft(shape):
    """Two stages of a butterfly; ComfyUI wants an alpha, which bounds the rotation."""
    return {"oft_blocks": (2, shape[0] // 8, 8, 8), "rescale": (shape[0], *(1,) * (len(shape) - 1)), "alpha": ()}


def scale_of_rows(shape):
    return {"dora_scale": (shape[0], *(1,) * (len(shape) - 1))}


# LoKr of a convolution in three parts (lokr_t2) is missing: there ComfyUI itself logs an error and changes nothing.
# Adapter -> the tensors of its file for a weight of some shape, as {end of name: shape}.
ADAPTERS = {
    "lora": plain,
    "alpha": lambda shape: plain(shape) | {"alpha": ()},
    "bias": lambda shape: plain(shape) | {"diff_b": shape[:1]},
    "tucker": tucker,
    "dora": lambda shape: plain(shape) | scale_of_rows(shape),
    "dora of columns": lambda shape: plain(shape) | {"dora_scale": (1, *shape[1:])},
    "loha": loha,
    "loha tucker": loha_tucker,
    "loha with dora": lambda shape: loha(shape) | scale_of_rows(shape),
    "lokr": lokr,
    "lokr factors": lokr_factors,
    "lokr with dora": lambda shape: lokr(shape) | scale_of_rows(shape),
    "glora": glora,
    "old glora": glora_old,
    "oft": oft,
    "oft with alpha": lambda shape: oft(shape) | {"alpha": ()},
    "boft": boft,
    "diff": lambda shape: {"diff": shape},
    "set": lambda shape: {"set_weight": shape},
}
# Those that a matrix takes as factors beside it.
LOW_RANK = ("lora", "alpha", "bias", "tucker")


def pairs(up: str, down: str, stems: Mapping[str, tuple[int, int]]) -> Shapes:
    """The two tensors of a LoRA for each stem -> (out, in), under the two ends of a style."""
    shapes = {}
    for stem, (out, into) in stems.items():
        shapes |= {stem + up: (out, RANK), stem + down: (RANK, into)}
    return shapes


KOHYA = (".lora_up.weight", ".lora_down.weight")
PEFT = (".lora_B.weight", ".lora_A.weight")
FLUX_BLOCKS = {"double_blocks.0.img_attn.qkv": (768, 256), "single_blocks.1.linear1": (1792, 256)}
FLUX_SLICES = {
    "transformer_blocks.0.attn.to_q": (256, 256),
    "transformer_blocks.0.attn.to_k": (256, 256),
    "transformer_blocks.0.attn.to_v": (256, 256),
    "transformer_blocks.1.attn.add_k_proj": (256, 256),
    "single_transformer_blocks.0.attn.to_k": (256, 256),
    "single_transformer_blocks.0.proj_mlp": (1024, 256),
}
SD15_QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def renamed(prefix: str, stems: Mapping[str, tuple[int, int]], dot: str = ".") -> dict[str, tuple[int, int]]:
    return {prefix + stem.replace(".", dot): shape for stem, shape in stems.items()}


# Who writes such files -> (family of models, shapes of the tensors by their keys).
KEY_STYLES: dict[str, tuple[str, Shapes]] = {
    "Kohya": ("flux", pairs(*KOHYA, renamed("lora_unet_", FLUX_BLOCKS, "_"))),
    "diffusers": ("flux", pairs(*PEFT, renamed("transformer.", FLUX_SLICES))),
    "PEFT with an adapter's name": (
        "flux",
        pairs(".lora_B.default.weight", ".lora_A.default.weight", renamed("transformer.", FLUX_SLICES)),
    ),
    "SimpleTuner": ("flux", pairs(*KOHYA, renamed("lycoris_", FLUX_SLICES, "_"))),
    "OneTrainer": ("flux", pairs(*KOHYA, renamed("lora_transformer_", FLUX_SLICES, "_"))),
    "DiffSynth": ("flux", pairs(".lora.up.weight", ".lora.down.weight", FLUX_SLICES)),
    "Mochi": ("flux", pairs(".lora_B", ".lora_A", renamed("diffusion_model.", FLUX_BLOCKS))),
    "transformers": (
        "flux",
        pairs(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", renamed("transformer.", FLUX_SLICES)),
    ),
    "BFL": (
        "flux",
        pairs(*PEFT, FLUX_BLOCKS | {"img_in": (256, 64)}) | {"single_blocks.0.norm.key_norm.scale": (128,)},
    ),
    # Known by blocks that only the full model has.
    "USO": (
        "flux",
        pairs(
            ".up.weight",
            ".down.weight",
            {
                "double_blocks.0.processor.qkv_lora1": (768, 256),
                "double_blocks.1.processor.proj_lora2": (256, 256),
                "double_blocks.18.processor.qkv_lora2": (768, 256),
                "single_blocks.1.processor.qkv_lora": (768, 256),
                "single_blocks.37.processor.qkv_lora": (768, 256),
            },
        ),
    ),
    "diffusers, SD3": (
        "sd3",
        # The halves of the last one are swapped on the way.
        pairs(
            *PEFT,
            renamed("transformer.transformer_blocks.0.", {"attn.to_q": (256, 256), "ff.net.2": (256, 1024)})
            | {"transformer.norm_out.linear": (512, 256)},
        ),
    ),
    "PEFT, SD3": ("sd3", pairs(*PEFT, {"base_model.model.transformer_blocks.1.attn.to_v": (256, 256)})),
    "Wan Fun": (
        "wan",
        pairs(*KOHYA, renamed("lora_unet__blocks_", {"0_cross_attn_k": (256, 256), "1_ffn_0": (512, 256)})),
    ),
    "Kohya, SD": ("sd15", pairs(*KOHYA, {f"lora_unet_{SD15_QUERY}.to_q".replace(".", "_"): (320, 320)})),
    "LyCORIS, SD": ("sd15", pairs(*KOHYA, {f"lycoris_{SD15_QUERY}.to_k".replace(".", "_"): (320, 320)})),
    "diffusers, SD": (
        "sd15",
        pairs("_lora.up.weight", "_lora.down.weight", {f"unet.{SD15_QUERY}.processor.to_v": (320, 320)}),
    ),
    "norms": (
        "sd15",
        {"lora_unet_middle_block_0_in_layers_0.w_norm": (320,), "lora_unet_middle_block_0_in_layers_0.b_norm": (320,)},
    ),
}


def values(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random, of a size that changes a weight by about a tenth of itself; alphas and scales near their usual values."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if key.endswith("alpha"):
        return torch.tensor(RANK / 2)
    if key.endswith(("dora_scale", "rescale", "norm.scale")):
        return 1 + 0.1 * noise
    if key.endswith(("w_norm", "b_norm")) or "hada" in key:
        return noise * 0.3
    if (len(shape) == 2 and shape[1] == RANK) or key.endswith(("lora_mid.weight", "lokr_w1")):
        return noise * 0.3
    return noise / torch.Size(shape[1:]).numel() ** 0.5


def tensors(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file's tensors."""
    return {key: values(key, shape, seed + number) for number, (key, shape) in enumerate(shapes.items())}
