"""Full-size Flux in the real ComfyUI engine: this pack beside ComfyUI's own bfloat16, as ratios of one run.

    python benchmarks/flux.py COMFYUI FOLDER [NAME ...]

FOLDER gets the models (up to 100 GB). Every run has its own process; a pack's latent is compared with the native one
of the same values. Prints a table and writes results/flux.json. NAME selects rows of RUNS; their native runs come by
themselves.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "flux.json"

# name -> type of the file, further arguments of flux_run.py. The native run it is compared with has the same
# resolution and LoRAs, and all the memory.
RUNS = {
    "Q4_K": ("Q4_K", []),
    "Q5_K": ("Q5_K", []),
    "Q6_K": ("Q6_K", []),
    "Q8_0": ("Q8_0", []),
    "Q4_K 512": ("Q4_K", ["--resolution", "512"]),
    "Q4_K 6 GB": ("Q4_K", ["--cap", "6"]),
    "Q4_K 4 GB": ("Q4_K", ["--cap", "4"]),
    "Q4_K 3 GB": ("Q4_K", ["--cap", "3"]),
    "Q4_K legacy 6 GB": ("Q4_K", ["--cap", "6", "--disable-dynamic-vram"]),
    "Q4_K LoRA": ("Q4_K", ["--loras", "1"]),
    "Q4_K 2 LoRAs 6 GB": ("Q4_K", ["--loras", "2", "--cap", "6"]),
    "Q4_K compiled": ("Q4_K", ["--compile"]),
}
# What the native run leaves away, because it is the yardstick: free memory and the memory mode.
OF_THE_PACK = ("--cap", "--disable-dynamic-vram")


def run(comfyui: str, file: Path, latent: Path, arguments: list[str]) -> dict[str, object]:
    command = [sys.executable, HERE / "flux_run.py", comfyui, file, "--save", latent, *arguments]
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    results = [line for line in output.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise SystemExit(f"{file.name} {' '.join(arguments)} failed:\n{output.stdout[-2000:]}\n{output.stderr[-4000:]}")
    return json.loads(results[-1].removeprefix("RESULT "))


def native_arguments(arguments: list[str]) -> list[str]:
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--cap":
            next(rest)
        elif argument not in OF_THE_PACK:
            kept.append(argument)
    return kept


def relative_error(latent: Path, reference: Path) -> float:
    actual, expected = torch.load(latent).double(), torch.load(reference).double()
    return float((actual - expected).norm() / expected.norm())


def main(comfyui: str, folder: str, *names: str) -> None:
    models, rows, natives = Path(folder), {}, {}
    print(f"{'run':20} {'patcher':20} {'step s':>7} {'native':>7} {'ratio':>6} {'error':>8} {'peak GB':>8}")
    for name in names or RUNS:
        type_name, arguments = RUNS[name]
        packed = models / f"flux-{type_name}.gguf"
        if not packed.is_file():
            subprocess.run([sys.executable, HERE / "flux_files.py", folder, type_name], check=True)
        yardstick = native_arguments(arguments)
        key = (type_name, *yardstick)
        reference = models / f"native {' '.join(key)}.pt"
        if key not in natives:
            natives[key] = run(comfyui, packed.with_suffix(".safetensors"), reference, yardstick)
        latent = models / f"{name}.pt"
        row = run(comfyui, packed, latent, ["--pack", *arguments])
        row |= {
            "native_step": natives[key]["step"],
            "ratio": round(row["step"] / natives[key]["step"], 3),
            "error": relative_error(latent, reference),
        }
        rows[name] = row
        print(
            f"{name:20} {row['patcher']:20} {row['step']:7.4f} {row['native_step']:7.4f} {row['ratio']:6.3f} "
            f"{row['error']:8.1e} {row['torch_peak_gb']!s:>8}",
            flush=True,
        )
        write(rows)


def write(rows: dict[str, dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    RESULTS.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
