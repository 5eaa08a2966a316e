"""The 4-bit floating-point formats: a nibble is an E2M1 number, a sub-block shares an 8-bit float scale.

The codebook holds the E2M1 values doubled, so that they are integers, and half of every scale.
"""

import torch

from .base import BlockFormat, pack_planes
from .codebooks import VALUES_OF_CODE, codebook, look_up


class MXFP4(BlockFormat):
    """e: E8M0 | qs: 16 B, low nibbles are values 0-15, high ones 16-31 -> 32 values e * E2M1"""

    number, block_size, block_bytes = 39, 32, 17

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d = codebook("E8M0_HALVES", blocks.device).index_select(0, blocks[:, 0].int())
        values = look_up("E2M1_DOUBLED", blocks[:, 1:]).transpose(1, 2)
        torch.mul(values, d.view(-1, 1, 1), out=out.unflatten(1, (2, 16)))

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        amax = values.abs().amax(1, keepdim=True)
        e = (amax.double().log2().float().floor() + 125).to(torch.int32).masked_fill_(amax == 0, 0).to(torch.uint8)
        d = codebook("E8M0_HALVES", values.device).index_select(0, e.flatten().int()).unsqueeze(1)
        q = nearest_e2m1(values, d)
        return torch.cat((e, pack_planes(q.view(-1, 2, 16), 4)), 1)


class NVFP4(BlockFormat):
    """d: 4 x UE4M3 | qs: 4 x 8 B -> 64 values d * E2M1, 16 to a sub-block: 8 low nibbles, then 8 high ones"""

    number, block_size, block_bytes = 40, 64, 36

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        scales, qs = blocks[:, :4], blocks[:, 4:].unflatten(1, (4, 8))
        d = codebook("UE4M3_HALVES", blocks.device).index_select(0, scales.flatten().int())
        values = look_up("E2M1_DOUBLED", qs).transpose(2, 3)
        torch.mul(values, d.view(-1, 4, 1, 1), out=out.unflatten(1, (4, 2, 8)))


def nearest_e2m1(values: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """float32 [n, k] and half the scale [n, 1] -> uint8 codes of the nearest E2M1 numbers, the lower one of two."""
    magnitude = values.abs()
    best, code = magnitude, torch.zeros_like(values, dtype=torch.uint8)
    for k, level in enumerate(VALUES_OF_CODE["E2M1_DOUBLED"][1:8], 1):
        error = (d * level - magnitude).abs_()
        code.masked_fill_(error < best, k)
        best = torch.minimum(error, best)
    return code.add_(((values < 0) & (code > 0)).to(torch.uint8), alpha=8)
