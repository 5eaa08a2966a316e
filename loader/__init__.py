"""From a GGUF file to a ComfyUI model; the host-free part of it is exported here."""

from .errors import GGUFError
from .gguf_file import GGUFFile, open_gguf

__all__ = ["GGUFError", "GGUFFile", "open_gguf"]
