"""A text encoder as OpenCLIP names it, which SD2 and SDXL checkpoints hold, under the names that loaders know."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from .source import SourceTensor

MARK = "transformer.resblocks.0.attn.in_proj_weight"
# Query, key and value of a layer are one matrix.
JOINED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
IN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(ln_1|ln_2|mlp\.c_fc|mlp\.c_proj|attn\.out_proj)\.(weight|bias)")
LAYER = "text_model.encoder.layers"
LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Stored the other way round than a layer's weight.
PROJECTION = "text_projection"


def is_openclip(tensors: Mapping[str, SourceTensor]) -> bool:
    return MARK in tensors


def with_comfyui_names(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The same encoder; what has no place in it (logit_scale) is left out."""
    return {name: tensor for key in tensors for name, tensor in renamed(key, tensors[key])}


def renamed(key: str, tensor: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """What becomes of one tensor."""
    if key in NAMES:
        yield NAMES[key], tensor
    elif match := IN_LAYER.fullmatch(key):
        yield f"{LAYER}.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}", tensor
    elif match := JOINED.fullmatch(key):
        rows = tensor.shape[0] // 3
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            shape = (rows, *tensor.shape[1:])
            part = SourceTensor(tensor.dtype, shape, partial(third, tensor, place * math.prod(shape)))
            yield f"{LAYER}.{match[1]}.self_attn.{name}.{match[2]}", part
    elif key == PROJECTION:
        yield f"{PROJECTION}.weight", SourceTensor(tensor.dtype, tensor.shape[::-1], partial(transposed, tensor))
    elif key == f"{PROJECTION}.weight":
        yield key, tensor


def third(tensor: SourceTensor, before: int, start: int, stop: int) -> torch.Tensor:
    return tensor.values(before + start, before + stop)


def transposed(tensor: SourceTensor, start: int, stop: int) -> torch.Tensor:
    """Its rows are columns of the source, so all of that is read: 1.6 million values at most."""
    return tensor.read().t().reshape(-1)[start:stop]
