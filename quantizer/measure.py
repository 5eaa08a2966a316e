"""What this machine does in a second: bytes over the bus, values decoded, multiplications; measured on the spot."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..ops.dequantize import dequantize
from ..ops.quantize import quantize

# A matrix of Flux' MLP; on a CPU a sixteenth of it, which its cache does not hold either.
MATRIX = (12288, 3072)
CPU_MATRIX = (768, 3072)
# Rows of inputs of Flux at 1024x1024: 4096 of the picture, 512 of the text.
INPUTS = 4608
CPU_INPUTS = 128
BUS_BYTES = 256 << 20
MEMINFO = Path("/proc/meminfo")
REPEATS = 3
# Rows of normally distributed weights on which a type's error is measured.
SAMPLE_ROWS = 16


class Device(NamedTuple):
    """Where the model computes: `free` and `total` bytes of its memory."""

    device: torch.device
    name: str
    free: int
    total: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


class TypeFigures(NamedTuple):
    """Of one type: its relative error on normally distributed weights, and values decoded per second."""

    error: float
    values_per_second: float


class Figures(NamedTuple):
    """Of a device: bytes per second from pinned memory (None on a CPU), operations per second, and by type."""

    bus: float | None
    operations: float
    types: dict[str, TypeFigures]


def find_device() -> Device:
    """The first GPU that torch can use, else the CPU."""
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "CPU", 0, 0)
    return Device(torch.device("cuda", 0), torch.cuda.get_device_name(0), *torch.cuda.mem_get_info(0))


def measure(device: Device, types: list[str]) -> Figures:
    """All figures of a device, for these types."""
    bus = bus_bytes_per_second(device.device) if device.is_gpu else None
    return Figures(bus, operations_per_second(device.device), {name: type_figures(name, device) for name in types})


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of run(), after one run that does not count: other programs only make it longer."""
    times = []
    for _ in range(REPEATS + 1):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_bytes_per_second(device: torch.device) -> float:
    """From pinned host memory to the GPU, as ComfyUI streams weights."""
    source = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    return BUS_BYTES / seconds(lambda: target.copy_(source, non_blocking=True), device)


def operations_per_second(device: torch.device) -> float:
    """Additions and multiplications of a product of one of Flux' sizes, in the dtype that ComfyUI would take."""
    rows, (outputs, inputs) = (INPUTS, MATRIX) if device.type == "cuda" else (CPU_INPUTS, CPU_MATRIX)
    dtype = compute_dtype(device)
    x, weight = torch.randn(rows, inputs).to(device, dtype), torch.randn(outputs, inputs).to(device, dtype)
    return 2 * rows * outputs * inputs / seconds(lambda: torch.nn.functional.linear(x, weight), device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU multiplies in it, float16 on an older one, float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def type_figures(name: str, device: Device) -> TypeFigures:
    """What a type loses, and how fast the device decodes a matrix of it to the dtype that it computes in."""
    shape = MATRIX if device.is_gpu else CPU_MATRIX
    values, blocks = sample(name, shape[1])
    error = relative_error(dequantize(blocks, name), values)
    weight = blocks.repeat(shape[0] // SAMPLE_ROWS, 1).to(device.device)
    dtype = compute_dtype(device.device)
    taken = seconds(lambda: dequantize(weight, name, dtype=dtype), device.device)
    return TypeFigures(error, shape[0] * shape[1] / taken)


def type_error(name: str) -> float:
    """Relative error of normally distributed weights in a type that can be written."""
    values, blocks = sample(name, CPU_MATRIX[1])
    return relative_error(dequantize(blocks, name), values)


def sample(name: str, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(normally distributed float32 [SAMPLE_ROWS, columns], their blocks), always the same."""
    values = torch.randn(SAMPLE_ROWS, columns, generator=torch.Generator().manual_seed(0))
    return values, quantize(values, name)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared difference over that of the expected values."""
    return float((actual - expected).norm() / expected.norm())


def available_ram() -> int | None:
    """Bytes of main memory that programs could take now; None where the system does not say (not Linux)."""
    if not MEMINFO.exists():
        return None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:")
