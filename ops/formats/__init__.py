"""Every GGUF tensor type that can be decoded: the one table of formats."""

from .base import BlockFormat
from .float4 import MXFP4, NVFP4
from .i_quants import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, IQ4_XS
from .k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from .legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .plain import BF16, F16, F32, F64, I8, I16, I32, I64
from .ternary import TQ1_0, TQ2_0

__all__ = ["FORMATS", "FORMAT_BY_NUMBER", "BlockFormat"]

FORMATS: dict[str, type[BlockFormat]] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "F64": F64,
    "I8": I8,
    "I16": I16,
    "I32": I32,
    "I64": I64,
    "Q4_0": Q4_0,
    "Q4_1": Q4_1,
    "Q5_0": Q5_0,
    "Q5_1": Q5_1,
    "Q8_0": Q8_0,
    "Q2_K": Q2_K,
    "Q3_K": Q3_K,
    "Q4_K": Q4_K,
    "Q5_K": Q5_K,
    "Q6_K": Q6_K,
    "IQ1_S": IQ1_S,
    "IQ1_M": IQ1_M,
    "IQ2_XXS": IQ2_XXS,
    "IQ2_XS": IQ2_XS,
    "IQ2_S": IQ2_S,
    "IQ3_XXS": IQ3_XXS,
    "IQ3_S": IQ3_S,
    "IQ4_NL": IQ4_NL,
    "IQ4_XS": IQ4_XS,
    "TQ1_0": TQ1_0,
    "TQ2_0": TQ2_0,
    "MXFP4": MXFP4,
    "NVFP4": NVFP4,
}

FORMAT_BY_NUMBER: dict[int, type[BlockFormat]] = {row.number: row for row in FORMATS.values()}


def is_packed(type_name: str) -> bool:
    """Whether a type holds its values in blocks, which must be decoded."""
    return FORMATS[type_name].block_size > 1
