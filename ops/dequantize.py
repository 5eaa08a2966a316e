"""From packed tensors to dense ones: by a kernel where there is one, else in plain torch, on any device."""

import logging
import math
import sys
import threading
from collections.abc import Callable
from functools import cache

import torch

from .formats import FORMAT_BY_NUMBER, FORMATS, BlockFormat
from .formats.plain import PlainFormat
from .kernels import WHY_NONE

if WHY_NONE is None:
    from .kernels import launch

log = logging.getLogger("gguf_native")

# Values decoded in one pass: on the CPU the temporaries stay in its cache; elsewhere few launches are worth more.
VALUES_PER_PASS = {"cpu": 1 << 18}


def dequantize(
    blocks: torch.Tensor,
    type: str | int,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The values of a packed tensor.

    `blocks`: uint8 [..., bytes], any device and strides; `type`: a GGML type by name or number; `shape`: of the result,
    [..., bytes / block_bytes * block_size] unless given. The result holds the float32 values of the GGUF specification,
    rounded once where `dtype` is float16 or bfloat16. ValueError if type, bytes and shape do not fit together.
    """
    block_format = format_of(type)
    n_blocks = count_blocks(blocks, block_format)
    if shape is None:
        shape = (*blocks.shape[:-1], blocks.shape[-1] // block_format.block_bytes * block_format.block_size)
    check_shape(shape, n_blocks, block_format)
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    decode_into(block_format, blocks, out)
    return out


def decode_into(block_format: type[BlockFormat], blocks: torch.Tensor, out: torch.Tensor) -> Callable[[], None] | None:
    """Write the values of packed `blocks` to the contiguous `out`; whoever calls has found that the two fit.

    Where a kernel did it, what does it again with little work of the CPU, for as long as both lie where they are.
    """
    if blocks.numel() and has_kernel(block_format, blocks.device):
        return launch.decode_into(blocks, block_format.__name__, out)
    values, blocks = out.view(-1, block_format.block_size), blocks.reshape(-1, block_format.block_bytes)
    blocks_per_pass = VALUES_PER_PASS.get(blocks.device.type, sys.maxsize) // block_format.block_size
    for some_blocks, some_values in zip(blocks.split(blocks_per_pass), values.split(blocks_per_pass), strict=True):
        block_format.decode_into(some_blocks, some_values)
    return None


@cache
def has_kernel(block_format: type[BlockFormat], device: torch.device) -> bool:
    """Whether `device` decodes the type with a Triton kernel; where a GPU cannot, one log line says why."""
    if device.type != "cuda" or issubclass(block_format, PlainFormat):
        return False
    reason = WHY_NONE or why_not_on(device)
    if reason:
        log.info("GGUF Native: decoding with plain torch operations, which is slower: %s.", reason)
    return reason is None


@cache
def why_not_on(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on this GPU, or None: an old GPU, or no C compiler for Triton's launcher."""
    blocks, out = torch.zeros(34, dtype=torch.uint8, device=device), torch.empty(32, device=device)
    try:
        for _ in range(2):  # the second launch takes the short way
            launch.decode_into(blocks, "Q8_0", out)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"Triton does not work on {torch.cuda.get_device_name(device)} ({error})"
    return None


def prepare_kernels(device: torch.device) -> None:
    """Have Triton ready before the first weight wants it: importing it and hashing its files take half a second."""
    if device.type == "cuda":
        threading.Thread(target=has_kernel, args=(FORMATS["Q8_0"], device), daemon=True).start()


def dequantize_rows(
    blocks: torch.Tensor, type: str | int, index: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rows of a packed matrix that `index` names, for embeddings: no other row is decoded.

    `blocks`: uint8 [rows, row_bytes]; `index`: int64 of any shape -> [*index.shape, row_values]. Errors as dequantize.
    """
    rows = blocks.index_select(0, index.flatten())
    return dequantize(rows.view(*index.shape, blocks.shape[1]), type, dtype=dtype)


def format_of(type: str | int) -> type[BlockFormat]:
    """The format of a GGML type named or numbered `type`; ValueError for an unknown one."""
    block_format = FORMATS.get(type) if isinstance(type, str) else FORMAT_BY_NUMBER.get(type)
    if block_format is None:
        raise ValueError(f"GGML type {type!r} is unknown; known are {', '.join(FORMATS)}.")
    return block_format


def count_blocks(blocks: torch.Tensor, block_format: type[BlockFormat]) -> int:
    """How many blocks a packed tensor holds; ValueError if it is not uint8 or a row is not whole blocks."""
    name, block_bytes = block_format.__name__, block_format.block_bytes
    if blocks.dtype != torch.uint8:
        raise ValueError(f"Packed {name} data must be torch.uint8; got {blocks.dtype}.")
    if blocks.shape[-1] % block_bytes:
        raise ValueError(f"Rows of {blocks.shape[-1]} bytes are not whole {name} blocks of {block_bytes} bytes.")
    return blocks.numel() // block_bytes


def check_shape(shape: tuple[int, ...], n_blocks: int, block_format: type[BlockFormat]) -> None:
    """ValueError if a tensor of `shape` does not have as many values as the blocks hold."""
    n_values, held = math.prod(shape), n_blocks * block_format.block_size
    if n_values != held:
        raise ValueError(
            f"Shape {tuple(shape)} has {n_values} values; {n_blocks} blocks of {block_format.__name__} hold {held}."
        )
