"""The command `quantize`: a model file to a GGUF file."""

import argparse
import math
import os
import re
from pathlib import Path

import torch
from tqdm import tqdm

from .convert import convert
from .fit_size import Bits, Size
from .printing import say
from .recipes import FILE_TYPES
from .sizes import file_size

HELP = "convert a model (safetensors, torch checkpoint, GGUF) to GGUF of a smaller type"
DEVICE = re.compile(r"cpu|(cuda)(?::(\d+))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a model file, a safetensors index, or a folder with shards")
    parser.add_argument("target", type=Path, help="the GGUF file to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--type", help=f"the file type: {', '.join(FILE_TYPES)}")
    kind.add_argument(
        "--target-size",
        type=lambda text: Size(file_size(text)),
        metavar="SIZE",
        help="instead of a type: a type for each matrix, with the least error in a file of e.g. 5.8GB",
    )
    kind.add_argument("--bits", type=bits, metavar="N", help="the same by bits for each weight, e.g. 4.8")
    parser.add_argument("--part", help="of a full checkpoint: unet, clip, vae, or one encoder by its name")
    parser.add_argument(
        "--importance", type=Path, metavar="FILE", help="importance of columns, as GGUF or .dat imatrix"
    )
    parser.add_argument("--split-max-size", type=file_size, default=0, metavar="SIZE", help="write shards, e.g. of 4GB")
    parser.add_argument("--device", type=device, default="cpu", help="where to quantise: cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--processes",
        type=processes,
        default=1,
        metavar="N",
        help="quantise in so many processes on the CPU: faster, 0.2 GB of memory for each after the first (default: 1)",
    )
    parser.add_argument("--architecture", metavar="NAME", help="general.architecture of a model that is not known")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")


def bits(text: str) -> Bits:
    """`4.8`, more than 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of bits; write it like 4.8")
    return Bits(float(text))


def device(text: str) -> torch.device:
    """`cpu`, or a GPU that torch can use: `cuda`, `cuda:1`."""
    match = DEVICE.fullmatch(text)
    if match is None or (match[1] and int(match[2] or 0) >= torch.cuda.device_count()):
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs"
        raise argparse.ArgumentTypeError(f"'{text}' is no device here: write cpu, cuda or cuda:1; {found}")
    return torch.device(text)


def processes(text: str) -> int:
    """`1` to the number of cores."""
    n_cores = os.cpu_count() or 1
    if not text.isdigit() or not 0 < int(text) <= n_cores:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of processes here: write 1 to {n_cores}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a bar that shows rate and remaining time, and say what was written."""
    kind = next(kind for kind in (arguments.type, arguments.target_size, arguments.bits) if kind is not None)
    with tqdm(desc=arguments.target.stem, unit="B", unit_scale=True, disable=None, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        paths = convert(
            arguments.source,
            arguments.target,
            kind,
            part=arguments.part,
            importance=arguments.importance,
            device=arguments.device,
            progress=progress,
            split_max_bytes=arguments.split_max_size,
            architecture=arguments.architecture,
            force=arguments.force,
            processes=arguments.processes,
        )
    for path in paths:
        say(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    return 0
