"""Packed weights of random blocks."""

import torch
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.layout import pack
from samples import random_blocks


def packed_weight(shape: tuple[int, ...], type_name: str, dtype: torch.dtype = torch.float32):
    block_format = FORMATS[type_name]
    blocks = random_blocks(type_name, torch.Size(shape).numel() // block_format.block_size)
    return pack(blocks.flatten(), type_name, shape, dtype)
