"""The ternary formats: 256 values -d, 0 or d."""

import torch

from .base import BlockFormat, bit_planes, half, half_bytes, pack_planes, round_half_away
from .exact import finite_quotient


class TQ1_0(BlockFormat):
    """qs: 32 B + 16 B of five trits | qh: 4 B of four trits | d: f16 -> 256 values d * (trit - 1)

    A byte is a fixed-point fraction: times 3 ** k modulo 256, then times 3, its integer part is trit k. Each run of
    bytes gives all its first trits, then all its second ones.
    """

    number, block_size, block_bytes = 34, 256, 54

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        d = half(blocks[:, 52:])
        fractions = blocks.new_empty(blocks.shape[0], 256)
        for run, values in zip(blocks[:, :52].split((32, 16, 4), 1), fractions.split((160, 80, 16), 1), strict=True):
            for k, trits in enumerate(values.split(run.shape[1], 1)):
                torch.mul(run, 3**k, out=trits)
        trits = fractions.to(torch.int16).mul_(3).bitwise_right_shift_(8).sub_(1)
        torch.mul(trits, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, trits = scale_and_trits(values)
        runs = []
        for run in trits.to(torch.int16).split((160, 80, 16), 1):
            count = 4 if run.shape[1] == 16 else 5
            number = run.new_zeros(run.shape[0], run.shape[1] // count)
            for digit in run.split(number.shape[1], 1):
                number = number * 3 + digit
            number *= 3 ** (5 - count)
            runs.append((number.int() * 256 + 242) // 243)
        return torch.cat((torch.cat(runs, 1).to(torch.uint8), half_bytes(d)), 1)


class TQ2_0(BlockFormat):
    """qs: 64 B of 2-bit fields | d: f16 -> 256 values d * (q - 1)

    A run of 32 bytes holds 4 x 32 values, lowest field first.
    """

    number, block_size, block_bytes = 35, 256, 66

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        qs, d = blocks[:, :64], half(blocks[:, 64:])
        q = bit_planes(qs.unflatten(1, (2, 32)), 2).flatten(1).sub_(1).view(torch.int8)
        torch.mul(q, d, out=out)

    @classmethod
    def encode(cls, values: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        d, trits = scale_and_trits(values)
        return torch.cat((pack_planes(trits.view(-1, 2, 4, 32), 2).flatten(1), half_bytes(d)), 1)


def scale_and_trits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [n, 256] -> d [n, 1], the greatest magnitude, and uint8 [n, 256] in 0 ... 2."""
    d = values.abs().amax(1, keepdim=True)
    return d, round_half_away(values * finite_quotient(1, d)).add_(1).to(torch.uint8)
