"""Packed weights and inputs in 8 bits with a scale for each row: float8_e4m3fn or int8, by kernel or in plain torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .dequantize import decode_into, has_kernel
from .formats import FORMATS, BlockFormat
from .kernels import WHY_NONE

if WHY_NONE is None:
    from .kernels import scaled

# The largest magnitude of each storage type.
PEAKS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Rows of zeros get a scale too.
SMALLEST_PEAK = 1e-30


class RowScales(NamedTuple):
    """How the rows of a weight become 8-bit numbers: stored = value * factors, value = stored * scales."""

    factors: torch.Tensor  # float32 [n_rows]
    scales: torch.Tensor  # float32 [n_rows]

    def decode_into(self, blocks: torch.Tensor, type: str, out: torch.Tensor) -> Callable[[], None] | None:
        """As `dequantize.decode_into`, of the 8-bit numbers."""
        return decode_scaled_into(FORMATS[type], blocks, self.factors, out)


def row_scales(block_format: type[BlockFormat], blocks: torch.Tensor, dtype: torch.dtype) -> RowScales | None:
    """Scales by which every row of uint8 [n_rows, row_bytes] uses all of `dtype`; None if a value is not finite."""
    if has_kernel(block_format, blocks.device):
        peaks = torch.empty(blocks.shape[0], device=blocks.device)
        scaled.row_peaks_into(blocks, block_format.__name__, peaks)
    else:
        peaks = _decoded(block_format, blocks).abs().amax(1)
    if not peaks.isfinite().all():
        return None
    peaks = peaks.clamp_min_(SMALLEST_PEAK)
    return RowScales(PEAKS[dtype] / peaks, peaks / PEAKS[dtype])


def decode_scaled_into(
    block_format: type[BlockFormat], blocks: torch.Tensor, factors: torch.Tensor, out: torch.Tensor
) -> Callable[[], None] | None:
    """Write the values of uint8 [n_rows, row_bytes] times the factor of their row to `out`, rounded once.

    Returns what `dequantize.decode_into` does.
    """
    if has_kernel(block_format, blocks.device):
        return scaled.decode_scaled_into(blocks, block_format.__name__, factors, out)
    values = _decoded(block_format, blocks).mul_(factors.unsqueeze(1))
    out.copy_(values if out.dtype.is_floating_point else values.round_())
    return None


def quantize_rows_into(x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> Callable[[], None] | None:
    """x [n_rows, n_columns] -> float8_e4m3fn `out` of its shape, float32 scales [n_rows, 1]: x is about their product.

    Returns what `dequantize.decode_into` does.
    """
    peak = PEAKS[out.dtype]
    if x.is_cuda and WHY_NONE is None:
        return scaled.quantize_rows_into(x, out, scales, peak)
    torch.div(x.abs().amax(1, keepdim=True).float().clamp_min_(SMALLEST_PEAK), peak, out=scales)
    out.copy_(x / scales)
    return None


def _decoded(block_format: type[BlockFormat], blocks: torch.Tensor) -> torch.Tensor:
    n_columns = blocks.shape[1] // block_format.block_bytes * block_format.block_size
    values = torch.empty(blocks.shape[0], n_columns, device=blocks.device)
    decode_into(block_format, blocks, values)
    return values
