"""What a packed GGUF weight is and how to compute with it."""

from .dequantize import dequantize

__all__ = ["dequantize"]
