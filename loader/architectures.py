"""Which model a file holds, by the names of its tensors, and what GGUF files lose of some tensors: data.

The converter and the tools go by `ARCHITECTURES`. The loader leaves that question to ComfyUI, which knows more models.
"""

from collections.abc import Collection
from dataclasses import dataclass

# Names whose leading dimensions of one ggml drops, and how many dimensions the model wants.
LEADING_ONES = {
    "pos_embed": 3,  # SD3
    "positional_encoding": 3,  # AuraFlow
    "register_tokens": 3,  # AuraFlow
    ".modulation": 3,  # Wan
    "img_emb.emb_pos": 3,  # Wan
    "x_pad_token": 2,  # Z-Image
    "cap_pad_token": 2,  # Z-Image
}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    name: what this pack calls it. part: what it is in a pipeline, a key of `PARTS` in quantizer/parts.py.
    tag: its `general.architecture`, as other programs write it. needs: tensors that each such file has.
    fuses: a layout of diffusers whose matrices ComfyUI joins while loading, which it cannot do with packed ones.
    """

    name: str
    part: str
    tag: str
    needs: tuple[str, ...]
    fuses: bool = False


def diffusion(name: str, *needs: str, tag: str = "", fuses: bool = False) -> Architecture:
    return Architecture(name, "unet", tag or name, needs, fuses)


# The first row that fits is taken: a model stands before those whose tensors it has too.
ARCHITECTURES = (
    diffusion(
        "qwen_image",
        "time_text_embed.timestep_embedder.linear_2.weight",
        "transformer_blocks.0.attn.norm_added_q.weight",
        "transformer_blocks.0.img_mlp.net.0.proj.weight",
    ),
    diffusion("flux2", "double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.proj.weight", tag="flux"),
    diffusion(
        "hyvid", "double_blocks.0.img_attn_proj.weight", "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight"
    ),
    diffusion("hyvid", "double_blocks.0.img_attn.proj.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
    diffusion("chroma", "distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.proj.weight", tag="flux"),
    diffusion("flux", "double_blocks.0.img_attn.proj.weight"),
    diffusion("flux", "x_embedder.weight", "transformer_blocks.0.attn.norm_added_k.weight", fuses=True),
    diffusion("sd3", "joint_blocks.0.x_block.attn.qkv.weight"),
    diffusion("sd3", "pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight", fuses=True),
    diffusion("aura", "double_layers.0.attn.w1q.weight", "double_layers.3.modX.1.weight"),
    diffusion("aura", "joint_transformer_blocks.0.attn.add_k_proj.weight", fuses=True),
    diffusion(
        "hidream",
        "caption_projection.0.linear.weight",
        "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",
    ),
    diffusion("anima", "llm_adapter.blocks.0.cross_attn.q_proj.weight", "blocks.0.mlp.layer1.weight", tag="cosmos"),
    diffusion("cosmos", "blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"),
    diffusion("ltxv", "adaln_single.emb.timestep_embedder.linear_2.weight", "patchify_proj.weight"),
    diffusion("wan", "blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"),
    diffusion("lumina2", "cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),
    diffusion(
        "lumina2", "noise_refiner.0.attention.norm_k.weight", "noise_refiner.0.attention.to_k.weight", fuses=True
    ),
    diffusion("ernie", "x_embedder.proj.weight", "text_proj.weight", "layers.0.mlp.linear_fc2.weight"),
    diffusion("krea2", "blocks.0.attn.qknorm.qnorm.scale", "txtfusion.projector.weight"),
    diffusion("sdxl", "label_emb.0.0.weight", "input_blocks.1.0.in_layers.0.weight"),
    diffusion("sdxl", "add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
    diffusion("sd1", "time_embed.0.weight", "input_blocks.1.0.in_layers.0.weight"),
    diffusion("sd1", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
    Architecture("t5", "clip", "t5encoder", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    Architecture("t5", "clip", "t5encoder", ("enc.blk.0.attn_q.weight",)),
    Architecture("clip", "clip", "clip", ("text_model.encoder.layers.0.mlp.fc1.weight",)),
    Architecture("clip", "clip", "clip", ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight")),
    Architecture("clip", "clip", "clip", ("t.blk.0.ln1.weight",)),
    Architecture("vae", "vae", "vae", ("decoder.conv_in.weight",)),
    Architecture("vae", "vae", "vae", ("decoder.conv1.weight",)),
    # The small autoencoders of TAESD.
    Architecture("vae", "vae", "vae", ("taesd_decoder.1.weight",)),
    Architecture("vae", "vae", "vae", ("decoder.layers.1.weight",)),
)
# What stands before all names of a diffusion model's own file.
PREFIXES = ("", "model.diffusion_model.", "model.", "net.")


def architecture_of(names: Collection[str]) -> tuple[Architecture, str] | None:
    """(row, the prefix that all its tensors have) of the model whose tensors are called so; None if it is not known."""
    names = frozenset(names)
    for prefix in PREFIXES:
        for row in ARCHITECTURES:
            if all(prefix + name in names for name in row.needs):
                return row, prefix
    return None
