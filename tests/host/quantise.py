"""From safetensors to GGUF in the conventions of the files people have, and back as the reference of the tests.

Blocks are encoded by libgguf and decoded by gguf: neither is this pack.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import libgguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# ComfyUI's name -> llama.cpp's name, one pattern for each kind of tensor of a T5 encoder.
T5_NAMES = [
    (r"^shared\.weight$", "token_embd.weight"),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi(_1)?\.", r"enc.blk.\1.ffn_up."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
]
NAMINGS = {"comfyui": [], "llama.cpp": T5_NAMES}

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Ends of names; these tensors stay as they are, as they do with every converter.
NEVER_QUANTISED = ("relative_attention_bias.weight", ".modulation", "patch_embedding.weight")
# Up to this many values a tensor is stored as F32.
SMALL = 1024


def llama_name(key: str, naming: str) -> str:
    for pattern, replacement in NAMINGS[naming]:
        key, found = re.subn(pattern, replacement, key)
        if found:
            break
    return key


def stored_shape(shape: tuple[int, ...], block_size: int) -> tuple[int, ...] | None:
    """The shape with rows of whole blocks, or None where there is none.

    Convolution kernels have rows of a few values: they are stored in rows of 256, and metadata keeps the real shape.
    """
    if shape[-1] % block_size == 0:
        return shape
    size = int(np.prod(shape))
    return (size // 256, 256) if len(shape) > 2 and size % 256 == 0 else None


def chosen_type(key: str, tensor: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim <= 1 or tensor.numel() <= SMALL:
        return GGMLQuantizationType.F32
    if wanted in PLAIN:
        return wanted
    block_size, _ = GGML_QUANT_SIZES[wanted]
    if stored_shape(tuple(tensor.shape), block_size) is None or key.endswith(NEVER_QUANTISED):
        return next(kind for kind, dtype in PLAIN.items() if dtype == tensor.dtype)
    return wanted


def encode(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """float32 [..., row] -> uint8 [..., bytes of the row]."""
    rows = values.reshape(-1, values.shape[-1])
    importance = np.ones(rows.shape[-1], np.float32) if libgguf.quantize_requires_imatrix(kind.value) else None
    return libgguf.quantize_rows(rows, kind.value, imatrix=importance).reshape(*values.shape[:-1], -1)


def add_tensor(
    writer: gguf.GGUFWriter, key: str, name: str, tensor: torch.Tensor, wanted: GGMLQuantizationType
) -> None:
    kind = chosen_type(key, tensor, wanted)
    shape = tuple(tensor.shape) or (1,)
    if kind in PLAIN:
        data = tensor.reshape(shape).to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()
    else:
        rows = stored_shape(shape, GGML_QUANT_SIZES[kind][0])
        if rows != shape:
            writer.add_array(ORIGINAL_SHAPE + name, list(shape))
        data = encode(tensor.float().reshape(rows).numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def token_type(pieces: SentencePieceProcessor, token: int) -> gguf.TokenType:
    if pieces.is_unknown(token):
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.CONTROL if pieces.is_control(token) else gguf.TokenType.NORMAL


def add_vocabulary(writer: gguf.GGUFWriter, model: bytes) -> None:
    """A SentencePiece model as llama.cpp's converter writes it."""
    pieces = SentencePieceProcessor(model_proto=model)
    ids = range(pieces.get_piece_size())
    writer.add_tokenizer_model("t5")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([token_type(pieces, i) for i in ids])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_pad_token_id(pieces.pad_id())
    writer.add_unk_token_id(pieces.unk_id())


def quantise(source: Path, target: Path, type_name: str, architecture: str, naming: str = "comfyui") -> None:
    """Write a safetensors file as GGUF, every tensor that fits as `type_name`."""
    kind = GGMLQuantizationType[type_name]
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with safe_open(source, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if key == "spiece_model":
                add_vocabulary(writer, tensor.numpy().tobytes())
            else:
                add_tensor(writer, key, llama_name(key, naming), tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoded_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a GGUF file as float32 in its logical shape."""
    reader = gguf.GGUFReader(file)
    for tensor in reader.tensors:
        field = reader.get_field(ORIGINAL_SHAPE + tensor.name)
        shape = field.contents() if field else reversed(tensor.shape.tolist())
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, torch.from_numpy(values.astype(np.float32)).reshape(*shape)


def decode(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file with ComfyUI's names as safetensors of one dtype."""
    save_file({name: tensor.to(dtype) for name, tensor in decoded_tensors(source)}, target, {"format": "pt"})
