"""Random models, sizes, batches and LoRAs in one process with little VRAM: nothing may fail, and every latent must be
the one that the same run gives with all the memory.

    python benchmarks/soak.py COMFYUI FOLDER [--cap GB] [--runs 100] [--seconds S] [arguments of flux_run.py]

FOLDER holds the models, flux-*.gguf and sdxl.gguf. The runs are the same for every --cap; run it without first, which
keeps the latents in FOLDER. Prints how many were compared and what fails or differs, and adds a row to
results/soak.json.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("comfyui")
parser.add_argument("folder", type=Path)
parser.add_argument("--runs", type=int, default=100)
parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
soak, rest = parser.parse_known_args()
folder = soak.folder.resolve()
files = sorted((*folder.glob("flux-*.gguf"), *folder.glob("sdxl.gguf")))
sys.argv[1:] = [soak.comfyui, str(files[0]), *rest]
os.environ["GGUF_NATIVE_MEMORY_MODE"] = "balanced"

# Starts ComfyUI as its arguments say.
import flux_run  # noqa: E402
import torch  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
# Pixels of a side, pictures at once, forwards: two show what any do, nine keep decoded weights and record a CUDA graph.
SHAPES = (
    (512, 1, 9),
    (512, 2, 9),
    (512, 3, 2),
    (512, 4, 9),
    (768, 2, 9),
    (1024, 1, 2),
    (1024, 2, 2),
    (1024, 3, 2),
    (1024, 4, 2),
    (1536, 1, 2),
    (2048, 1, 2),
)


class Run(NamedTuple):
    file: Path
    resolution: int
    batch: int
    steps: int
    loras: int

    def __str__(self) -> str:
        return f"{self.file.stem}-{self.resolution}-{self.batch}-{self.steps}-{self.loras}"


def runs() -> list[Run]:
    choose = random.Random(1)
    # SDXL gets no LoRAs: those of flux_run.py are for Flux's blocks.
    drawn = [Run(choose.choice(files), *choose.choice(SHAPES), choose.randrange(3)) for _ in range(soak.runs)]
    return [run._replace(loras=0) if run.file.stem == "sdxl" else run for run in drawn]


def main() -> None:
    torch.set_grad_enabled(False)
    cap, began = flux_run.options.cap, time.monotonic()
    done, compared, failed, different = 0, 0, [], []
    with torch.inference_mode():
        models = {file: flux_run.load_diffusion_model(str(file)) for file in files}
        # torch's attention rounds otherwise in a process's first forward, with ComfyUI's own weights too.
        flux_run.sample(models[files[0]], 512)
        for run in runs():
            if time.monotonic() - began > soak.seconds:
                break
            done += 1
            kept = folder / f"soak-{run}.pt"
            flux_run.options.steps = run.steps
            try:
                latent, *_ = flux_run.sample(flux_run.loras(models[run.file], run.loras, 16), run.resolution, run.batch)
            except RuntimeError as error:
                # Out of memory in any of its ways, and whatever else a user would see.
                failed.append(f"{run}: {str(error).splitlines()[0][:150]}")
                continue
            if cap is None:
                torch.save(latent, kept)
            elif kept.is_file():
                compared += 1
                different += [] if torch.equal(torch.load(kept), latent) else [str(run)]
    row = {"runs": done, "compared": compared, "failed": failed, "different": different}
    row["seconds"] = round(time.monotonic() - began)
    print("SOAK", json.dumps({"cap": cap} | row), flush=True)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(rows | {f"{cap or 'all'}": device | row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
    if flux_run.ballast:
        flux_run.ballast.kill()
    os._exit(0)
