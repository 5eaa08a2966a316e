"""Matrix products with a packed weight: exact, in float8, in int8; and its decoding, whole or by rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor.base import QuantizedTensor

from .cache import DecodedCache
from .dequantize import decode_into, dequantize, dequantize_rows, has_kernel
from .eight_bits import RowScales, quantize_rows_into
from .formats import FORMAT_BY_NUMBER, FORMATS
from .kernels import WHY_NONE
from .low_rank import LowRank

if WHY_NONE is None:
    from .kernels import few_rows


# Inputs and weights that the host streams lie at ever new addresses; a model's layers need far fewer.
MOST_DONE = 10_000


@dataclass
class Workspace:
    """Memory that the layers of a model use one after another: for a decoded weight, and for inputs in 8 bits.

    What was done before is kept by all that decides it, so that doing it again is one look-up and a launch.
    """

    buffers: dict[tuple, torch.Tensor] = field(default_factory=dict)
    done: dict[tuple, tuple] = field(default_factory=dict)
    cache: DecodedCache | None = None

    def decode(
        self,
        blocks: torch.Tensor,
        type: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        change: RowScales | LowRank | None = None,
    ) -> torch.Tensor:
        """Values of packed blocks, changed if asked for: `dtype` of `shape`, valid until the next."""
        kept = None if self.cache is None else self.cache.find(blocks, type, shape, dtype)
        if kept is not None:
            if kept.filled_with is not change:
                decode(blocks, type, change, kept.values)
                kept.filled_with = change
            return kept.values
        # Factors of another rank may lie where those before them lay.
        changed_at = None if change is None else (*(tensor.data_ptr() for tensor in change), change[0].shape)
        key = (blocks.data_ptr(), type, shape, dtype, current_device(blocks), changed_at)
        if (done := self.done.get(key)) is not None:
            out, again = done
            again()
            return out
        out = self._room("weight", shape, dtype, blocks.device)
        if (again := decode(blocks, type, change, out)) is not None:
            self._keep(key, out, again)
        return out

    def _keep(self, key: tuple, *done: object) -> None:
        if len(self.done) >= MOST_DONE:
            self.done.clear()
        self.done[key] = done

    def quantize_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n_rows, n_columns] -> float8_e4m3fn of its shape, float32 scales [n_rows, 1], valid until the next."""
        key = (x.data_ptr(), x.shape, x.dtype, current_device(x))
        if (done := self.done.get(key)) is not None:
            out, scales, again = done
            again()
            return out, scales
        out = self._room("inputs", x.shape, torch.float8_e4m3fn, x.device)
        scales = self._room("scales of inputs", (len(x), 1), torch.float32, x.device)
        if (again := quantize_rows_into(x, out, scales)) is not None:
            self._keep(key, out, scales, again)
        return out, scales

    def _room(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        nbytes, key = torch.Size(shape).numel() * dtype.itemsize, (use, device)
        # Not an inference tensor: the model may also run outside inference mode.
        with torch.inference_mode(False):
            if key not in self.buffers or self.buffers[key].numel() < nbytes:
                self.done.clear()
                self.buffers.pop(key, None)
                self.buffers[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
            return self.buffers[key][:nbytes].view(dtype).view(shape)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, memory is taken anew and forgotten at the end: a CUDA graph keeps the memory that it works in."""
        kept = self.buffers, self.done
        self.buffers, self.done = {}, {}
        try:
            with nullcontext() if self.cache is None else self.cache.as_it_is():
                yield
        finally:
            self.buffers, self.done = kept

    def weights_stream(self) -> None:
        """Memory serves packed weights better than decoded ones."""
        if self.cache is not None:
            self.cache.weights_stream()

    def release(self) -> None:
        """Give the memory back; the next use takes new."""
        self.done.clear()
        self.buffers.clear()
        if self.cache is not None:
            self.cache.reset()


def current_device(tensor: torch.Tensor) -> int | None:
    """The GPU that a launch would go to, if the tensor is on one."""
    return torch.cuda.current_device() if tensor.is_cuda else None


def decode(
    blocks: torch.Tensor, type: str, change: RowScales | LowRank | None, out: torch.Tensor
) -> Callable[[], None] | None:
    """Write the values of packed blocks to `out`, changed if asked for; see `dequantize.decode_into`."""
    if change is None:
        return decode_into(FORMATS[type], blocks, out)
    return change.decode_into(blocks, type, out)


def decoded(
    workspace: Workspace | None,
    blocks: torch.Tensor,
    type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    change: RowScales | LowRank | None = None,
) -> torch.Tensor:
    """`Workspace.decode`, or memory of its own where there is no workspace or backward may want the values again."""
    if workspace is not None and not torch.is_grad_enabled():
        return workspace.decode(blocks, type, shape, dtype, change)
    # Shape and bytes were found to fit when the weight was packed.
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    decode(blocks, type, change, out)
    return out


# torch.compile sees one opaque op in place of the bit arithmetic of a format.
@torch.library.custom_op("gguf_native::dequantize", mutates_args=())
def dequantize_op(blocks: torch.Tensor, type_number: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return dequantize(blocks, type_number, shape, dtype)


@dequantize_op.register_fake
def _(blocks, type_number, shape, dtype):
    return blocks.new_empty(shape, dtype=dtype)


@torch.library.custom_op("gguf_native::dequantize_rows", mutates_args=())
def dequantize_rows_op(blocks: torch.Tensor, type_number: int, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_rows(blocks, type_number, index, dtype)


@dequantize_rows_op.register_fake
def _(blocks, type_number, index, dtype):
    block_format = FORMAT_BY_NUMBER[type_number]
    row_values = blocks.shape[-1] // block_format.block_bytes * block_format.block_size
    return blocks.new_empty((*index.shape, row_values), dtype=dtype)


def decode_weight(
    weight: QuantizedTensor, dtype: torch.dtype, workspace: Workspace | None = None, low_rank: LowRank | None = None
) -> torch.Tensor:
    """Packed weight -> dense `dtype` of its logical shape, on its device; in the workspace if there is one.

    low_rank: what is added to it, if it `joins`.
    """
    blocks, params = weight._qdata, weight._params
    if torch.compiler.is_compiling():
        return dequantize_op(blocks, FORMATS[params.type].number, list(params.orig_shape), dtype)
    return decoded(workspace, blocks, params.type, params.orig_shape, dtype, low_rank)


def gather_rows(weight: QuantizedTensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """index (int, any shape) -> rows of a packed matrix, dense `dtype` [*index.shape, row]; decodes those rows only."""
    params = weight._params
    if torch.compiler.is_compiling():
        return dequantize_rows_op(weight._qdata, FORMATS[params.type].number, index, dtype)
    return dequantize_rows(weight._qdata, params.type, index, dtype)


def linear(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    workspace: Workspace | None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """x [..., n_columns] W^T + bias -> [..., n_rows]: W decoded to the dtype of x, then the library's product."""
    return F.linear(x, decode_weight(weight, x.dtype, workspace, low_rank), bias)


# With more rows of inputs than this, no type's fused product is the fastest.
MAX_FEW_ROWS = 8


def few_rows_limit(weight: QuantizedTensor) -> int:
    """For up to how many rows of inputs `linear_few_rows` is the fastest; 0 where it does not serve."""
    # Its kernels go by whole rows of blocks.
    if weight._qdata.shape[0] != weight._params.orig_shape[0]:
        return 0
    return _few_rows_limit(weight._params.type, weight._qdata.device)


# torch.compile would trace through a cache, down to the trial launch.
@torch.compiler.assume_constant_result
def _few_rows_limit(type: str, device: torch.device) -> int:
    return _known_few_rows_limit(type, device)


@cache
def _known_few_rows_limit(type: str, device: torch.device) -> int:
    # They take bytes apart with an instruction of NVIDIA's.
    has_one = torch.version.hip is None and has_kernel(FORMATS[type], device) and type in few_rows.FEW_ROWS
    return few_rows.FEW_ROWS[type].max_rows if has_one else 0


def linear_few_rows(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `linear`, in one pass over the blocks: W is never written. Nothing is rounded but inputs and result."""
    run = linear_few_rows_op if torch.compiler.is_compiling() else _few_rows
    return run(x, weight._qdata, weight._params.type, bias)


def _few_rows(x: torch.Tensor, blocks: torch.Tensor, type: str, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return few_rows.linear(blocks, type, rows, bias).view(*x.shape[:-1], -1)


@torch.library.custom_op("gguf_native::linear_few_rows", mutates_args=())
def linear_few_rows_op(x: torch.Tensor, blocks: torch.Tensor, type: str, bias: torch.Tensor | None) -> torch.Tensor:
    return _few_rows(x, blocks, type, bias)


@linear_few_rows_op.register_fake
def _(x, blocks, type, bias):
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))


def linear_eight_bits(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    scales: RowScales,
    dtype: torch.dtype,
    workspace: Workspace | None,
) -> torch.Tensor:
    """As `linear` with W and x in `dtype`, a key of PRODUCTS, and a scale for each row of both."""
    blocks, type_name = weight._qdata, weight._params.type
    if torch.compiler.is_compiling():
        return linear_eight_bits_op(x, blocks, type_name, bias, *scales, dtype)
    return _eight_bits(x, blocks, type_name, bias, scales, dtype, workspace)


def _eight_bits(x, blocks, type: str, bias, scales: RowScales, dtype: torch.dtype, workspace: Workspace | None):
    stored = decoded(workspace, blocks, type, (blocks.shape[0], x.shape[-1]), dtype, scales)
    return PRODUCTS[dtype](x, stored, scales.scales, bias, workspace)


def _product_fp8(x, stored, scales, bias, workspace: Workspace | None) -> torch.Tensor:
    """By the library, from SM 8.9 on, sides divisible by 16. Adds a relative error of about 0.037 for any inputs."""
    inputs, input_scales = (workspace or Workspace()).quantize_rows(x.reshape(-1, x.shape[-1]).contiguous())
    # Not every version of the library gives float16 where rows have scales.
    dtype = torch.bfloat16
    bias = bias if bias is None else bias.to(dtype)
    out = torch._scaled_mm(
        inputs, stored.t(), input_scales, scales.unsqueeze(0), bias=bias, out_dtype=dtype, use_fast_accum=True
    )
    return out.to(x.dtype).view(*x.shape[:-1], stored.shape[0])


def _product_int8(x, stored, scales, bias, workspace: Workspace | None) -> torch.Tensor:
    """By comfy-kitchen, from SM 7.5 on. Adds an error of about 0.012, several times that for outlier columns of x."""
    return comfy_kitchen.int8_linear(x, stored, scales, bias, x.dtype)


PRODUCTS = {torch.float8_e4m3fn: _product_fp8, torch.int8: _product_int8}


@torch.library.custom_op("gguf_native::linear_eight_bits", mutates_args=())
def linear_eight_bits_op(
    x: torch.Tensor,
    blocks: torch.Tensor,
    type: str,
    bias: torch.Tensor | None,
    factors: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _eight_bits(x, blocks, type, bias, RowScales(factors, scales), dtype, None)


@linear_eight_bits_op.register_fake
def _(x, blocks, type, bias, factors, scales, dtype):
    return x.new_empty((*x.shape[:-1], blocks.shape[0]))
