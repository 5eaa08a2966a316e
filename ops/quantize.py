"""From dense tensors to packed ones: the twin of dequantize, in plain torch, on any device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import torch

from .dequantize import format_of
from .formats import FORMATS, BlockFormat
from .formats.exact import with_energy
from .formats.refine import REFINED
from .formats.refine_unusual import least_error_encoder

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values encoded in one pass: what a core's own cache holds, twice as many in threads, which then wait less at Python's
# lock for each other. On a GPU work on them takes about 1 GB, up to 1.8 GB for IQ2_* and IQ3_*.
VALUES_PER_PASS = {"cpu": 1 << 17}
VALUES_PER_PASS_ELSEWHERE = 1 << 24

# A column counts this much of the mean at least, so that it is not left to chance.
LEAST_IMPORTANCE = 1e-6


def quantize(tensor: torch.Tensor, type: str | int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The packed form of a tensor with the least squared error that a search found: less than ggml's.

    `tensor`: float32, float16 or bfloat16 [..., values], any device and strides; `type`: a GGML type by name or number;
    `importance`: float32 [values], not negative, the weight of the squared error in each column as in an imatrix, or
    None for equal weights; the types that nothing is searched for (TQ1_0, TQ2_0 and the plain ones) ignore it.
    Returns uint8 [..., values / block_size * block_bytes], the same bytes however a tensor is cut into rows, on one
    thread or many; on a GPU one byte of half a million may differ for Q8_0 (H200, others equal). ValueError for a type
    that cannot be written, another dtype, a row that is not whole blocks, importance that does not fit, and a NaN or
    infinite value: it names the first.
    """
    block_format = encoder_of(type)
    check_tensor(tensor, block_format)
    refinement = REFINED.get(block_format.__name__)
    if refinement is None:
        return quantize_as_ggml(tensor, type, importance)
    new_encoder = partial(least_error_encoder, block_format, refinement)
    if importance is None:
        return in_passes(tensor, block_format, new_encoder, None)
    check_importance(importance, tensor)
    weights = weights_of(importance.to(tensor.device))
    return in_passes(tensor, block_format, new_encoder, weights.view(-1, block_format.block_size))


def weights_of(importance: torch.Tensor) -> torch.Tensor:
    """float32 [values]: importance over a power of two near its mean, which rounds nothing; 1 where all are equal."""
    weights = importance.double()
    mean = weights.mean()
    weights = weights / (mean / mean.frexp().mantissa)
    return torch.where((importance == importance[:1]).all(), 1, weights).clamp_(min=LEAST_IMPORTANCE).float()


def quantize_as_ggml(tensor: torch.Tensor, type: str | int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The packed form of a tensor, byte for byte as ggml writes it on x86-64; those of IQ2_* and IQ3_* are our own.

    CPU and GPU agree bit for bit (H200), but for one byte in 75,000 of IQ3_S.

    Arguments, result and errors as of quantize, but without importance the weights are ggml's own, with it they are
    ggml's too (the energy of a row adds to them), and types that ggml does not search for (Q8_0, MXFP4) ignore it.
    """
    block_format = encoder_of(type)
    check_tensor(tensor, block_format)
    if importance is None:
        return in_passes(tensor, block_format, lambda: block_format.encode, None)
    check_importance(importance, tensor)
    weights = importance.to(tensor.device).expand(tensor.shape)
    if block_format.energy_of_row:
        rows = tensor.reshape(-1, tensor.shape[-1]).float()
        weights = with_energy(weights.reshape(rows.shape), rows, 1)
    return in_passes(tensor, block_format, lambda: block_format.encode, weights.reshape(-1, block_format.block_size))


def in_passes(
    tensor: torch.Tensor,
    block_format: type[BlockFormat],
    new_encoder: Callable[[], Callable[..., torch.Tensor]],
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The blocks of a tensor, some at a time; weights float32 [k, block_size] are those of k blocks in turn.

    Every thread has an encoder of its own, a new one.
    """
    values = tensor.detach().reshape(-1, block_format.block_size)
    blocks = torch.empty(values.shape[0], block_format.block_bytes, dtype=torch.uint8, device=tensor.device)
    in_threads = tensor.device.type == "cpu" and torch.get_num_threads() > 1
    values_per_pass = VALUES_PER_PASS.get(tensor.device.type, VALUES_PER_PASS_ELSEWHERE) * (2 if in_threads else 1)
    blocks_per_pass = values_per_pass // block_format.block_size

    def encode_parts(starts: Iterator[int]) -> None:
        encode = new_encoder()
        for start in starts:
            part = slice(start, start + blocks_per_pass)
            some_values = values[part].float().contiguous()
            if not torch.stack(some_values.aminmax()).isfinite().all():
                raise ValueError(not_finite(tensor, block_format))
            blocks[part] = encode(some_values, None if weights is None else in_turn(weights, start, len(some_values)))

    starts = range(0, values.shape[0], blocks_per_pass)
    if in_threads and len(starts) > 1:
        on_all_cores(encode_parts, iter(starts))
    else:
        encode_parts(iter(starts))
    return blocks.view(*tensor.shape[:-1], tensor.shape[-1] // block_format.block_size * block_format.block_bytes)


def on_all_cores(run: Callable[[Iterator[int]], None], starts: Iterator[int]) -> None:
    """run(starts) on as many threads as torch has, which share the starts; the first error ends it.

    Torch's own threads wait for each other after every operation, and stand still where another program has a core.
    """

    def alone() -> None:
        # The mode belongs to a thread, and leaves out what autograd would need.
        with torch.inference_mode():
            run(starts)

    n_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, "gguf-native-encoder", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done in as_completed([pool.submit(alone) for _ in range(n_threads)]):
            done.result()
    finally:
        # After an error nothing is left for the others.
        for _ in starts:
            pass
        pool.shutdown()
        # The number is one of the process where the library of matrix products is MKL.
        torch.set_num_threads(n_threads)


def in_turn(weights: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Rows of weights, from `start` on and over again."""
    if start + count <= len(weights):
        return weights[start : start + count]
    return weights.index_select(0, torch.arange(start, start + count, device=weights.device) % len(weights))


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


def check_importance(importance: torch.Tensor, tensor: torch.Tensor) -> None:
    """ValueError if importance is not one weight for each column."""
    if importance.shape != tensor.shape[-1:] or importance.dtype != torch.float32:
        got, expected = f"{importance.dtype} {tuple(importance.shape)}", f"torch.float32 ({tensor.shape[-1]},)"
        raise ValueError(f"Importance is {got}; a tensor of shape {tuple(tensor.shape)} needs {expected}.")
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError("Importance has a value that is negative, infinite or NaN.")


def not_finite(tensor: torch.Tensor, block_format: type[BlockFormat]) -> str:
    """What to say of the first value that is NaN or infinite."""
    index = tuple((~tensor.isfinite()).nonzero()[0].tolist())
    return f"Value {index} of the tensor is {tensor[index].item()}; {block_format.__name__} holds finite numbers only."
