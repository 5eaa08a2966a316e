"""From a GGUF file to the state dict that ComfyUI loads: packed matrices and plain tensors, as views of the file."""

import logging
import mmap
import os
import threading
from collections.abc import Mapping

import comfy.memory_management
import comfy.model_management
import comfy.utils
import torch

from ..ops.dequantize import dequantize
from ..ops.formats import FORMATS, is_packed
from ..ops.layout import pack
from ..ops.pinned_part import parts_for
from .errors import FileUnreadableError, TruncatedFileError
from .gguf_file import GGUFFile, TensorInfo, open_gguf
from .original_shape import logical_shape

log = logging.getLogger("gguf_native")

# What a packed weight claims to be until the host has chosen the model's dtype. The host lets float16 and fp8 files
# decide that dtype; bfloat16 leaves the choice to the model's own preference and the card.
UNDECIDED = torch.bfloat16


def read_state_dict(path: str, streaming: bool = True) -> tuple[dict[str, torch.Tensor], Mapping]:
    """(tensors by the file's own names, the file's metadata) of a GGUF file. Raises GGUFError kinds.

    Matrices are packed `QuantizedTensor`s; what the file stores as plain numbers stays so; any other quantised tensor
    (a bare parameter, a bias) is small and decoded to float32. With `streaming` every tensor views the mapped file and,
    under DynamicVRAM, carries the slice of the file that the host reads by itself; without, all is read now.
    """
    file = open_gguf(path)
    if streaming and _host_can_stream():
        views = _views(file)
        sd = {name: _tensor(file, info, views[name]) for name, info in file.tensors.items()}
    else:
        progress = comfy.utils.ProgressBar(sum(info.nbytes for info in file.tensors.values()))
        sd = {name: _tensor(file, info, _read_now(info, progress)) for name, info in file.tensors.items()}
    return sd, file.metadata


def _tensor(file: GGUFFile, info: TensorInfo, data: torch.Tensor) -> torch.Tensor:
    shape = logical_shape(file, info)
    if not is_packed(info.type):
        return data.view(FORMATS[info.type].storage_dtype).view(shape)
    if info.name.endswith(".weight") and len(shape) > 1:
        return pack(data, info.type, shape, UNDECIDED)
    return dequantize(data, info.type, shape)


def _read_now(info: TensorInfo, progress: comfy.utils.ProgressBar) -> torch.Tensor:
    """uint8 `[nbytes]` in RAM: read, not copied out of the mapped file, whose pages would lie there as well."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    # It goes back to the system with its tensor; what `torch.empty` takes, the C library mostly keeps for the process.
    room = mmap.mmap(-1, info.nbytes)
    with open(info.path, "rb") as source:
        source.seek(info.offset)
        missing = info.nbytes - source.readinto(room)
    if missing:
        raise TruncatedFileError(
            f"{info.path.name}: ends {missing:,} bytes early in tensor '{info.name}'; it was changed while it was "
            "read. Download it again.",
            missing,
        )
    progress.update(info.nbytes)
    return torch.frombuffer(room, dtype=torch.uint8)


def _host_can_stream() -> bool:
    if comfy.memory_management.aimdo_enabled or comfy.model_management.cpu_state != comfy.model_management.CPUState.GPU:
        return True
    log.info("GGUF Native: DynamicVRAM is off, so weights are read into RAM up front; the host pins them there.")
    return False


def _views(file: GGUFFile) -> dict[str, torch.Tensor]:
    """uint8 `[nbytes]` of each tensor, views of mapped parts of its file.

    DynamicVRAM is told the place in the file too, as `comfy.utils.load_safetensors` does for safetensors.
    """
    views, lock, infos = {}, threading.Lock(), file.tensors.values()
    for path, name in {info.path: info.name for info in infos}.items():
        handle = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the last tensor)
        spans = {(info.offset, info.nbytes): info.name for info in infos if info.path == path}
        mapping, n_header = file.mapping(name), min(spans)[0]
        if os.fstat(handle.fileno()).st_size != len(mapping) or handle.read(n_header) != mapping[:n_header]:
            raise FileUnreadableError(f"{path}: was replaced or cut while it was read. Load it again.")
        for span, part in parts_for(handle, spans).items():
            views[spans[span]] = view = part.view(*span)
            if comfy.memory_management.aimdo_enabled:
                view.untyped_storage()._comfy_tensor_file_slice = comfy.memory_management.TensorFileSlice(
                    handle, lock, *span
                )
    return views
