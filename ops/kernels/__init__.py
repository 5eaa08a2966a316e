"""KERNELS: the types that a GPU decodes with a Triton kernel; or the reason why there are none."""

from typing import NamedTuple

try:
    from . import float4, i_quants, k_quants, legacy, ternary
except ImportError as error:
    WHY_NONE: str | None = f"Triton cannot be imported ({error})"
else:
    WHY_NONE = None


class Kernel(NamedTuple):
    """A decoder and how to launch it. The numbers were chosen by benchmarks/kernels.py, see its results."""

    decode: object  # Triton function: block addresses, codebook -> float32 [blocks, rows, values]
    rows: int
    values: int
    values_per_program: int
    n_warps: int
    codebook: str | None = None  # a name in formats/codebooks.py
    # values_per_program and n_warps where the values become 8 bits, if others are better there.
    eight_bits: tuple[int, int] | None = None


KERNELS: dict[str, Kernel] = {}
if WHY_NONE is None:
    KERNELS = {
        "Q4_0": Kernel(legacy.q4_0, 2, 16, 1024, 1),
        "Q4_1": Kernel(legacy.q4_1, 2, 16, 1024, 2),
        "Q5_0": Kernel(legacy.q5_0, 2, 16, 1024, 2),
        "Q5_1": Kernel(legacy.q5_1, 2, 16, 2048, 4),
        "Q8_0": Kernel(legacy.q8_0, 2, 16, 4096, 1),
        "Q2_K": Kernel(k_quants.q2_k, 16, 16, 2048, 4),
        "Q3_K": Kernel(k_quants.q3_k, 16, 16, 2048, 1, eight_bits=(4096, 1)),
        "Q4_K": Kernel(k_quants.q4_k, 8, 32, 1024, 2, eight_bits=(4096, 1)),
        "Q5_K": Kernel(k_quants.q5_k, 8, 32, 2048, 1, eight_bits=(4096, 1)),
        "Q6_K": Kernel(k_quants.q6_k, 16, 16, 1024, 1, eight_bits=(2048, 1)),
        "IQ1_S": Kernel(i_quants.iq1_s, 32, 8, 1024, 2, "IQ1_S"),
        "IQ1_M": Kernel(i_quants.iq1_m, 32, 8, 1024, 2, "IQ1_S"),
        "IQ2_XXS": Kernel(i_quants.iq2_xxs, 32, 8, 1024, 2, "IQ2_XXS"),
        "IQ2_XS": Kernel(i_quants.iq2_xs, 32, 8, 1024, 2, "IQ2_XS"),
        "IQ2_S": Kernel(i_quants.iq2_s, 32, 8, 1024, 2, "IQ2_S"),
        "IQ3_XXS": Kernel(i_quants.iq3_xxs, 32, 8, 1024, 2, "IQ3_XXS"),
        "IQ3_S": Kernel(i_quants.iq3_s, 32, 8, 1024, 1, "IQ3_S"),
        "IQ4_NL": Kernel(i_quants.iq4_nl, 2, 16, 4096, 2),
        "IQ4_XS": Kernel(i_quants.iq4_xs, 16, 16, 2048, 2),
        "TQ1_0": Kernel(ternary.tq1_0, 16, 16, 2048, 1),
        "TQ2_0": Kernel(ternary.tq2_0, 16, 16, 1024, 2),
        "MXFP4": Kernel(float4.mxfp4, 2, 16, 4096, 2),
        "NVFP4": Kernel(float4.nvfp4, 4, 16, 2048, 1, "UE4M3_HALVES"),
    }
