"""From any model file to GGUF."""

from ..ops.quantize import quantize
from .convert import convert
from .errors import QuantizerError

__all__ = ["QuantizerError", "convert", "quantize"]
