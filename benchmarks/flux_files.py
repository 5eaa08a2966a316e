"""A full-size Flux.1-dev with random weights as GGUF.

    python benchmarks/flux_files.py FOLDER RECIPE ... [--text 4096] [--pooled 768]

--text and --pooled are the widths of what text encoders give it. RECIPE is a type, a row of MIXED, or a file type that
the quantiser mixes. 6 to 13 GB each.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer.plan import depths_of, rank_of
from gguf_native.quantizer.recipes import FILE_TYPES
from gguf_native.quantizer.sensitivity import SENSITIVITY

HIDDEN, DOUBLE, SINGLE, TEXT, POOLED = 3072, 19, 38, 4096, 768
MLP = 4 * HIDDEN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As converters keep them: small or sensitive.
KEPT = ("img_in", "time_in", "vector_in", "guidance_in", "final_layer.linear")
# Recipe -> type of most matrices, and of those with a certain part in their names.
MIXED = {"Q5_K_M": ("Q5_K", {"attn.qkv": "Q6_K"})}
# What each value is about when its block's scales are these: weights should spread by about 0.02.
SPREAD = 0.02


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def shapes(text: int = TEXT, pooled: int = POOLED) -> dict[str, tuple[int, ...]]:
    """Flux.1-dev's tensors, in the order of its file."""
    found = linear("img_in", HIDDEN, 64) | linear("txt_in", HIDDEN, text)
    for name, columns in (("time_in", 256), ("vector_in", pooled), ("guidance_in", 256)):
        found |= linear(f"{name}.in_layer", HIDDEN, columns) | linear(f"{name}.out_layer", HIDDEN, HIDDEN)
    for block in range(DOUBLE):
        for stream in ("img", "txt"):
            at = f"double_blocks.{block}.{stream}_"
            found |= linear(f"{at}mod.lin", 6 * HIDDEN, HIDDEN) | linear(f"{at}attn.qkv", 3 * HIDDEN, HIDDEN)
            found |= {f"{at}attn.norm.query_norm.scale": (128,), f"{at}attn.norm.key_norm.scale": (128,)}
            found |= linear(f"{at}attn.proj", HIDDEN, HIDDEN)
            found |= linear(f"{at}mlp.0", MLP, HIDDEN) | linear(f"{at}mlp.2", HIDDEN, MLP)
    for block in range(SINGLE):
        at = f"single_blocks.{block}."
        found |= linear(f"{at}linear1", 3 * HIDDEN + MLP, HIDDEN) | linear(f"{at}linear2", HIDDEN, HIDDEN + MLP)
        found |= {f"{at}norm.query_norm.scale": (128,), f"{at}norm.key_norm.scale": (128,)}
        found |= linear(f"{at}modulation.lin", 3 * HIDDEN, HIDDEN)
    return (
        found | linear("final_layer.linear", 64, HIDDEN) | linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN)
    )


def random_blocks(type_name: str, n_blocks: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [n_blocks, block_bytes] of random bits whose scales make the values spread by about SPREAD."""
    block = FORMATS[type_name]
    blocks = torch.randint(0, 256, (n_blocks, block.block_bytes), dtype=torch.uint8, device=DEVICE, generator=generator)
    # Where d and dmin lie, how widely values spread at d = 1, and dmin / d that centres them.
    places, spread, centre = {
        "Q4_0": ((0,), 4.6, None),
        "Q8_0": ((0,), 74, None),
        "Q3_K": ((108,), 2.3 * 18, None),
        "Q4_K": ((0, 2), 4.6 * 32, 7.5),
        "Q5_K": ((0, 2), 9.2 * 32, 15.5),
        "Q6_K": ((208,), 18.5 * 74, None),
    }[type_name]
    d = (torch.rand(n_blocks, device=DEVICE, generator=generator) * 0.5 + 0.75) * SPREAD / spread
    for place, scale in zip(places, (d, d * centre if centre else d), strict=False):
        blocks[:, place : place + 2] = scale.half().view(torch.uint8).view(-1, 2)
    return blocks


def type_of(name: str, recipe: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if recipe in FILE_TYPES and recipe not in MIXED:
        rank = rank_of(name, SENSITIVITY["flux"].rules, depths_of(shapes))
        return FILE_TYPES[recipe].types[rank]
    usual, others = MIXED.get(recipe, (recipe, {}))
    return next((other for part, other in others.items() if part in name), usual)


def write_gguf(path: Path, recipe: str, shapes: dict[str, tuple[int, ...]]) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, shape in shapes.items():
        if len(shape) == 1 or name.startswith(KEPT):
            spread = 0.01 if len(shape) == 1 else SPREAD
            values = torch.randn(shape, device=DEVICE, generator=generator) * spread
            writer.add_tensor(name, (torch.ones_like(values) if name.endswith("scale") else values).cpu().numpy())
        else:
            type_name = type_of(name, recipe, shapes)
            n_blocks = shape[0] * shape[1] // FORMATS[type_name].block_size
            blocks = random_blocks(type_name, n_blocks, generator).view(shape[0], -1).cpu().numpy()
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--text", type=int, default=TEXT)
    parser.add_argument("--pooled", type=int, default=POOLED)
    options = parser.parse_args()
    for recipe in options.recipes:
        path = options.folder / f"flux-{recipe}.gguf"
        write_gguf(path, recipe, shapes(options.text, options.pooled))
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
