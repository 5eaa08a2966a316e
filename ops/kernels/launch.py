"""Launches that cost the CPU little, and the decoder of a whole tensor."""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from ..formats.codebooks import codebook
from . import KERNELS

# Launches by everything that decides them but the tensors: Triton's own look-up takes longer than many a kernel.
BOUND: dict[tuple, Callable] = {}


def bind(key: tuple, kernel, n_programs: int, tensors: tuple, rest: tuple, n_warps: int, **options) -> None:
    """Run kernel[n_programs](*tensors, *rest), and keep it as BOUND[key](*addresses of such tensors).

    `key` must tell apart whatever Triton specialises on: dtypes, alignment to 16 bytes, numbers, and the device.
    """
    compiled = kernel[(n_programs,)](*tensors, *rest, num_warps=n_warps, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        run = compiled[(n_programs, 1, 1)]
        # Of a tensor Triton asks the driver where it lies; an address it takes as it is.
        BOUND[key] = lambda *addresses: run(*addresses, *rest)


def alignment(*addresses: int) -> int:
    """A bit for each address that is not a multiple of 16."""
    bits = 0
    for address in addresses:
        bits = 2 * bits + (address % 16 != 0)
    return bits


def on_its_device(run: Callable) -> Callable:
    """`run(tensor, ...)` with the tensor's GPU as the current one, which Triton launches on, and the tensor readable.

    That is contiguous at an even address: kernels read fields of blocks as 16-bit words. What `run` returns is dropped
    where the tensor was copied or lies on another GPU.
    """

    def launched(tensor: torch.Tensor, *arguments):
        if not tensor.is_contiguous() or tensor.data_ptr() % 2:
            launched(tensor.clone(memory_format=torch.contiguous_format), *arguments)
            return None
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return run(tensor, *arguments)
        with torch.cuda.device(tensor.device):
            run(tensor, *arguments)
        return None

    return launched


def table_of(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """The codebook of a format on the device of the blocks, or something in its place."""
    codebook_name = KERNELS[name].codebook
    return codebook(codebook_name, blocks.device) if codebook_name else blocks


@triton.jit
def decode_kernel(
    blocks,  # uint8 [n_blocks, BLOCK_BYTES]
    out,  # [n_blocks, ROWS * VALUES] of any float dtype
    table,  # int8, the codebook of the format
    n_blocks,
    DECODE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    n_here = tl.minimum(n_blocks - first, BLOCKS).to(tl.int32)
    b = tl.arange(0, BLOCKS)[:, None, None]
    # Past the end the last block is decoded again and not stored: cheaper than masked loads.
    values = DECODE(blocks + first * BLOCK_BYTES + tl.minimum(b, n_here - 1) * BLOCK_BYTES, table)
    i = (b * ROWS + tl.arange(0, ROWS)[None, :, None]) * VALUES + tl.arange(0, VALUES)[None, None, :]
    tl.store(out + first * (ROWS * VALUES) + i, values.to(out.dtype.element_ty), mask=b < n_here)


@on_its_device
def decode_into(blocks: torch.Tensor, name: str, out: torch.Tensor) -> Callable[[], None] | None:
    """The kernel's twin of `BlockFormat.decode_into`: uint8 [..., n * block_bytes] -> out, contiguous, n * block_size.

    Returns what does the same again, for as long as both tensors lie where they are; None in Triton's interpreter.
    """
    table = table_of(blocks, name)
    addresses = blocks.data_ptr(), out.data_ptr(), table.data_ptr()
    key = ("decode", name, out.dtype, blocks.numel(), blocks.get_device(), alignment(*addresses))
    if (bound := BOUND.get(key)) is not None:
        bound(*addresses)
    else:
        kernel, block_format = KERNELS[name], FORMATS[name]
        n_blocks = blocks.numel() // block_format.block_bytes
        per_program = max(1, kernel.values_per_program // block_format.block_size)
        rest = (n_blocks, kernel.decode, block_format.block_bytes, kernel.rows, kernel.values, per_program)
        bind(key, decode_kernel, triton.cdiv(n_blocks, per_program), (blocks, out, table), rest, kernel.n_warps)
    return partial(BOUND[key], *addresses) if key in BOUND else None
