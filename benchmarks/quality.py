"""What each file type does to pictures: a model that really paints, quantised, run in the real ComfyUI engine, scored.

    python benchmarks/quality.py COMFYUI FOLDER [TYPE ...] [--compute exact fp8 int8 auto] [--captions 64] [--steps 20]
                                 [arguments for ComfyUI]

This pack quantises the tiny Flux of training/weights to each file type, all without TYPE; its files lie in FOLDER.
Every model paints the same captions from the same noise as ComfyUI's own run of the bfloat16 safetensors. Prints for
each its bytes, how much of what the captions ask the scorer finds in the pictures, that less bfloat16's, and how far
latents and pictures are from those of bfloat16. A run of all types writes results/quality.json, from which `plot.py`
draws docs/quality.svg, and docs/quality.png, one caption painted by all of them; a run of some writes both to FOLDER.
Needs `gguf_native` importable (pip install -e .), and tests/ for the text encoder and the sampling.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "training" / "weights"
sys.path.append(str(HERE.parent / "tests"))


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--compute", nargs="+", default=["exact"])
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_known_intermixed_args()


options, host_arguments = parse()
# The next import changes the folder that this process is in.
options.folder = options.folder.resolve()
sys.argv[1:] = [str(options.comfyui), str(WEIGHTS / "tiny_flux.safetensors"), *host_arguments]
# Starts ComfyUI as its arguments say.
import flux_run  # noqa: E402

mm = flux_run.mm
import comfy.sd  # noqa: E402
import painting  # noqa: E402
import torch  # noqa: E402
from gguf_native.loader.diffusion_model import load_diffusion_model  # noqa: E402
from gguf_native.ops.formats import is_packed  # noqa: E402
from gguf_native.quantizer import convert  # noqa: E402
from gguf_native.quantizer.recipes import FILE_TYPES  # noqa: E402
from gguf_native.training.scorer import scores  # noqa: E402
from host import sheet  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ORIGINAL = "bfloat16"
# Of the captions, the one in the picture; its columns, and the side of each cell.
SHOWN, COLUMNS, SIDE = 0, 9, painting.SIDE
# As the README has it.
HEADER = """| file type | compute | MB | right | points | latent error | PSNR |
|---|---|---|---|---|---|---|"""


class Painted(NamedTuple):
    latents: torch.Tensor  # [captions, 16, 16, 16]
    pictures: torch.Tensor  # [captions, 3, 128, 128] of 0 to 1


class Painter:
    """All that the models share: captions, their texts, and the autoencoder."""

    def __init__(self, count: int, steps: int):
        self.captions, self.steps = painting.fixed_captions(count), steps
        self.texts = painting.encode(painting.load_clip(), self.captions)
        self.vae = comfy.sd.VAE(sd=load_file(WEIGHTS / "tiny_vae.safetensors"))

    def paint(self, model) -> Painted:
        latents = painting.paint(model, self.texts, self.steps).cpu()
        return Painted(latents, painting.decode(self.vae, latents))


def models(types: list[str]) -> Iterator[tuple[str, str, Path, object]]:
    """(type, compute, file, model) of bfloat16 by ComfyUI's own loader, then of all others."""
    original = WEIGHTS / "tiny_flux.safetensors"
    yield ORIGINAL, "native", original, comfy.sd.load_diffusion_model(str(original))
    for name in types:
        file = options.folder / f"tiny_flux-{name}.gguf"
        convert(original, file, name, device=mm.get_torch_device(), force=True)
        for compute in options.compute if is_packed(FILE_TYPES[name].types[0]) else options.compute[:1]:
            yield name, compute, file, load_diffusion_model(str(file), compute=compute)


def compared(painted: Painted, original: Painted) -> dict[str, float | None]:
    """Relative error of the latents, and PSNR of all pictures together; no number where they are the same."""
    error = (painted.latents - original.latents).double().norm() / original.latents.double().norm()
    squares = float((painted.pictures - original.pictures).double().square().mean())
    return {"latent_error": float(error), "psnr": -10 * math.log10(squares) if squares else None}


def line(row: dict) -> str:
    psnr = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
    return (
        f"| {row['type']} | {row['compute']} | {row['bytes'] / 1e6:.2f} | {row['scores']['all']:.1%} "
        f"| {row['points']:+.1f} | {row['latent_error']:.4f} | {psnr} |"
    )


def image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy())


def about() -> dict[str, object]:
    """What the figures depend on."""
    device = mm.get_torch_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "weights": hashlib.sha256((WEIGHTS / "tiny_flux.safetensors").read_bytes()).hexdigest(),
        "captions": options.captions,
        "steps": options.steps,
    }


def main() -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    painter = Painter(options.captions, options.steps)
    rows, cells, original = [], [], None
    print(HEADER)
    for name, compute, file, model in models(options.types or list(FILE_TYPES)):
        painted = painter.paint(model)
        original = original or painted
        found = scores(painted.pictures, painter.captions)
        row = {"type": name, "compute": compute, "bytes": file.stat().st_size, "scores": found}
        row["points"] = 100 * (found["all"] - (rows[0]["scores"] if rows else found)["all"])
        rows.append(row | compared(painted, original))
        print(line(rows[-1]), flush=True)
        if compute in ("native", options.compute[0]):
            cells.append((f"{name} {found['all']:.0%}", image(painted.pictures[SHOWN])))
    results, docs = (options.folder,) * 2 if options.types else (HERE / "results", HERE.parent / "docs")
    (results / "quality.json").write_text(json.dumps(about() | {"rows": rows}, indent=1) + "\n")
    sheet.save(sheet.sheet(str(painter.captions[SHOWN]), cells, min(COLUMNS, len(cells)), SIDE), docs / "quality.png")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with torch.inference_mode():
        main()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
