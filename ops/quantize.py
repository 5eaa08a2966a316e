"""From dense tensors to packed ones: the twin of dequantize, in plain torch, on any device."""

import torch

from .dequantize import format_of
from .formats import FORMATS, BlockFormat
from .formats.exact import with_energy

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values encoded in one pass: a search keeps about 60 bytes for each, on the CPU in its cache.
VALUES_PER_PASS = {"cpu": 1 << 19}


def quantize(tensor: torch.Tensor, type: str | int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The packed form of a tensor, byte for byte as ggml writes it on x86-64.

    `tensor`: float32, float16 or bfloat16 [..., values], any device and strides; `type`: a GGML type by name or number;
    `importance`: float32 [values], not negative, the weight of the error in each column as in an imatrix, or None for
    ggml's own weighting; types without a search (Q8_0, MXFP4, TQ1_0, TQ2_0 and the plain ones) ignore it as ggml does.
    Returns uint8 [..., values / block_size * block_bytes]. ValueError for a type that cannot be written, another dtype,
    a row that is not whole blocks, importance that does not fit, and a NaN or infinite value: it names the first.
    """
    block_format = encoder_of(type)
    check_tensor(tensor, block_format)
    values = tensor.reshape(-1, block_format.block_size)
    weights = spread(importance, tensor, block_format) if importance is not None else None
    blocks = torch.empty(values.shape[0], block_format.block_bytes, dtype=torch.uint8, device=tensor.device)
    blocks_per_pass = VALUES_PER_PASS.get(tensor.device.type, 1 << 24) // block_format.block_size
    for start in range(0, values.shape[0], blocks_per_pass):
        part = slice(start, start + blocks_per_pass)
        some_values = values[part].float().contiguous()
        if not some_values.isfinite().all():
            raise ValueError(not_finite(tensor, block_format))
        blocks[part] = block_format.encode(some_values, None if weights is None else weights[part])
    return blocks.view(*tensor.shape[:-1], tensor.shape[-1] // block_format.block_size * block_format.block_bytes)


def encoder_of(type: str | int) -> type[BlockFormat]:
    """The format of a GGML type that can be written; ValueError for another one."""
    block_format = format_of(type)
    if not hasattr(block_format, "encode"):
        known = ", ".join(name for name, row in FORMATS.items() if hasattr(row, "encode"))
        raise ValueError(f"GGML type {block_format.__name__} can be read only; types that can be written are {known}.")
    return block_format


def check_tensor(tensor: torch.Tensor, block_format: type[BlockFormat]) -> None:
    """ValueError if a tensor's dtype or rows do not fit the format."""
    name, block_size = block_format.__name__, block_format.block_size
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"Values for {name} must be float32, float16 or bfloat16; got {tensor.dtype}.")
    if not tensor.ndim or tensor.shape[-1] % block_size:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} has no rows of whole {name} blocks of {block_size}.")


def not_finite(tensor: torch.Tensor, block_format: type[BlockFormat]) -> str:
    """What to say of the first value that is NaN or infinite."""
    index = tuple((~tensor.isfinite()).nonzero()[0].tolist())
    return f"Value {index} of the tensor is {tensor[index].item()}; {block_format.__name__} holds finite numbers only."


def spread(importance: torch.Tensor, tensor: torch.Tensor, block_format: type[BlockFormat]) -> torch.Tensor:
    """The importance that encode takes, float32 [blocks, block_size], from that of the columns."""
    if importance.shape != tensor.shape[-1:] or importance.dtype != torch.float32:
        got, expected = f"{importance.dtype} {tuple(importance.shape)}", f"torch.float32 ({tensor.shape[-1]},)"
        raise ValueError(f"Importance is {got}; a tensor of shape {tuple(tensor.shape)} needs {expected}.")
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError("Importance has a value that is negative, infinite or NaN.")
    weights = importance.to(tensor.device).expand(tensor.shape)
    if block_format.energy_of_row:
        rows = tensor.reshape(-1, tensor.shape[-1]).float()
        weights = with_energy(weights.reshape(rows.shape), rows, 1)
    return weights.reshape(-1, block_format.block_size)
