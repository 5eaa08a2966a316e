"""A caption painted by the real ComfyUI, from GGUF and from safetensors:  make demo

The tiny Flux of training/ is quantised by this pack's command line. Its GGUF file through this pack's loader and its
bfloat16 safetensors through ComfyUI's own paint from the same noise; one PNG shows both, and the scorer reads them.
Another caption of the grammar:  make demo ARGS="a large yellow star on a purple background"
"""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from host import in_process, samples, sheet, workflows
from host.client import Client, WorkflowError
from host.environment import HOST, find_comfyui
from host.server import running_server
from PIL import Image

from training import scenes, scorer

BASE = HOST / "demo"
PICTURE = BASE / "output" / "demo.png"
FILE_TYPE = "Q4_K_M"
SIDE = 384


def models() -> dict[str, tuple[Path, dict]]:
    """Label -> (file of the diffusion model, the node that loads it)"""
    ours, original = samples.trained_gguf(FILE_TYPE), samples.trained("tiny_flux")
    return {
        "bfloat16": (original, workflows.node("UNETLoader", unet_name=original.name, weight_dtype="default")),
        FILE_TYPE: (ours, workflows.node("UnetLoaderGGUF", unet_name=ours.name)),
    }


def paint(client: Client, loader: dict, caption: scenes.Caption) -> Image.Image:
    encoder, vae = samples.sample("clip_l").name, samples.trained("tiny_vae").name
    (picture,) = client.run(workflows.painting(loader, encoder, vae, str(caption)), print_step).pictures()
    return picture


def print_step(node: str, step: int, steps: int) -> None:
    print(f"{node} {step}/{steps}", end="\n" if step == steps else "\r", flush=True)


def report(label: str, picture: Image.Image, caption: scenes.Caption) -> None:
    """Print what the scorer sees in a picture."""
    pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 255
    (reading,) = scorer.read(pixels)
    things = ", ".join(str(seen.thing) for seen in reading.seen)
    parts = scorer.judge(caption, reading)
    right = sum(is_right for _, is_right in parts)
    print(f"{label:8}  the scorer reads {things} on {reading.background}: {right} of {len(parts)} parts as asked")


def interrupt(number: int, frame: FrameType | None) -> None:
    """On SIGTERM leave through the with block, which stops the server."""
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    caption = scenes.parse(" ".join(sys.argv[1:]) or str(scenes.EXAMPLE))
    comfyui = find_comfyui()
    in_process.bind(comfyui)
    samples.discard_outdated()
    sources = models()
    for label, (file, _) in sources.items():
        print(f"{label:8}  {file.stat().st_size:12,} B  {file.name}")
    started = time.monotonic()
    # ComfyUI does not take both.
    device = "--lowvram" if torch.cuda.is_available() else "--cpu"
    with running_server(comfyui, BASE, samples.MODELS, device=device) as client:
        print(f"The server is ready after {time.monotonic() - started:.1f} s: {client.url}", flush=True)
        try:
            pictures = {label: paint(client, loader, caption) for label, (_, loader) in sources.items()}
        except WorkflowError as error:
            print(f"{error}\n{error.traceback}The server's log: {BASE / 'server.log'}", file=sys.stderr)
            return 1
    print(f"Asked for: {caption}")
    for label, picture in pictures.items():
        report(label, picture, caption)
    labels = {label: f"{label}, {file.stat().st_size / 1e6:.1f} MB" for label, (file, _) in sources.items()}
    tiles = [(labels[label], picture) for label, picture in pictures.items()]
    sheet.save(sheet.sheet(str(caption), tiles, len(tiles), SIDE), PICTURE)
    print(f"The picture: {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
