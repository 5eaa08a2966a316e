"""Which tensors of each architecture stay as they are, and which matrices are worth more bits than others. Data.

Kept tensors are those that other converters keep too. Ranks follow measurements that are public: for Flux the cost of
each layer at each type (early double blocks most, then single blocks 46 to 54), else that values, fused attention and
the second matrix of an MLP, in the first and last blocks, suffer most.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """Matrices with one of `parts` in their names have `rank` in the blocks from `start` to `stop` of the depth.

    Blocks are counted in each series of them (double_blocks, single_blocks) by the number in the name.
    """

    rank: int
    parts: tuple[str, ...]
    start: float = 0.0
    stop: float = 1.0
    series: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """kept: parts of names that stay in 16 bits. exact: parts of names that stay in F32. rules: the first that fits.

    In all of them `^` is the start of a name.
    """

    kept: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = field(default=())


def at_both_ends(attention: tuple[str, ...], down: tuple[str, ...]) -> tuple[Rule, ...]:
    """The usual: attention everywhere, more at both ends; the second matrix of the MLP at both ends."""
    return (
        Rule(2, attention, 0, 0.15),
        Rule(2, attention, 0.85, 1),
        Rule(1, attention),
        Rule(2, down, 0, 0.1),
        Rule(2, down, 0.9, 1),
        Rule(1, down, 0, 0.3),
        Rule(1, down, 0.7, 1),
    )


FLUX_KEPT = ("txt_in.", "img_in.", "img_in_patch.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "nerf_")
FLUX_RULES = (
    Rule(2, ("attn.qkv.", "attn_qkv."), 0, 0.5, "double_blocks"),
    Rule(2, ("mlp.2.", "mlp.fc2."), 0, 0.15, "double_blocks"),
    Rule(1, ("attn.qkv.", "attn_qkv."), 0, 1, "double_blocks"),
    Rule(1, ("mlp.2.", "mlp.fc2."), 0, 0.6, "double_blocks"),
    Rule(1, ("linear1.", "linear2."), 0.7, 0.94, "single_blocks"),
    Rule(1, ("linear2.",), 0.95, 1, "single_blocks"),
)
STABLE_DIFFUSION = Sensitivity(
    kept=(
        "class_embedding.",
        "time_embedding.",
        "add_embedding.",
        "time_embed.",
        "label_emb.",
        "conv_in.",
        "conv_out.",
        "^input_blocks.0.0.weight",
        "^out.2.weight",
    ),
    rules=(Rule(2, ("attn1.to_v.", "attn2.to_v.")), Rule(1, ("ff.net.2.",))),
)

SENSITIVITY = {
    "flux": Sensitivity(FLUX_KEPT, (), FLUX_RULES),
    "chroma": Sensitivity((*FLUX_KEPT, "distilled_guidance_layer."), (), FLUX_RULES),
    # All of its blocks share three modulation matrices.
    "flux2": Sensitivity(FLUX_KEPT, (), (Rule(2, ("_stream_modulation",)), *FLUX_RULES)),
    "hyvid": Sensitivity((*FLUX_KEPT, "byt5_in.", "vision_in.", "cond_type_embedding."), (), FLUX_RULES),
    "sd3": Sensitivity(
        (
            "final_layer.",
            "time_text_embed.",
            "context_embedder.",
            "t_embedder.",
            "y_embedder.",
            "x_embedder.",
            "pos_embed",
        ),
        (),
        at_both_ends(("attn.qkv.", "attn2.qkv."), ("mlp.fc2.",)),
    ),
    "aura": Sensitivity(
        ("t_embedder.", "init_x_linear.", "modF.1.", "cond_seq_linear.", "final_linear.", "positional_encoding"),
        ("register_tokens",),
        (Rule(2, ("modC.", "modX.", "modCX.")), *at_both_ends((".w1v.", ".w2v."), (".c_proj.",))),
    ),
    "hidream": Sensitivity(
        ("p_embedder.", "t_embedder.", "x_embedder.", "final_layer.", "caption_projection."),
        (".ff_i.gate.", "img_emb.emb_pos"),
        at_both_ends((".to_v.", ".to_v_t."), (".w2.",)),
    ),
    "cosmos": Sensitivity(
        ("p_embedder.", "t_embedder.", "t_embedding_norm.", "x_embedder.", "final_layer."),
        ("pos_embedder",),
        at_both_ends((".v_proj.",), (".mlp.layer2.", ".adaln_modulation_mlp.2.")),
    ),
    "anima": Sensitivity(
        ("p_embedder.", "t_embedder.", "t_embedding_norm.", "x_embedder.", "final_layer.", "llm_adapter.embed."),
        ("pos_embedder",),
        (Rule(2, ("llm_adapter.",)), *at_both_ends((".v_proj.",), (".mlp.layer2.", ".adaln_modulation_mlp.2."))),
    ),
    "ltxv": Sensitivity(
        ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."),
        ("scale_shift_table",),
        at_both_ends((".to_v.",), (".ff.net.2.",)),
    ),
    "wan": Sensitivity(
        ("patch_embedding", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.", "head.head."),
        ("modulation", "img_emb.emb_pos"),
        at_both_ends(("attn.v.",), (".ffn.2.",)),
    ),
    "lumina2": Sensitivity(
        ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.", "context_refiner.", "noise_refiner."),
        ("x_pad_token", "cap_pad_token"),
        (Rule(2, ("adaLN_modulation.",)), *at_both_ends(("attention.qkv.", "attention.out."), ("feed_forward.w2.",))),
    ),
    "qwen_image": Sensitivity(
        ("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "^proj_out."),
        (),
        (Rule(2, ("^transformer_blocks.0.img_mod.",)), *at_both_ends((".to_v.", ".add_v_proj."), ("_mlp.net.2.",))),
    ),
    "ernie": Sensitivity(
        ("x_embedder.", "text_proj.", "time_embedding.", "adaLN_modulation.", "final_norm.", "final_linear."),
        (),
        at_both_ends((".to_v.",), (".mlp.linear_fc2.",)),
    ),
    "krea2": Sensitivity(
        ("first.", "last.", "tmlp.", "txtmlp.", "tproj.", "txtfusion.projector."),
        (),
        at_both_ends((".attn.wv.",), (".mlp.down.",)),
    ),
    "sd1": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION,
    "t5": Sensitivity(
        ("relative_attention_bias.", "attn_rel_b."),
        (),
        (
            Rule(2, ("shared.", "embed_tokens.", "token_embd.")),
            *at_both_ends((".SelfAttention.v.", ".attn_v."), (".DenseReluDense.wo.", ".ffn_down.")),
        ),
    ),
    "clip": Sensitivity(
        ("position_embedding.", "position_embd.", "text_projection"),
        (),
        (Rule(2, ("token_embedding.", "token_embd.")), *at_both_ends((".v_proj.", ".attn_v."), (".mlp.fc2.",))),
    ),
    "vae": Sensitivity(
        ("conv_in.", "conv_out.", "quant_conv.", "encoder.conv1.", "decoder.conv1.", "^conv1.", "^conv2.", ".head."),
        (),
        (),
    ),
}
