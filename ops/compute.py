"""How a layer multiplies: exactly, in float8, in int8, or in the fastest of these that does the picture no harm."""

import logging
from functools import cache
from typing import NamedTuple

import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from .dequantize import has_kernel
from .eight_bits import RowScales, row_scales
from .formats import FORMATS
from .layout import pack
from .matmul import MAX_FEW_ROWS, Workspace, linear, linear_eight_bits

log = logging.getLogger("gguf_native")

COMPUTE = ("exact", "fp8", "int8", "auto")


class Method(NamedTuple):
    """A product in 8 bits: what it stores, and the oldest GPU that has it (compute capability)."""

    dtype: torch.dtype
    since: tuple[int, int]


METHODS = {
    "fp8": Method(torch.float8_e4m3fn, (8, 9)),
    "int8": Method(torch.int8, (7, 5)),
}


class Pace(NamedTuple):
    """Of a kind of GPU: the methods, fastest first, and from how many multiplications on they beat exactness."""

    order: tuple[str, ...]
    worthwhile: float


# From this compute capability on. 9.0 was measured: for 4608 x 3072 x 21504 bfloat16 takes 837 us, float8 422, int8
# 778; below 6e10 the launches take the CPU longer than the GPU saves. The others are by their data sheets.
PACES = {(9, 0): Pace(("fp8", "int8"), 6e10), (7, 5): Pace(("int8", "fp8"), 1e9)}

# Relative error of normally distributed weights in each type, quantised by `quantize`: what a file has at least.
FORMAT_ERROR = {
    "Q8_0": 0.0047,
    "Q6_K": 0.0166,
    "Q5_1": 0.033,
    "Q5_K": 0.034,
    "Q5_0": 0.0401,
    "Q4_1": 0.0688,
    "Q4_K": 0.0696,
    "IQ4_NL": 0.0733,
    "IQ4_XS": 0.074,
    "Q4_0": 0.081,
    "NVFP4": 0.09,
    "MXFP4": 0.1113,
    "IQ3_S": 0.1326,
    "Q3_K": 0.1437,
    "IQ3_XXS": 0.1801,
    "IQ2_S": 0.2433,
    "Q2_K": 0.2596,
}
# The others are coarser still.
COARSE_ERROR = 0.3

NEEDS_NVIDIA = "it needs an NVIDIA GPU"

# How many rows of the inputs the error of a method is measured on.
MEASURED_ROWS = 256


class Chosen(NamedTuple):
    """What a layer computes with: a method and its scales for so many rows of inputs or more, else exactly."""

    method: Method | None
    scales: RowScales | None
    min_rows: float = 0

    def on(self, device: torch.device) -> "Chosen":
        """The same with its scales on another device."""
        return self if self.scales is None else self._replace(scales=RowScales(*(s.to(device) for s in self.scales)))

    def linear(self, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, workspace: Workspace | None):
        """x [..., n_columns] W^T + bias -> [..., n_rows], of the dtype of x, which should have min_rows rows."""
        if self.method is None:
            return linear(x, weight, bias, workspace)
        return linear_eight_bits(x, weight, bias, self.scales, self.method.dtype, workspace)


EXACT = Chosen(None, None)


def choose(compute: str, weight: QuantizedTensor, x: torch.Tensor, workspace: Workspace | None) -> Chosen:
    """What a layer of this weight shall compute with, seen its first inputs x [..., n_columns]; waits for the GPU.

    "auto" takes the fastest method whose relative error on these inputs is below that of the weight's own type.
    """
    if compute == "auto":
        return _fastest_harmless(weight, x, workspace)
    return prepare(compute, weight)


def prepare(compute: str, weight: QuantizedTensor) -> Chosen:
    """The method "fp8" or "int8" for a weight on a GPU and 16-bit inputs; exact where it cannot serve."""
    found = _prepared(compute, weight)
    if isinstance(found, str):
        log_exact(compute, found)
        return EXACT
    return found


def _prepared(compute: str, weight: QuantizedTensor) -> "Chosen | str":
    """The method, or why it cannot serve."""
    method = METHODS[compute]
    if reason := why_not(compute, weight):
        return reason
    scales = row_scales(FORMATS[weight._params.type], weight._qdata, method.dtype)
    return Chosen(method, scales, MAX_FEW_ROWS + 1) if scales else "a weight has values that are not finite"


def why_not(compute: str, weight: QuantizedTensor) -> str | None:
    """Why a method cannot multiply by this weight, or None."""
    device, shape = weight._qdata.device, weight._params.orig_shape
    if not _is_nvidia(device):
        return NEEDS_NVIDIA
    since = METHODS[compute].since
    if torch.cuda.get_device_capability(device) < since:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {since[0]}.{since[1]}"
    if weight._qdata.shape[0] != shape[0] or shape[0] % 16 or shape[1] % 16:
        return "the sides of some matrices are not divisible by 16, or their rows are not whole blocks"
    if not has_kernel(FORMATS[weight._params.type], device):
        return "decoding to 8 bits without Triton is slower than the exact product"
    return _why_not_on(compute, device)


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@cache
def _why_not_on(compute: str, device: torch.device) -> str | None:
    """Why this torch has not the method on this GPU, or None: a small product tells. Windows lacks scales for rows."""
    blocks, ones = torch.zeros(64 * 2 * 34, dtype=torch.uint8, device=device), torch.ones(64, device=device)
    weight, x = pack(blocks, "Q8_0", (64, 64), torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    try:
        linear_eight_bits(x, weight, None, RowScales(ones, ones), METHODS[compute].dtype, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"torch {torch.__version__} has it not for {torch.cuda.get_device_name(device)} ({error})"
    return None


@cache
def log_exact(compute: str, reason: str) -> None:
    log.info("GGUF Native: some layers compute exactly instead of in %s, which is slower: %s.", compute, reason)


def _fastest_harmless(weight: QuantizedTensor, x: torch.Tensor, workspace: Workspace | None) -> Chosen:
    device = weight._qdata.device
    if not _is_nvidia(device):
        log_exact("auto", NEEDS_NVIDIA)
        return EXACT
    capability = torch.cuda.get_device_capability(device)
    pace = next((pace for since, pace in PACES.items() if capability >= since), Pace((), 0))
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[:: max(1, len(rows) // MEASURED_ROWS)].contiguous()
    expected = linear(rows, weight, None, workspace).float()
    allowed = FORMAT_ERROR.get(weight._params.type, COARSE_ERROR)
    for compute in pace.order:
        chosen = _prepared(compute, weight)
        if (
            isinstance(chosen, Chosen)
            and _relative_error(chosen.linear(rows, weight, None, workspace), expected) < allowed
        ):
            return chosen._replace(min_rows=max(chosen.min_rows, pace.worthwhile / weight.numel()))
    return EXACT


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())
