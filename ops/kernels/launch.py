"""Launches a decoder over all blocks of a tensor."""

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from ..formats.codebooks import codebook
from . import KERNELS


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


# Compiled decoders by everything that Triton specialises on: its own look-up takes longer than many a decode.
COMPILED: dict[tuple, object] = {}


def decode_into(name: str, blocks: torch.Tensor, out: torch.Tensor) -> None:
    """The kernel's twin of `BlockFormat.decode_into`: uint8 [..., n * block_bytes] -> out, contiguous, n * block_size.

    Blocks that do not lie contiguously at an even address are copied first: fields are read as 16-bit words.
    """
    if blocks.is_cuda and blocks.device.index != torch.cuda.current_device():
        with torch.cuda.device(blocks.device):
            return decode_into(name, blocks, out)
    if not blocks.is_contiguous() or blocks.data_ptr() % 2:
        blocks = blocks.clone(memory_format=torch.contiguous_format)
    kernel, block_format = KERNELS[name], FORMATS[name]
    table = codebook(kernel.codebook, blocks.device) if kernel.codebook else blocks
    n_blocks = blocks.numel() // block_format.block_bytes
    blocks_per_program = max(1, kernel.values_per_program // block_format.block_size)
    n_programs = triton.cdiv(n_blocks, blocks_per_program)
    arguments = (
        blocks,
        out,
        table,
        n_blocks,
        kernel.decode,
        block_format.block_bytes,
        kernel.rows,
        kernel.values,
        blocks_per_program,
    )
    divides = blocks.data_ptr() % 16 == 0, out.data_ptr() % 16 == 0, n_blocks % 16 == 0
    key = (name, kernel, out.dtype, blocks.device, divides, n_blocks == 1, n_blocks < 2**31)
    if (compiled := COMPILED.get(key)) is None:
        COMPILED[key] = decode_kernel[(n_programs,)](*arguments, num_warps=kernel.n_warps)
    else:
        compiled[(n_programs, 1, 1)](*arguments)
