"""Random models, sizes, batches and LoRAs through the real server with little VRAM: text to picture, nothing may fail,
and every latent must be the one that the same run gives with all the memory.

    python benchmarks/server_soak.py COMFYUI FOLDER [--cap GB] [--runs 100] [--seconds S] [--size PIXELS ...] [--cpu]
                                      [arguments for ComfyUI]

FOLDER is a folder of models: diffusion_models/flux-*.gguf by `flux_files.py --text 256 --pooled 256`; of the tests'
samples, which `make test` leaves in .host/models, TEXT_ENCODERS and VAE in theirs; LoRAs are made. Each row leaves the
digests of its latents in FOLDER; run it without --cap first, with which the others are compared. Prints what fails or
differs and the memory that /system_stats shows, and adds a row to results/server_soak.json, which --cpu, a trial with
small models and sizes, does not.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from ballast import hold_all_but
from gguf_native.loader import open_gguf
from random_lora import is_changed, lora_file

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))
from host.client import Result, WorkflowError  # noqa: E402
from host.server import Server, running_server  # noqa: E402
from host.workflows import node, text_to_image  # noqa: E402

RESULTS = HERE / "results" / "server_soak.json"
TEXT_ENCODERS = "tiny_clip_l-Q8_0.gguf", "tiny_t5-llama.cpp-Q4_K.gguf"
VAE = "tiny_flux_vae-Q8_0.gguf"
BATCHES = 1, 2, 3, 4
# Pixels that a run may have in all: more do not fit beside the least memory.
MOST_PIXELS = 4 * 1024**2
STEPS = 2, 9
RANK = 16
# Only what the last run made is kept: whatever returns later is computed again.
ARGUMENTS = ["--cache-classic"]
BAD_WORDS = "memory leak", "Traceback", "Ran out of memory"


class Run(NamedTuple):
    file: str
    size: int
    batch: int
    steps: int
    loras: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


def drawn(files: list[str], sizes: list[int], count: int) -> list[Run]:
    if min(sizes) ** 2 > MOST_PIXELS:
        raise SystemExit(f"a picture of {min(sizes)}x{min(sizes)} has more than {MOST_PIXELS:,} pixels")
    choose, found = random.Random(1), []
    while len(found) < count:
        size, batch = choose.choice(sizes), choose.choice(BATCHES)
        run = Run(choose.choice(files), size, batch, choose.choice(STEPS), choose.randrange(3))
        # Nine steps of a large picture show nothing that two do not.
        if batch * size**2 <= MOST_PIXELS and (run.steps == STEPS[0] or batch * size**2 <= MOST_PIXELS / 4):
            found.append(run)
    return found


def changed_layers(model: Path) -> dict[str, tuple[int, int]]:
    with open_gguf(model) as opened:
        shapes = {name.removesuffix(".weight"): info.shape for name, info in opened.tensors.items()}
    return {layer: shape for layer, shape in shapes.items() if is_changed(layer) and len(shape) == 2}


def graph(run: Run, seed: int) -> dict:
    made = text_to_image(
        node("UnetLoaderGGUF", unet_name=run.file),
        node("DualCLIPLoaderGGUF", clip_name1=TEXT_ENCODERS[0], clip_name2=TEXT_ENCODERS[1], type="flux"),
        node("VAELoaderGGUF", vae_name=VAE),
        size=run.size,
        steps=run.steps,
        seed=seed,
    )
    made["latent"]["inputs"]["batch_size"] = run.batch
    # SaveImage compresses more, which takes longer than many a run's step.
    made["save"] = node("PreviewImage", images=["image", 0])
    made["keep"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="soak")
    if run.loras:
        inputs = {}
        for number in range(1, run.loras + 1):
            inputs |= {f"lora_{number}": f"soak-{number}.safetensors", f"strength_model_{number}": 1.0}
            inputs |= {f"strength_clip_{number}": 0.0}
        made["lora"] = node("LoraLoaderGGUF", model=["model", 0], clip=["clip", 0], **inputs)
        made["sampler"]["inputs"]["model"] = ["lora", 0]
    return made


def latent_digest(server: Server, result: Result) -> str:
    """Of the file that SaveLatent left."""
    (entry,) = result.outputs["keep"]["latents"]
    file = server.base / entry["type"] / entry["subfolder"] / entry["filename"]
    digest = hashlib.sha256(file.read_bytes().partition(b'"latent_tensor"')[2]).hexdigest()
    file.unlink()
    return digest


def free_gb(server: Server) -> float:
    return round(server.request("/system_stats")["devices"][0]["vram_free"] / 2**30, 2)


def soak(server: Server, runs: list[Run], seconds: float, known: dict[str, str], file: Path) -> dict[str, object]:
    """Compare with what is `known`; all digests go to `file`."""
    began, done, compared, failed, different, free, digests = time.monotonic(), 0, 0, [], [], [], {}
    of_start = len(server.log())
    for run in runs:
        if time.monotonic() - began > seconds:
            break
        done += 1
        # Of two equal runs in a row the server would return the first again.
        seed = done % 2
        try:
            digest = latent_digest(server, server.run(graph(run, seed)))
        except WorkflowError as error:
            failed.append(f"{run}: {str(error)[:200]}")
            continue
        free.append(free_gb(server))
        key = f"{run} {seed}"
        usual = known.get(key) or digests.get(key)
        compared += usual is not None
        different += [str(run)] if usual not in (None, digest) else []
        digests[key] = digest
        file.write_text(json.dumps(digests, indent=1))
    log = server.log()[of_start:]
    return {
        "runs": done,
        "compared": compared,
        "failed": failed,
        "different": different,
        "in_the_log": [word for word in BAD_WORDS if word in log],
        "free_gb_after_runs": [min(free, default=None), max(free, default=None)],
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cap", type=float)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--size", type=int, nargs="+", default=[512, 768, 1024, 1536, 2048])
    parser.add_argument("--cpu", action="store_true")
    options, rest = parser.parse_known_args()
    folder = options.folder.resolve()
    files = sorted(path.name for path in (folder / "diffusion_models").glob("flux-*.gguf"))
    shapes = changed_layers(folder / "diffusion_models" / files[0])
    for number in (1, 2):
        lora_file(folder / "loras" / f"soak-{number}.safetensors", number, RANK, shapes)
    name = f"{options.cap or 'all'}, {os.environ.get('GGUF_NATIVE_MEMORY_MODE', 'balanced')}"
    usual = folder / "server_soak-all, balanced.json"
    known = json.loads(usual.read_text()) if usual.is_file() and options.cap else {}
    runs = drawn(files, options.size, options.runs)
    ballast = hold_all_but(options.cap) if options.cap else None
    try:
        with tempfile.TemporaryDirectory() as base:
            # The second is what small cards are told to use, and nothing under DynamicVRAM.
            device = "--cpu" if options.cpu else "--lowvram"
            with running_server(
                options.comfyui.resolve(), Path(base), folder, [*ARGUMENTS, *rest], device=device
            ) as server:
                row = {"free_gb_at_start": free_gb(server)} | soak(
                    server, runs, options.seconds, known, folder / f"server_soak-{name}.json"
                )
                if row["failed"] or row["in_the_log"]:
                    print(server.log()[-8000:])
    finally:
        if ballast:
            ballast.kill()
    print("SERVER", json.dumps({"cap": options.cap} | row), flush=True)
    if not options.cpu:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(rows | {name: device | row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
