"""Packed blocks to test with: random valid ones, and adversarial ones, of every GGUF type."""

import itertools

import torch
from gguf_native.ops.formats import FORMATS

# Byte offset of every float16 scale in a block.
HALF_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
BYTE_SCALES = {"MXFP4": 1, "NVFP4": 4}

# Zero, smallest and largest denormal, smallest normal, one, largest, infinity, quiet and signalling NaN.
SPECIAL_HALVES = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01]
SPECIAL_HALVES += [bits | 0x8000 for bits in SPECIAL_HALVES]
SPECIAL_FLOATS = [0.0, 1e-45, 1e-40, 6e-8, 1.0, 65504.0, 65520.0, 3.4e38, 1e300, float("inf"), float("nan")]


def random_blocks(name: str, n: int, seed: int = 0) -> torch.Tensor:
    """uint8 [n, block_bytes]: every code random, every scale finite and moderate."""
    generator = torch.Generator().manual_seed(seed)
    blocks = random_bytes(name, n, generator)
    if name in FLOAT_DTYPES:
        return torch.randn(n, 1, generator=generator).to(FLOAT_DTYPES[name]).view(torch.uint8)
    if name in BYTE_SCALES:
        low, high = (110, 126) if name == "MXFP4" else (0x08, 0x58)
        blocks[:, : BYTE_SCALES[name]] = torch.randint(low, high, (n, BYTE_SCALES[name]), generator=generator)
    for k in range(count_halves(name)):
        set_half(name, blocks, k, (torch.randn(n, generator=generator) * 0.02).half())
    return blocks


def adversarial_blocks(name: str) -> torch.Tensor:
    """uint8 [n, block_bytes]: every byte random, all zeros, all ones, and every combination of special scales."""
    generator = torch.Generator().manual_seed(1)
    block_bytes = FORMATS[name].block_bytes
    extremes = torch.tensor([0x00, 0xFF, 0x80, 0x7F], dtype=torch.uint8)[:, None].expand(-1, block_bytes)
    parts = [random_bytes(name, 512, generator), extremes]
    if name in FLOAT_DTYPES:
        values = torch.tensor(SPECIAL_FLOATS, dtype=torch.float64)
        parts.append(torch.cat([values, -values])[:, None].to(FLOAT_DTYPES[name]).view(torch.uint8))
    elif name in BYTE_SCALES:
        blocks = random_bytes(name, 256, generator)
        for k in range(BYTE_SCALES[name]):
            blocks[:, k] = torch.arange(256, dtype=torch.uint8).roll(k)
        parts.append(blocks)
    elif halves := count_halves(name):
        combinations = torch.tensor(list(itertools.product(SPECIAL_HALVES, repeat=halves)), dtype=torch.int32)
        for codes in (random_bytes(name, len(combinations), generator), extremes[:1], extremes[1:2]):
            blocks = codes.expand(len(combinations), -1).clone()
            for k in range(halves):
                set_half(name, blocks, k, combinations[:, k].to(torch.int16).view(torch.float16))
            parts.append(blocks)
    return torch.cat(parts)


def random_bytes(name: str, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (n, FORMATS[name].block_bytes), dtype=torch.uint8, generator=generator)


def count_halves(name: str) -> int:
    return 1 if name == "IQ1_M" else len(HALF_OFFSETS.get(name, ()))


def set_half(name: str, blocks: torch.Tensor, k: int, scales: torch.Tensor) -> None:
    """Write float16 [n] as scale `k` of every block; IQ1_M spreads it over the high nibbles of four words."""
    halves = scales[:, None].contiguous().view(torch.uint8)
    if name != "IQ1_M":
        start = HALF_OFFSETS[name][k]
        blocks[:, start : start + 2] = halves
        return
    quarters = torch.stack([halves & 0x0F, halves >> 4], dim=-1).flatten(1)
    blocks[:, 49::2] = (blocks[:, 49::2] & 0x0F) | (quarters << 4)
