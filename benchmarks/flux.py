"""Full-size Flux in the real ComfyUI engine: this pack beside ComfyUI's own bfloat16, as ratios of one run.

    python benchmarks/flux.py COMFYUI FOLDER [NAME ...]

FOLDER gets the models (up to 70 GB) and the native latents, with which every latent of the pack is compared. NAME
selects rows of RUNS. Prints a table, and adds to results/flux.json, from which `plot.py` draws docs/flux.svg.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "flux.json"


class Run(NamedTuple):
    """One process: a recipe of flux_files.py, and arguments of flux_run.py."""

    recipe: str
    resolutions: tuple[int, ...] = (1024,)
    computes: tuple[str, ...] = ("native", "exact", "fp8")
    arguments: tuple[str, ...] = ()


PACK = ("exact", "fp8")
# A run without "native" is compared with the native run before it, which had all the memory.
RUNS = {
    "Q4_K": Run("Q4_K", (1024, 512), ("native", "exact", "auto", "fp8")),
    "Q4_K 6 GB": Run("Q4_K", computes=PACK, arguments=("--cap", "6")),
    "Q5_K": Run("Q5_K"),
    "Q6_K": Run("Q6_K"),
    "Q8_0": Run("Q8_0"),
    "Q5_K_M": Run("Q5_K_M"),
    "Q4_K compiled": Run("Q4_K", arguments=("--compile",)),
    "Q4_K one LoRA": Run("Q4_K", arguments=("--loras", "1")),
    "Q4_K 4 GB": Run("Q4_K", computes=PACK, arguments=("--cap", "4")),
    "Q4_K 3 GB": Run("Q4_K", computes=PACK, arguments=("--cap", "3")),
    "Q4_K 6 GB legacy": Run("Q4_K", computes=PACK, arguments=("--cap", "6", "--disable-dynamic-vram")),
    "Q4_K two LoRAs 6 GB": Run("Q4_K", computes=PACK, arguments=("--loras", "2", "--cap", "6")),
    "Q4_K int8": Run("Q4_K", computes=("native", "int8")),
}


def run(comfyui: str, folder: Path, spec: Run) -> list[dict[str, object]]:
    """The rows that one process of flux_run.py prints."""
    file = folder / f"flux-{spec.recipe}.gguf"
    if not file.is_file():
        subprocess.run([sys.executable, HERE / "flux_files.py", folder, spec.recipe], check=True)
    shapes = ["--resolution", *map(str, spec.resolutions), "--compute", *spec.computes]
    command = [sys.executable, HERE / "flux_run.py", comfyui, file, "--latents", folder, *shapes, *spec.arguments]
    output = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    lines = [line.removeprefix("RESULT ") for line in output.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) != len(spec.resolutions) * len(spec.computes):
        raise SystemExit(f"{command} failed:\n{output.stdout[-2000:]}\n{output.stderr[-4000:]}")
    return [json.loads(line) for line in lines]


def main(comfyui: str, folder: str, *names: str) -> None:
    native_steps: dict[int, float] = {}
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    print(f"{'run':20} {'compute':7} {'size':>5} {'step s':>7} {'ratio':>6} {'error':>8} {'torch GB':>8} {'RSS GB':>7}")
    for name in names or RUNS:
        for row in run(comfyui, Path(folder), RUNS[name]):
            if row["compute"] == "native":
                native_steps[row["resolution"]] = row["step"]
            row["run"] = name
            row["ratio"] = round(row["step"] / native_steps[row["resolution"]], 3)
            rows[f"{name} {row['compute']} {row['resolution']}"] = row
            print(
                f"{name:20} {row['compute']:7} {row['resolution']:5} {row['step']:7.4f} {row['ratio']:6.3f} "
                f"{row['error'] or 0:8.1e} {row['torch_peak_gb']:8.3f} {row['rss_peak_gb']:7.2f}",
                flush=True,
            )
        write(rows)


def write(rows: dict[str, dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(device | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
