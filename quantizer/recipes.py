"""What each file type means: its number in a file and the GGML types that it mixes. Data only.

A matrix has a rank, which quantizer/sensitivity.py gives it by its name and place: most have 0, some 1, a few 2. The
letters S, M and L say how much a file spends on the higher ranks.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import RecipeError
from .writer import Tensor

# Written as gguf_native.recipe: whoever reads a file can tell by which rules it was made.
RECIPE_VERSION = 1


@dataclass(frozen=True)
class FileType:
    """number: `general.file_type`, llama.cpp's LLAMA_FTYPE. types: for matrices of rank 0, 1 and 2."""

    number: int
    types: tuple[str, str, str]


def uniform(number: int, type_name: str) -> FileType:
    return FileType(number, (type_name,) * 3)


FILE_TYPES = {
    "F32": uniform(0, "F32"),
    "F16": uniform(1, "F16"),
    "BF16": uniform(32, "BF16"),
    "Q8_0": uniform(7, "Q8_0"),
    "Q6_K": uniform(18, "Q6_K"),
    "Q5_K_M": FileType(17, ("Q5_K", "Q6_K", "Q6_K")),
    "Q5_K_S": uniform(16, "Q5_K"),
    "Q4_K_M": FileType(15, ("Q4_K", "Q5_K", "Q6_K")),
    "Q4_K_S": FileType(14, ("Q4_K", "Q4_K", "Q5_K")),
    "Q3_K_L": FileType(13, ("Q3_K", "Q5_K", "Q6_K")),
    "Q3_K_M": FileType(12, ("Q3_K", "Q4_K", "Q5_K")),
    "Q3_K_S": uniform(11, "Q3_K"),
    "Q2_K": FileType(10, ("Q2_K", "Q3_K", "Q4_K")),
    "Q5_1": uniform(9, "Q5_1"),
    "Q5_0": uniform(8, "Q5_0"),
    "Q4_1": uniform(3, "Q4_1"),
    "Q4_0": uniform(2, "Q4_0"),
    "IQ4_NL": FileType(25, ("IQ4_NL", "IQ4_NL", "Q5_K")),
    "IQ4_XS": FileType(30, ("IQ4_XS", "IQ4_XS", "Q5_K")),
    "IQ3_S": FileType(26, ("IQ3_S", "IQ3_S", "Q4_K")),
    "IQ3_XXS": FileType(23, ("IQ3_XXS", "IQ3_S", "Q4_K")),
    "IQ2_S": FileType(28, ("IQ2_S", "IQ3_XXS", "IQ3_S")),
    "MXFP4": uniform(38, "MXFP4"),
    "TQ1_0": uniform(36, "TQ1_0"),
    "TQ2_0": uniform(37, "TQ2_0"),
}

# Where rows are not whole blocks of 256, as llama.cpp does: the type with blocks of 32 that is next in quality.
BLOCKS_OF_32 = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}


def file_type(name: str) -> FileType:
    """The row of a file type; RecipeError for one that is not known or cannot be written."""
    if name not in FILE_TYPES:
        raise RecipeError(f"'{name}' is no file type that can be written; those are {', '.join(FILE_TYPES)}.")
    return FILE_TYPES[name]


def number_of(tensors: Iterable[Tensor]) -> int:
    """`general.file_type` of a file whose types were chosen one by one: that of the type with the most bytes."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    return min(row.number for row in FILE_TYPES.values() if row.types[0] == sizes.most_common(1)[0][0])
