"""A conversion's memory: twice its largest tensor as it is stored, and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer.writer import write_gguf
from host.environment import ROOT
from safetensors.torch import save_file

# What a process takes besides twice its largest tensor: torch alone takes 220 MB.
ALLOWANCE = 500_000_000
CONVERT_AND_SAY_PEAK = """
import re, sys
from gguf_native.quantizer import convert
convert(sys.argv[1], "out.gguf", "F16", architecture="some")
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
LARGE = 128 << 20
LARGE_NAME = "blocks.0.weight"


class LargeTensor(NamedTuple):
    """A tensor of zeros in a GGUF file."""

    type: str
    shape: tuple[int, int]
    nbytes: int
    name: str = LARGE_NAME


def save_large(path: Path, kind: str) -> None:
    """A file with one tensor of LARGE bytes of a kind: a dtype, scaled fp8, a format of ComfyUI, a GGML type."""
    columns = 8192
    rows = LARGE // columns
    if kind in FORMATS:
        row_bytes = columns // FORMATS[kind].block_size * FORMATS[kind].block_bytes
        tensor = LargeTensor(kind, (LARGE // row_bytes, columns), LARGE // row_bytes * row_bytes)
        zeros = torch.zeros(row_bytes, dtype=torch.uint8)
        write_gguf([path], {}, [[tensor]], lambda tensor: (zeros for _ in range(tensor.shape[0])))
        return
    configuration = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    tensors = {
        "bfloat16": {"weight": torch.ones(rows, columns // 2, dtype=torch.bfloat16)},
        "float8": {"weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn), "weight_scale": torch.ones(rows, 1)},
        "nvfp4": {
            "weight": torch.zeros(rows, columns, dtype=torch.uint8),
            "weight_scale": torch.zeros(rows, columns // 8, dtype=torch.uint8),
            "weight_scale_2": torch.ones(()),
            "comfy_quant": configuration,
        },
    }
    save_file({f"{LARGE_NAME.removesuffix('weight')}{end}": tensor for end, tensor in tensors[kind].items()}, path)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self/status")
@pytest.mark.parametrize("kind", ["bfloat16", "float8", "nvfp4", "Q8_0", "Q4_K"])
def test_memory_is_two_of_a_large_tensor_as_stored_and_a_constant(tmp_path, kind):
    if kind == "nvfp4":
        pytest.importorskip("comfy_kitchen", reason="comfy-kitchen, which comes with ComfyUI, is not here")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "gguf_native").symlink_to(ROOT, target_is_directory=True)
    source = tmp_path / ("model.gguf" if kind in FORMATS else "model.safetensors")
    save_large(source, kind)
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_AND_SAY_PEAK, source],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    # A gigabyte that pytest would keep.
    source.unlink()
    (tmp_path / "out.gguf").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 2 * LARGE + ALLOWANCE
