"""Which names the tensors of text encoders have in GGUF files, and which names ComfyUI expects: data only."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextEncoderNames:
    """One way in which converters name the tensors of one kind of text encoder.

    signature: a tensor that each such file has; what stands before it in the file is the prefix of the whole encoder.
    widens: a matrix that has more rows than columns in this naming, where another one swaps two names.
    names: module in the file -> module in ComfyUI, `{}` being the number of a layer.
    keeps_others: what becomes of a tensor that `names` does not list: it keeps its name, or it is left out.
    """

    family: str
    signature: str
    widens: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    keeps_others: bool = False


@dataclass(frozen=True)
class OtherModel:
    """A model that is no text encoder, known by the start of a tensor's name after any prefix, and what to do."""

    starts: tuple[str, ...]
    advice: str


# llama.cpp, architectures t5 and t5encoder. The decoder (dec.*) and the output head have no place in an encoder.
T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.{}.attn_norm": "encoder.block.{}.layer.0.layer_norm",
    "enc.blk.{}.attn_q": "encoder.block.{}.layer.0.SelfAttention.q",
    "enc.blk.{}.attn_k": "encoder.block.{}.layer.0.SelfAttention.k",
    "enc.blk.{}.attn_v": "encoder.block.{}.layer.0.SelfAttention.v",
    "enc.blk.{}.attn_o": "encoder.block.{}.layer.0.SelfAttention.o",
    "enc.blk.{}.attn_rel_b": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.{}.ffn_norm": "encoder.block.{}.layer.1.layer_norm",
    "enc.blk.{}.ffn_down": "encoder.block.{}.layer.1.DenseReluDense.wo",
}
T5_GATED = T5 | {
    "enc.blk.{}.ffn_gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "enc.blk.{}.ffn_up": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
}
T5_NOT_GATED = T5 | {"enc.blk.{}.ffn_up": "encoder.block.{}.layer.1.DenseReluDense.wi"}

# clip.cpp, architecture clip, the text half (t.*); the vision half (v.*) is left out.
CLIP = {
    "t.token_embd": "text_model.embeddings.token_embedding",
    "t.position_embd": "text_model.embeddings.position_embedding",
    "t.blk.{}.attn_q": "text_model.encoder.layers.{}.self_attn.q_proj",
    "t.blk.{}.attn_k": "text_model.encoder.layers.{}.self_attn.k_proj",
    "t.blk.{}.attn_v": "text_model.encoder.layers.{}.self_attn.v_proj",
    "t.blk.{}.attn_out": "text_model.encoder.layers.{}.self_attn.out_proj",
    "t.blk.{}.ln1": "text_model.encoder.layers.{}.layer_norm1",
    "t.blk.{}.ln2": "text_model.encoder.layers.{}.layer_norm2",
    "t.post_ln": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}
CLIP_UP_FIRST = CLIP | {
    "t.blk.{}.ffn_up": "text_model.encoder.layers.{}.mlp.fc1",
    "t.blk.{}.ffn_down": "text_model.encoder.layers.{}.mlp.fc2",
}
# clip.cpp calls the matrix that widens "down".
CLIP_DOWN_FIRST = CLIP | {
    "t.blk.{}.ffn_down": "text_model.encoder.layers.{}.mlp.fc1",
    "t.blk.{}.ffn_up": "text_model.encoder.layers.{}.mlp.fc2",
}

# One row for each naming of each family; the first row that fits is taken.
TEXT_ENCODERS = (
    TextEncoderNames("T5 gated (llama.cpp)", "enc.blk.0.ffn_gate.weight", names=T5_GATED),
    TextEncoderNames("T5 (llama.cpp)", "enc.blk.0.ffn_up.weight", names=T5_NOT_GATED),
    TextEncoderNames(
        "T5 (ComfyUI)",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        names={"encoder.embed_tokens": "shared"},
        keeps_others=True,
    ),
    TextEncoderNames("CLIP (llama.cpp)", "t.blk.0.ln1.weight", widens="t.blk.0.ffn_up.weight", names=CLIP_UP_FIRST),
    TextEncoderNames("CLIP (clip.cpp)", "t.blk.0.ln1.weight", widens="t.blk.0.ffn_down.weight", names=CLIP_DOWN_FIRST),
    TextEncoderNames("CLIP (ComfyUI)", "text_model.encoder.layers.0.mlp.fc1.weight", keeps_others=True),
)

OTHER_MODELS = (
    OtherModel(
        ("blk.0.attn_norm.", "model.layers.0.input_layernorm."),
        "It is a language model: encoders such as Llama, Qwen, Gemma and Mistral come in a later version of this pack",
    ),
    OtherModel(
        ("v.blk.", "v.patch_embd.", "mm.", "vision_model.", "visual."),
        "It is the vision part of a model (mmproj): give the text encoder that belongs to it instead",
    ),
    OtherModel(("decoder.conv_in.", "decoder.conv1."), "It is a VAE: load it with VAELoaderGGUF"),
    OtherModel(
        (
            "double_blocks.0.",
            "joint_blocks.0.",
            "input_blocks.0.",
            "transformer_blocks.0.",
            "blocks.0.",
            "layers.0.attention.",
        ),
        "It is a diffusion model: load it with UnetLoaderGGUF",
    ),
)
