"""Memory to convert one large tensor of each kind of source: the peak of the whole command.

    python benchmarks/convert_memory.py [KIND ...]

Makes a file with one tensor of 128 MiB, as it is stored, of each kind, converts it to Q8_0 in a fresh process, prints a
table and writes results/convert_memory.json.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from convert import measure
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "convert_memory.json"
LARGE = 128 << 20
COLUMNS = 8192
ROWS = LARGE // COLUMNS
LAYER = "double_blocks.0.img_attn.proj"
FP8 = torch.zeros(ROWS, COLUMNS).to(torch.float8_e4m3fn)


def save_scaled(path: Path, weight: torch.Tensor, format: str, **scales: torch.Tensor) -> None:
    """A layer in a format of ComfyUI."""
    configuration = torch.tensor(list(json.dumps({"format": format, "convrot": True}).encode()), dtype=torch.uint8)
    tensors = {"weight": weight, "comfy_quant": configuration, **scales}
    save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, path)


def save_gguf(path: Path, type_name: str) -> None:
    """A matrix of zeros."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    row_bytes = COLUMNS // block_size * block_bytes
    packed = torch.zeros(LARGE // row_bytes, row_bytes, dtype=torch.uint8).numpy()
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor(f"{LAYER}.weight", packed, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BF16 = {f"{LAYER}.weight": torch.zeros(ROWS, COLUMNS // 2, dtype=torch.bfloat16)}
BYTES, INT8 = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8), torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
# Kind -> (ending, what writes such a file).
KINDS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "bfloat16": ("safetensors", lambda path: save_file(BF16, path)),
    "bfloat16, torch checkpoint": ("pt", lambda path: torch.save(BF16, path)),
    "float8": ("safetensors", lambda path: save_scaled(path, FP8, "float8_e4m3fn", weight_scale=torch.ones(()))),
    "float8, a scale for each row": (
        "safetensors",
        lambda path: save_scaled(path, FP8, "float8_e4m3fn", weight_scale=torch.ones(ROWS, 1)),
    ),
    "mxfp8": (
        "safetensors",
        lambda path: save_scaled(path, FP8, "mxfp8", weight_scale=BYTES[:, : COLUMNS // 32].contiguous()),
    ),
    "nvfp4": (
        "safetensors",
        lambda path: save_scaled(
            path,
            BYTES,
            "nvfp4",
            weight_scale=BYTES[:, : COLUMNS // 8].contiguous(),
            weight_scale_2=torch.ones(()),
        ),
    ),
    "int8_tensorwise, rotated": (
        "safetensors",
        lambda path: save_scaled(path, INT8, "int8_tensorwise", weight_scale=torch.ones(ROWS, 1)),
    ),
    "convrot_w4a4": (
        "safetensors",
        lambda path: save_scaled(path, INT8, "convrot_w4a4", weight_scale=torch.ones(ROWS)),
    ),
    "Q8_0": ("gguf", lambda path: save_gguf(path, "Q8_0")),
    "Q4_K": ("gguf", lambda path: save_gguf(path, "Q4_K")),
    "Q2_K": ("gguf", lambda path: save_gguf(path, "Q2_K")),
}


def main(*kinds: str) -> None:
    results = {}
    for kind in kinds or KINDS:
        ending, save = KINDS[kind]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"model.{ending}"
            save(source)
            results[kind] = measure("ours", source, Path(folder) / "out.gguf", "Q8_0")
        print(kind, results[kind], flush=True)
    about = {"machine": platform.machine(), "torch": torch.__version__, "tensor MB": round(LARGE / 1e6)}
    RESULTS.write_text(json.dumps({**about, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
