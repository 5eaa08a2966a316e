"""`recommend`: which file type suits this machine, from figures measured on the spot."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..ops.formats import FORMATS, is_packed
from .known_models import MODELS, KnownModel
from .measure import Device, Figures, available_ram, find_device, measure
from .plan import plan_tensors
from .printing import say, say_json, size, table
from .recipes import FILE_TYPES
from .sizes import memory_size
from .source import SourceTensor

HELP = "for each file type: size, what stays on the GPU, what a step takes longer, what is lost; and which to take"

GIB = 1 << 30
# What ComfyUI keeps free of weights, at least, and beside what it reckons a model's forward to need.
LEAST_WORKING = 1.2 * GIB
EXTRA_WORKING = 0.4 * GIB
# A file type is worth its quality while it makes a step by no more than this longer; below this error quality counts.
WORTHWHILE = 0.10
GOOD_ERROR = 0.10
SMALL_TYPE = "BF16"
# Bytes per second of PCIe 3.0 with 16 lanes, in practice: taken for the bus of a card that is not here.
USUAL_BUS = 12e9

OFFERED = (
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_XS",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "BF16",
)


class Choice(NamedTuple):
    """One file type on one machine: bytes, seconds of a step, and the relative error of its weights.

    `ram_bytes` is what main memory must hold at hand: what streams, or all where there is no card.
    """

    file_type: str
    file_bytes: float
    bits_per_weight: float
    resident_bytes: float
    streamed_bytes: float
    ram_bytes: float
    decode_seconds: float
    stream_seconds: float
    added_seconds: float
    slowdown: float
    error: float


class Advice(NamedTuple):
    """The choices for a model, which one to take and why; `setting` says for which machine."""

    model: str
    setting: str
    choices: list[Choice]
    recommended: str
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="flux", help="the model (default: flux)")
    parser.add_argument(
        "--vram", type=memory_size, metavar="6GB", help="memory of the card; default: what is free on this one"
    )
    parser.add_argument("--ram", type=memory_size, metavar="16GB", help="main memory; default: what is free here")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Always 0."""
    advice = recommend(MODELS[arguments.model], arguments.vram, arguments.ram)
    if arguments.json:
        say_json(advice._asdict() | {"choices": [choice._asdict() for choice in advice.choices]})
    else:
        say(*lines(advice))
    return 0


def recommend(model: KnownModel, vram: float | None = None, ram: float | None = None) -> Advice:
    """Measure this machine, a few seconds, and choose for it; `vram` and `ram` in bytes, None for what is free here."""
    device = find_device()
    types = {name for file_type in OFFERED for name in mixture(model, file_type)}
    figures = measure(device, sorted(types))
    if figures.bus is None:
        figures = figures._replace(bus=USUAL_BUS)
    if vram is None and device.is_gpu:
        vram = device.free
    ram = available_ram() if ram is None else ram
    choices = [choose(model, file_type, figures, vram) for file_type in OFFERED]
    chosen, why = best(choices, ram)
    return Advice(model.what, setting(device, figures, vram, ram), choices, chosen.file_type, why)


def choose(model: KnownModel, file_type: str, figures: Figures, vram: float | None) -> Choice:
    """What a file type costs with so much memory on the card; None: there is no card, all computes in main memory."""
    values = mixture(model, file_type)
    n_bytes = file_bytes(values)
    resident = n_bytes if vram is None else min(n_bytes, max(0.0, vram - working_bytes(model)))
    compute = compute_seconds(model, figures.operations)
    decode = decode_seconds(values, {name: row.values_per_second for name, row in figures.types.items()})
    stream = (n_bytes - resident) / figures.bus
    added = added_seconds(compute, decode, stream)
    return Choice(
        file_type,
        n_bytes,
        n_bytes * 8 / model.values,
        resident,
        n_bytes - resident,
        n_bytes if vram is None else n_bytes - resident,
        decode,
        stream,
        added,
        added / compute,
        weight_error(values, {name: row.error for name, row in figures.types.items()}),
    )


def mixture(model: KnownModel, file_type: str) -> Mapping[str, int]:
    """Type -> how many of the model's values have it in a file that `quantize` writes from 16 bits."""
    tensors = {name: unread(weight.shape) for weight in model.weights for name in weight.names()}
    values = Counter({SMALL_TYPE: model.values - sum(weight.values for weight in model.weights)})
    for tensor in plan_tensors(tensors, model.architecture, FILE_TYPES[file_type]):
        values[tensor.type] += tensor.source.n_values
    return values


def unread(shape: tuple[int, ...]) -> SourceTensor:
    """A tensor of 16 bits of which nobody asks the values."""
    return SourceTensor(torch.bfloat16, shape, lambda start, stop: torch.empty(stop - start, device="meta"))


def file_bytes(values: Mapping[str, int]) -> float:
    """Bytes of the tensors: values times the bytes of a block over its values."""
    return sum(n * FORMATS[name].block_bytes / FORMATS[name].block_size for name, n in values.items())


def working_bytes(model: KnownModel) -> float:
    """Memory that ComfyUI keeps for a forward, by its own formula: latents x 2 bytes x memory_factor x 0.01 MiB."""
    forward = model.latents * 2 * model.memory_factor * 0.01 * (1 << 20)
    return max(LEAST_WORKING, forward + EXTRA_WORKING)


def compute_seconds(model: KnownModel, operations_per_second: float) -> float:
    """A step with dense weights: the work of its forwards at the measured rate."""
    return model.forwards * model.operations / operations_per_second


def decode_seconds(values: Mapping[str, int], values_per_second: Mapping[str, float]) -> float:
    """Decoding each weight once in a step; ComfyUI batches the two forwards of CFG where memory allows."""
    return sum(n / values_per_second[name] for name, n in values.items() if is_packed(name))


def added_seconds(compute: float, decode: float, stream: float) -> float:
    """What a step takes longer: the decoding, and what of the streaming is not hidden behind the GPU's own work."""
    return decode + max(0.0, stream - compute - decode)


def weight_error(values: Mapping[str, int], errors: Mapping[str, float]) -> float:
    """Relative error of all weights together: squared errors add up by their share of the values."""
    return math.sqrt(sum(n * errors[name] ** 2 for name, n in values.items()) / sum(values.values()))


def best(choices: list[Choice], ram: float | None) -> tuple[Choice, str]:
    """The choice with the least error among those that cost little, or else the fastest good one; and why.

    Of the quantised ones: BF16 stands in the table to compare with.
    """
    packed = [choice for choice in choices if is_packed(FILE_TYPES[choice.file_type].types[0])]
    fitting = [choice for choice in packed if ram is None or choice.ram_bytes <= ram]
    if not fitting:
        smallest = min(packed, key=lambda choice: choice.file_bytes)
        return smallest, f"no file fits into {size(ram)} of main memory: weights come from disk; it is the smallest."
    cheap = [choice for choice in fitting if choice.slowdown <= WORTHWHILE and choice.error <= GOOD_ERROR]
    if cheap:
        chosen = min(cheap, key=lambda choice: choice.error)
        return chosen, f"the least loss of those that make a step at most {WORTHWHILE:.0%} longer; {placed(chosen)}."
    good = [choice for choice in fitting if choice.error <= GOOD_ERROR]
    if good:
        chosen = min(good, key=lambda choice: choice.added_seconds)
        return chosen, f"of those that lose at most {GOOD_ERROR:.0%} it makes a step longer by least; {placed(chosen)}."
    chosen = min(fitting, key=lambda choice: choice.error)
    return chosen, f"the least loss of those that fit; {placed(chosen)}."


def placed(choice: Choice) -> str:
    """Where the weights are, in words."""
    if not choice.streamed_bytes:
        return f"all {size(choice.file_bytes)} stay in memory"
    return f"{size(choice.resident_bytes)} stay on the GPU and {size(choice.streamed_bytes)} stream in each step"


def setting(device: Device, figures: Figures, vram: float | None, ram: float | None) -> str:
    """The machine in words, with what was measured and what was not."""
    memory = "" if ram is None else f", {ram / GIB:.1f} GiB of main memory"
    card = "" if vram is None else f", {vram / GIB:.1f} GiB on the card"
    rates = f"{figures.operations / 1e12:.3g} TFLOP/s"
    if device.is_gpu:
        return f"{device.name}{card}{memory}; measured: {rates}, bus {figures.bus / 1e9:.1f} GB/s"
    no_gpu = "no GPU found: decoding and products are the CPU's"
    bus = "" if vram is None else f", the bus is taken for one of {figures.bus / 1e9:.0f} GB/s, PCIe 3.0 with 16 lanes"
    return f"{device.name}{card}{memory}; measured: {rates} ({no_gpu}{bus})"


def lines(advice: Advice) -> list[str]:
    """The advice as the terminal and the node show it."""
    head = ("file type", "size", "bits", "resident", "streams", "added per step", "slower", "error of weights")
    rows = table([head, *map(row, advice.choices)])
    return [f"{advice.model} on {advice.setting}", "", *rows, "", f"Take {advice.recommended}: {advice.why}"]


def row(choice: Choice) -> tuple[str, ...]:
    return (
        choice.file_type,
        size(choice.file_bytes),
        f"{choice.bits_per_weight:.2f}",
        size(choice.resident_bytes),
        size(choice.streamed_bytes) if choice.streamed_bytes else "-",
        f"{choice.added_seconds:.3f} s",
        f"{choice.slowdown:.1%}",
        f"{choice.error:.2%}",
    )
