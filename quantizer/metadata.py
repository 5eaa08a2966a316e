"""The key-value pairs of a file that the converter writes."""

import json
from collections import Counter
from collections.abc import Mapping

import torch

from ..loader.original_shape import ORIGINAL_SHAPE
from .plan import PlannedTensor
from .recipes import RECIPE_VERSION
from .source import Source
from .vocabulary import TENSOR as VOCABULARY
from .vocabulary import vocabulary_pairs
from .writer import Pairs

QUANTIZATION_VERSION = 2
# What ComfyUI reads from the metadata of a safetensors file: sizes that the tensors do not show.
CONFIG = "config"


def metadata(model: Source, planned: list[PlannedTensor], tag: str, number: int, recipe: str) -> Pairs:
    """All key-value pairs of the output."""
    pairs = {
        "general.architecture": ("STRING", tag),
        "general.name": ("STRING", model.paths[0].stem),
        "general.file_type": ("UINT32", number),
        "general.quantization_version": ("UINT32", QUANTIZATION_VERSION),
        "gguf_native.recipe": ("STRING", recipe),
    }
    if isinstance(model.metadata.get(CONFIG), str):
        pairs[CONFIG] = ("STRING", model.metadata[CONFIG])
    pairs |= {key: (kind, model.metadata[key]) for key, kind in sorted(model.carries.items())}
    if VOCABULARY in model.tensors:
        pairs |= vocabulary_pairs(bytes(model.tensors[VOCABULARY].read().view(torch.uint8).numpy()), model.name)
    for tensor in planned:
        if tensor.shape != tensor.original_shape:
            pairs[ORIGINAL_SHAPE + tensor.name] = ("[INT32]", list(tensor.original_shape))
    return pairs


def recipe(planned: list[PlannedTensor], about: Mapping[str, object]) -> str:
    """How the file was made, as JSON."""
    counts = Counter(tensor.type for tensor in planned)
    return json.dumps({"version": RECIPE_VERSION, **about, "tensors": dict(counts.most_common())})
