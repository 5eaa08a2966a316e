"""Time and memory to convert a model: the whole command beside libgguf's converter.

    python benchmarks/convert.py [TYPE ...]

Makes a bf16 file with one double and two single blocks of Flux (1.4 GB), converts it to each type in fresh processes,
in turns, prints a table and writes results/convert.json. Of libgguf only file types that it has.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from flux_files import shapes
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "convert.json"
ROOT = Path(__file__).resolve().parents[1]
TYPES = ("Q4_K_S", "Q6_K", "Q2_K", "Q8_0")
KEPT_BLOCKS = re.compile(r"double_blocks\.0\.|single_blocks\.[01]\.")
POLL_SECONDS = 0.02
PROCESSES = str(torch.get_num_threads())
# Ours, in one process and in as many as torch has threads.
OPTIONS = {"ours": [], "ours, processes": ["--processes", PROCESSES]}


def write_model(path: Path) -> int:
    """A Flux of fewer blocks with random weights; returns how many values it has."""
    generator = torch.Generator().manual_seed(0)
    kept = {name: shape for name, shape in shapes().items() if "blocks" not in name or KEPT_BLOCKS.match(name)}
    tensors = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in kept.items()}
    save_file(tensors, path)
    return sum(tensor.numel() for tensor in tensors.values())


def command(converter: str, source: Path, target: Path, type_name: str) -> list[str]:
    if converter in OPTIONS:
        return [
            sys.executable,
            str(ROOT),
            "quantize",
            str(source),
            str(target),
            "--type",
            type_name,
            *OPTIONS[converter],
        ]
    # A program of the wheel of libgguf.
    program = shutil.which("libgguf_quantize_gguf", path=str(Path(sys.executable).parent))
    return [program, "--src", str(source), "--dst", str(target), "--qtype", type_name]


def peak_megabytes(pid: int) -> float:
    """The peaks of a process that still runs and of those that it has started, together; 0 if it has ended."""
    try:
        kilobytes = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    return (int(kilobytes[1]) / 1024 if kilobytes else 0.0) + sum(peak_megabytes(int(child)) for child in children)


def measure(converter: str, source: Path, target: Path, type_name: str) -> dict[str, float] | str:
    """Seconds, megabytes at the peak and size of the output; or why there is none."""
    target.unlink(missing_ok=True)
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        command(converter, source, target, type_name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None:
        peak = max(peak, peak_megabytes(process.pid))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode or not target.is_file():
        return process.stdout.read().strip().splitlines()[-1]
    return {"s": round(seconds, 1), "peak MB": round(peak), "file MB": round(target.stat().st_size / 1e6, 1)}


def main(*types: str) -> None:
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "flux.safetensors"
        n_values = write_model(source)
        print(f"{n_values / 1e6:.0f} M values, {source.stat().st_size / 1e6:.0f} MB of bf16")
        for type_name in types or TYPES:
            results[type_name] = {
                converter: measure(converter, source, Path(folder) / "out.gguf", type_name)
                for converter in (*OPTIONS, "libgguf")
            }
            print(type_name, results[type_name], flush=True)
    about = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "values": n_values,
    }
    RESULTS.write_text(json.dumps({**about, "types": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
