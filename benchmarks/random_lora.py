"""Random LoRAs for all attention and MLP matrices of a Flux's blocks."""

from pathlib import Path

import torch
from safetensors.torch import save_file

PARTS = "attn.qkv", "attn.proj", "mlp", "linear1", "linear2"


def is_changed(layer: str) -> bool:
    return "_blocks" in layer and any(part in layer for part in PARTS)


def random_lora(seed: int, rank: int, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The bfloat16 tensors of a file for layers of [rows, columns]."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer, (n_rows, n_columns) in shapes.items():
        for part, shape in (("down", (rank, n_columns)), ("up", (n_rows, rank))):
            tensors[f"diffusion_model.{layer}.lora_{part}.weight"] = (
                torch.randn(shape, generator=generator).bfloat16() * 0.01
            )
    return tensors


def lora_file(path: Path, seed: int, rank: int, shapes: dict[str, tuple[int, int]]) -> Path:
    """`path`, with such a LoRA in it from the first time on."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file(random_lora(seed, rank, shapes), unfinished)
        unfinished.replace(path)
    return path
