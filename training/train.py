"""Trains the tiny Flux that paints, its autoencoder and a LoRA, and tries them in the real ComfyUI.

    python tests/host/environment.py -m training.train FOLDER

Writes tiny_vae, tiny_flux and tiny_lora.safetensors and grid.png to FOLDER. A stage that is left out takes its
predecessors' files from there. The seeds are fixed; how many steps fit into the seconds is up to the machine.
Processes of torch.distributed.run train together, each with one thread; one alone takes what the machine has.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import distributed

from . import engine
from .optimise import process
from .scenes import in_new_colour, random_captions
from .scorer import scores

LOG = logging.getLogger("training")
STAGES = ("autoencoder", "flow", "lora", "evaluate")
STEPS = 20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seconds-autoencoder", type=float, default=120)
    parser.add_argument("--seconds-flow", type=float, default=540)
    parser.add_argument("--seconds-lora", type=float, default=60)
    parser.add_argument("--go-on", action="store_true", help="from where the files in FOLDER are")
    parser.add_argument("--captions", type=int, default=16384, help="captions that the flow model is trained on")
    parser.add_argument("--pictures-each", type=int, default=4, help="pictures of each of them")
    parser.add_argument("--captions-lora", type=int, default=4096)
    parser.add_argument("--captions-evaluated", type=int, default=64)
    parser.add_argument("--batch", type=int, help="instead of each stage's own, for a try on a small machine")
    return parser.parse_args(arguments)


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """As bfloat16; a file half written never has its name."""
    unfinished = file.with_name(f"unfinished-{file.name}")
    rounded = {name: tensor.detach().bfloat16().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(rounded, unfinished, {"format": "pt"})
    unfinished.replace(file)
    LOG.info("%s: %.2f MB, %d tensors", file.name, file.stat().st_size / 1e6, len(rounded))


def as_flux_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flux files spell the gain of a norm "scale"."""
    return {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in tensors.items()}


def load_vae(file: Path, device: torch.device):
    from . import autoencoder

    vae = autoencoder.build(device)
    vae.load_state_dict(load_file(file))
    return vae


def load_flux(file: Path, device: torch.device):
    from . import flow

    model = flow.build(device)
    model.load_state_dict({name.replace("_norm.scale", "_norm.weight"): t for name, t in load_file(file).items()})
    return model


def batch_of(options: argparse.Namespace, own: int) -> int:
    return options.batch or own


def train(options: argparse.Namespace, device: torch.device) -> None:
    import comfy.model_management

    from . import autoencoder, flow, lora

    # The host then rotates queries and keys with a gradient.
    comfy.model_management.in_training = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    files = {name: options.folder / f"tiny_{name}.safetensors" for name in ("vae", "flux", "lora")}
    if "autoencoder" in options.stages:
        autoencoder.train(
            load_vae(files["vae"], device) if options.go_on else autoencoder.begin(device),
            options.seconds_autoencoder,
            device,
            batch_of(options, autoencoder.BATCH),
            lambda vae: save(vae.state_dict(), files["vae"]),
        )
    if not {"flow", "lora"} & set(options.stages):
        return
    vae, clip = load_vae(files["vae"], device), engine.load_clip()
    if "flow" in options.stages:
        model = load_flux(files["flux"], device) if options.go_on else flow.begin(clip, device)
        flow.train(
            model,
            vae,
            clip,
            options.captions,
            options.pictures_each,
            options.seconds_flow,
            device,
            batch_of(options, flow.BATCH),
            lambda model: save(as_flux_file(model.state_dict()), files["flux"]),
        )
    if "lora" in options.stages:
        model = load_flux(files["flux"], device)
        lora.train(
            model,
            vae,
            clip,
            options.captions_lora,
            options.seconds_lora,
            device,
            batch_of(options, lora.BATCH),
            lambda tensors: save(tensors, files["lora"]),
        )


def evaluate(folder: Path, count: int) -> None:
    """Accuracy over fixed captions, painted by the host's own nodes from the files."""
    import comfy.model_management

    comfy.model_management.in_training = False
    torch.backends.cuda.matmul.allow_tf32 = False
    painter = engine.Painter(folder)
    captions = random_captions(count, seed=41)
    new = in_new_colour(captions[: count // 2], seed=42)
    adapted = painter.with_lora()
    runs = {
        "captions": (painter.model, captions),
        "new colour, without the LoRA": (painter.model, new),
        "new colour, with the LoRA": (adapted, new),
        "captions, with the LoRA": (adapted, captions[: count // 4]),
    }
    grids = []
    for name, (model, asked) in runs.items():
        start = time.monotonic()
        pictures = painter.paint(model, [str(caption) for caption in asked], STEPS)
        found = ", ".join(f"{part} {right:.1%}" for part, right in scores(pictures, asked).items())
        LOG.info("%s: %s (%d pictures in %.1f s)", name, found, len(asked), time.monotonic() - start)
        grids.append(pictures)
    show(torch.cat(grids), folder / "grid.png")


def show(pictures: torch.Tensor, file: Path, columns: int = 8) -> None:
    """All pictures in rows; what is missing of the last one is left out."""
    rows = pictures[: len(pictures) // columns * columns].unflatten(0, (-1, columns))
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(file)
    LOG.info("%s: %d pictures", file.name, rows.shape[0] * columns)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stdout)
    options = parse(sys.argv[1:])
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    device = engine.bind()
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
        torch.set_num_threads(1)
    LOG.setLevel(logging.WARNING if process() else logging.INFO)
    if set(options.stages) - {"evaluate"}:
        train(options, device)
    if "evaluate" in options.stages:
        evaluate(options.folder, options.captions_evaluated)


if __name__ == "__main__":
    main()
