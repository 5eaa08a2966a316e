"""The decoder of the KL VAEs (SD, SDXL, Flux) in little memory: one layer after the other, each in strips of rows.

Every layer goes over the whole picture before the next begins, so nothing is cut: a convolution sees the rows around
its strip, a norm has the statistics of the whole picture, attention sees all of it. The result is that of the plain
decoder but for rounding.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F

# What the strips may take at most, and at most this part of the memory that is free when the decoder starts. On the CPU
# larger ones gain nothing; a GPU is idle during small ones.
STRIP_BYTES = {"cpu": 64 * 2**20}
MOST_STRIP_BYTES = 512 * 2**20
STRIP_PART = 8
# Queries of attention at a time on NVIDIA's GPUs, whose kernels write no scores: fewer leave most of a GPU idle.
LEAST_QUERIES = {"cuda": 1 if torch.version.hip else 1024}
# A value of a strip that goes into a layer or comes out of it is there up to four times, in four bytes each.
BYTES_PER_VALUE = 16
# A strip of one row could not give the first row of a convolution, which needs the one below.
LEAST_ROWS = 2


class Host(NamedTuple):
    """What the strips ask of ComfyUI, which this module does not know."""

    # (layer, a tensor of the dtype and device to compute with) -> its weight and bias, to be used within.
    borrow: Callable[[torch.nn.Module, torch.Tensor], AbstractContextManager[tuple[torch.Tensor, torch.Tensor]]]
    # (queries, keys, values), each [batch, heads, positions, channels]
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    free_bytes: Callable[[], int]
    # Whether a tensor in RAM is now locked there for the GPU; `unpin` undoes it.
    pin: Callable[[torch.Tensor], bool]
    unpin: Callable[[torch.Tensor], object]
    # Called before each strip: raises if the user cancelled.
    between: Callable[[], None]
    # Called after each convolution.
    advance: Callable[[], None]


class Ram:
    """Memory for activations that have no room on the GPU, pinned as long as it lives if the host pins it.

    To lock memory takes longer than to copy into it.
    """

    def __init__(self, n_bytes: int, host: Host):
        self.bytes = torch.empty(n_bytes, dtype=torch.uint8)
        if host.pin(self.bytes):
            weakref.finalize(self, host.unpin, self.bytes)


class Rows:
    """An activation [height, batch, channels, width]: so a strip of it is one piece of memory, which may lie in RAM."""

    def __init__(self, values: torch.Tensor):
        self.values = values
        # (rows, variance, mean) of each strip written, the last two [batch, channels]
        self.moments = []

    def strip(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """[batch, channels, rows, width] on `device`; perhaps a view."""
        return self.values[start:end].to(device).permute(1, 2, 0, 3)

    def write(self, start: int, strip: torch.Tensor) -> None:
        self.moments.append((strip.shape[2], *torch.var_mean(strip.float(), dim=(2, 3), correction=0)))
        rows = strip.permute(2, 0, 1, 3)
        target = self.values[start : start + len(rows)]
        # From one device to the other only one piece of memory goes in one copy.
        target.copy_(rows if rows.device == target.device else rows.contiguous())

    def scale_and_shift(self, norm: torch.nn.GroupNorm, weight: torch.Tensor, bias: torch.Tensor):
        """The group norm of what was written, as two factors for each channel: float32 [batch, channels, 1, 1]."""
        n_rows, variances, means = zip(*self.moments, strict=True)
        part = torch.tensor(n_rows, dtype=torch.float32, device=weight.device).view(-1, 1, 1) / sum(n_rows)
        variance, mean = _merged(part, torch.stack(variances), torch.stack(means), 0)
        groups = (-1, norm.num_groups, norm.num_channels // norm.num_groups)
        variance, mean = _merged(1 / groups[2], variance.view(groups), mean.view(groups), 2)
        scale = weight.float().view(groups) * (variance + norm.eps).rsqrt()
        shift = bias.float().view(groups) - mean * scale
        return scale.view(-1, norm.num_channels, 1, 1), shift.view(-1, norm.num_channels, 1, 1)


def _merged(part: torch.Tensor | float, variances: torch.Tensor, means: torch.Tensor, dim: int):
    """Variance and mean of a whole from those of its parts along `dim`, without the cancellation of sums of squares."""
    mean = (part * means).sum(dim, keepdim=True)
    return (part * (variances + (means - mean) ** 2)).sum(dim, keepdim=True), mean


class Source(NamedTuple):
    """What a convolution reads: strips of an activation, changed on the way."""

    rows: Rows
    change: Callable[[torch.Tensor], torch.Tensor]
    # Rows and columns that `change` makes of one.
    factor: int = 1


def unchanged(strip: torch.Tensor) -> torch.Tensor:
    return strip


def normalised(strip: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (strip * scale).add_(shift).to(strip.dtype)


def activated(strip: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.silu(normalised(strip, scale, shift), inplace=True)


def doubled(strip: torch.Tensor) -> torch.Tensor:
    return F.interpolate(strip, scale_factor=2.0, mode="nearest")


def _windows(source: Source, halo: int, n_rows: int, device: torch.device) -> Iterator[torch.Tensor]:
    """What `source` gives of `n_rows` rows at a time, with `halo` rows above and below; zeros beyond the picture.

    Each row is read once, and before a convolution of the windows has come to it: its results may take the row's place.
    """
    height, batch, channels, width = source.rows.values.shape
    nothing = torch.zeros(batch, channels, halo, width * source.factor, dtype=source.rows.values.dtype, device=device)
    above = nothing
    for start in range(0, height, n_rows):
        strip = source.change(source.rows.strip(start, min(start + n_rows, height), device))
        below = [nothing] if start + n_rows >= height else []
        window = torch.cat([above, strip, *below], dim=2)
        del strip
        yield window
        above = window[:, :, window.shape[2] - 2 * halo :].clone()


class StripDecoder:
    """One decoding of one latent [batch, channels, height, width] by the host's `Decoder`."""

    def __init__(self, decoder: torch.nn.Module, host: Host, latent: torch.Tensor):
        self.decoder = decoder
        self.host = host
        self.like = latent
        # Of activations that are used up.
        self.spare: list[Ram] = []
        most = STRIP_BYTES.get(latent.device.type, MOST_STRIP_BYTES)
        self.strip_bytes = int(min(most, host.free_bytes() / STRIP_PART))

    def decode(self) -> torch.Tensor:
        x = Rows(self.like.permute(2, 0, 1, 3))
        x = self.convolved(self.decoder.conv_in, Source(x, unchanged))
        x = self.resnet(self.decoder.mid.block_1, x)
        x = self.attended(self.decoder.mid.attn_1, x)
        x = self.resnet(self.decoder.mid.block_2, x)
        for level in reversed(self.decoder.up):
            for i, block in enumerate(level.block):
                x = self.resnet(block, x)
                if len(level.attn):
                    x = self.attended(level.attn[i], x)
            if hasattr(level, "upsample"):
                x = self.convolved(level.upsample.conv, Source(x, doubled, 2))
        x = self.convolved(self.decoder.conv_out, self.normed(self.decoder.norm_out, x, activated))
        picture = x.strip(0, len(x.values), self.like.device)
        return torch.tanh(picture) if self.decoder.tanh_out else picture

    def resnet(self, block: torch.nn.Module, x: Rows) -> Rows:
        h = self.convolved(block.conv1, self.normed(block.norm1, x, activated))
        last = self.normed(block.norm2, h, activated)
        if block.in_channels == block.out_channels:
            return self.convolved(block.conv2, last, into=h, plus=x)
        h = self.convolved(block.conv2, last, into=h)
        shortcut = block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut
        return self.convolved(shortcut, Source(x, unchanged), into=h, plus=h)

    def attended(self, block: torch.nn.Module, x: Rows) -> Rows:
        normed = self.normed(block.norm, x, normalised)
        q, k, v = (self._positions(self.convolved(layer, normed)) for layer in (block.q, block.k, block.v))
        n_positions = q.shape[2]
        n_queries = self.strip_bytes // (BYTES_PER_VALUE * n_positions)
        n_queries = max(n_queries, LEAST_QUERIES.get(q.device.type, 1))
        for start in range(0, n_positions, n_queries):
            self.host.between()
            queries = q[:, :, start : start + n_queries]
            queries.copy_(self.host.attention(queries, k, v))
        height, batch, channels, width = x.values.shape
        mixed = Rows(q.view(batch, height, width, channels).permute(1, 0, 3, 2))
        return self.convolved(block.proj_out, Source(mixed, unchanged), into=mixed, plus=x)

    def normed(self, norm: torch.nn.GroupNorm, x: Rows, change: Callable) -> Source:
        with self.host.borrow(norm, self.like) as (weight, bias):
            scale, shift = x.scale_and_shift(norm, weight, bias)
        return Source(x, partial(change, scale=scale, shift=shift))

    def convolved(self, layer: torch.nn.Conv2d, x: Source, into: Rows | None = None, plus: Rows | None = None) -> Rows:
        """`layer` over all of `x`, `plus` another activation, written over `into`, which may be that one or x's own."""
        height, batch, _, width = x.rows.values.shape
        height, width = height * x.factor, width * x.factor
        out = into or self._room(height, batch, layer.out_channels, width)
        out.moments.clear()
        row_bytes = BYTES_PER_VALUE * batch * (layer.in_channels + layer.out_channels) * width * x.factor
        n_rows = max(LEAST_ROWS, self.strip_bytes // row_bytes)
        start = 0
        # The weight is decoded once, not for each strip; and alone, because packed layers decode into one buffer.
        with self.host.borrow(layer, self.like) as (weight, bias):
            for window in _windows(x, layer.padding[0], n_rows, self.like.device):
                self.host.between()
                strip = F.conv2d(window, weight, bias, padding=(0, layer.padding[1]))
                if plus is not None:
                    strip += plus.strip(start, start + strip.shape[2], strip.device)
                out.write(start, strip)
                start += strip.shape[2]
        self.host.advance()
        return out

    def _room(self, *shape: int) -> Rows:
        """Memory for an activation: on the device if at least as much stays free there, else in RAM."""
        n_bytes = prod(shape) * self.like.itemsize
        if n_bytes <= self.host.free_bytes() / 2 or self.like.device.type == "cpu":
            return Rows(self.like.new_empty(shape))
        ram = self._ram(n_bytes)
        rows = Rows(ram.bytes[:n_bytes].view(self.like.dtype).view(shape))
        weakref.finalize(rows, self.spare.append, ram)
        return rows

    def _ram(self, n_bytes: int) -> Ram:
        for i, ram in enumerate(self.spare):
            if ram.bytes.nbytes >= n_bytes:
                return self.spare.pop(i)
        # Activations grow from layer to layer: smaller ones hardly serve again.
        self.spare.clear()
        return Ram(n_bytes, self.host)

    def _positions(self, x: Rows) -> torch.Tensor:
        """[batch, 1, positions, channels] on the device."""
        return x.values.to(self.like.device).permute(1, 0, 3, 2).flatten(1, 2).unsqueeze(1).contiguous()


def n_convolutions(decoder: torch.nn.Module) -> int:
    return sum(isinstance(layer, torch.nn.Conv2d) for layer in decoder.modules())
