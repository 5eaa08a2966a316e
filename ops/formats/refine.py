"""Encoding with less error than ggml: scales, minima and codes refined together, with the rounding of all of them.

The table REFINED has a row for each type that gains. Which trials are worth their time was measured on Gaussian values.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from .base import half_bytes, pack_fields, pack_planes
from .codebooks import codebook
from .k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from .legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .refine_columns import CodebookCodes, Columns, IntegerCodes, chosen, entries, number_of_least
from .refine_minima import IntegerMinima, refine_integer_minima, refine_lines
from .refine_scales import IntegerScales, refine_integer_scales, refine_scale

NEAR = ((0, 0), (-1, -1), (-1, 0), (0, -1), (1, 1), (0, 1), (-1, -2), (1, 0), (-2, 0))
ALONG = ((0, 0), (-1, -1), (1, 1))

MOVES_OF_4_BITS = (
    (0, 0),
    (-1, -1),
    (2, 1),
    (-1, 0),
    (1, 1),
    (2, 3),
    (-1, -2),
    (3, 1),
    (3, 0),
    (3, -2),
    (3, -1),
    (2, 2),
)
MOVES_OF_5_BITS = ((0, 0), (1, 1), (2, 3), (2, 1), (-1, -1), (3, 0), (3, 1), (2, 2), (1, 0), (3, -1))

TRIALS_OF_4_BITS = (-8.85, -8.6, -8.35, -8, -7.85, -7.35, -7, -6, -5, 6.8, 7.8, 8.05, 8.3, 8.55, 8.8)
TRIALS_OF_5_BITS = (-16.7, -16, -15.7, -15.2, -14.7, -14.2, -13.7, 12, 13, 14, 15, 15.6, 16.1, 16.6)
TRIALS_OF_8_BITS = tuple(range(120, 128))
TRIALS_OF_IQ4_NL = (-140, -133.5, -127, -120.5, -117.5, -111, -104.5, 107.5, 113, 118.5, 124.5, 127, 132.5, 135.5)
# The last ones leave codes at the high end unused, for blocks of two values, which all others give the same line.
MARGINS_OF_4_BITS = (*product((-0.3, 0.0, 0.3, 0.6), repeat=2), (0, -1), (0, -2), (0, -3), (0, -4))
MARGINS_OF_5_BITS = (*product((-0.4, 0.0, 0.4, 0.8), repeat=2), (0, -1), (0, -2), (0, -3), (0, -4))
SCALES_OF_MXFP4 = (1.0, 0.5, 2.0)

NEXT = (-1, 0, 1)
AROUND = tuple(range(-3, 5))
SCALES_OF_Q3_K = IntegerScales(4, 32, 32, 4 / 3, (-8, -4, -2, -1, 0, 1, 4, 6, 8), (-1,), NEXT)
SCALES_OF_Q6_K = IntegerScales(32, 128, 0, 1.15, (-11, *range(-1, 9), 10, 12, 14), (-6,), NEXT)
SCALES_OF_IQ4_XS = IntegerScales(127, 32, 32, 1.15, AROUND, AROUND, (-2, -1, 0, 1, 2))

MINIMA_OF_Q2_K = IntegerMinima(15, (-0.1, 0.3), (0, 1, 2, 3, 4), (0, 1, 2), NEAR, ALONG)
MINIMA_OF_Q4_K = IntegerMinima(63, (-0.3, 0.0, 0.3), (0, 1, 2, 3), (0, 1, 2), MOVES_OF_4_BITS, ALONG)
MINIMA_OF_Q5_K = IntegerMinima(63, (-0.3, 0.0, 0.3), (0, 1, 2, 3), (0, 1, 2), MOVES_OF_5_BITS, ALONG)


class Refinement(NamedTuple):
    """What the values of a group are encoded as, and how: columns that hold the values -> uint8 [n, block_bytes]."""

    group_size: int
    codes: IntegerCodes | CodebookCodes
    encode: Callable[[Columns], torch.Tensor]


def with_scale(pack: Callable[..., torch.Tensor], trials: tuple[float, ...], columns: Columns) -> torch.Tensor:
    d = refine_scale(columns, trials)
    return pack(d.unsqueeze(1), columns.stored())


def with_line(
    pack: Callable[..., torch.Tensor], margins: tuple[tuple[float, float], ...], columns: Columns
) -> torch.Tensor:
    d, m = refine_lines(columns, margins)
    return pack(d.unsqueeze(1), m.unsqueeze(1), columns.stored())


def with_integer_scales(pack: Callable[..., torch.Tensor], how: IntegerScales, columns: Columns) -> torch.Tensor:
    d, scale = refine_integer_scales(columns, how)
    scale = scale.t().add(how.stored_zero).to(torch.int8).contiguous()
    return pack(d.unsqueeze(1), scale.view(torch.uint8), columns.stored())


def with_integer_minima(pack: Callable[..., torch.Tensor], how: IntegerMinima, columns: Columns) -> torch.Tensor:
    found = refine_integer_minima(columns, how)
    d_dmin = torch.stack((found.d, found.dmin), 1).half().view(torch.uint8)
    scales_and_mins = torch.stack((found.scale.t(), found.minimum.t()), 1).to(torch.uint8)
    return pack(d_dmin, scales_and_mins, columns.stored())


def with_exponent(columns: Columns) -> torch.Tensor:
    """Blocks of MXFP4: ggml's exponent, or one of its neighbours. The values are divided by ggml's first."""
    halves = codebook("E8M0_HALVES", columns.x.device)
    largest = torch.maximum(columns.x.amax(0), -columns.x.amin(0))
    exponent = largest.frexp().exponent.add_(124).clamp_(min=2)
    columns.x.div_(halves.index_select(0, exponent))
    columns.limit()
    scales = entries(SCALES_OF_MXFP4, columns.x.device).unsqueeze(1).expand(-1, len(exponent))
    number, _ = number_of_least(columns.errors(scales))
    step = chosen(scales, number).frexp().exponent.sub_(1)
    columns.encode(halves.index_select(0, step + 128))
    e = (exponent + step).masked_fill_(largest == 0, 0).to(torch.uint8)
    return torch.cat((e.unsqueeze(1), pack_planes(columns.stored().view(-1, 2, 16), 4)), 1)


def pack_iq4_nl(d: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.cat((half_bytes(d), pack_planes(q.view(-1, 2, 16), 4)), 1)


def pack_iq4_xs(d: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    scales_h, scales_l = pack_fields(scale >> 4, 2), pack_fields(scale & 15, 4)
    return torch.cat((half_bytes(d), scales_h, scales_l, pack_planes(q.view(-1, 8, 2, 16), 4).flatten(1)), 1)


REFINED: dict[str, Refinement] = {
    "Q4_0": Refinement(32, IntegerCodes(-8, 7, 8), partial(with_scale, Q4_0.pack, TRIALS_OF_4_BITS)),
    "Q4_1": Refinement(32, IntegerCodes(0, 15), partial(with_line, Q4_1.pack, MARGINS_OF_4_BITS)),
    "Q5_0": Refinement(32, IntegerCodes(-16, 15, 16), partial(with_scale, Q5_0.pack, TRIALS_OF_5_BITS)),
    "Q5_1": Refinement(32, IntegerCodes(0, 31), partial(with_line, Q5_1.pack, MARGINS_OF_5_BITS)),
    "Q8_0": Refinement(32, IntegerCodes(-127, 127), partial(with_scale, Q8_0.pack, TRIALS_OF_8_BITS)),
    "Q2_K": Refinement(16, IntegerCodes(0, 3), partial(with_integer_minima, Q2_K.pack, MINIMA_OF_Q2_K)),
    "Q3_K": Refinement(16, IntegerCodes(-4, 3, 4), partial(with_integer_scales, Q3_K.pack, SCALES_OF_Q3_K)),
    "Q4_K": Refinement(32, IntegerCodes(0, 15), partial(with_integer_minima, Q4_K.pack, MINIMA_OF_Q4_K)),
    "Q5_K": Refinement(32, IntegerCodes(0, 31), partial(with_integer_minima, Q5_K.pack, MINIMA_OF_Q5_K)),
    "Q6_K": Refinement(16, IntegerCodes(-32, 31, 32), partial(with_integer_scales, Q6_K.pack, SCALES_OF_Q6_K)),
    "IQ4_NL": Refinement(32, CodebookCodes("IQ4_NL"), partial(with_scale, pack_iq4_nl, TRIALS_OF_IQ4_NL)),
    "IQ4_XS": Refinement(32, CodebookCodes("IQ4_NL"), partial(with_integer_scales, pack_iq4_xs, SCALES_OF_IQ4_XS)),
    "MXFP4": Refinement(32, CodebookCodes("E2M1_DOUBLED"), with_exponent),
}
