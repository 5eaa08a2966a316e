"""What every GGUF block format has in common, and how bits are taken out of bytes."""

from functools import cache

import torch


class BlockFormat:
    """One GGML tensor type: how many values a block holds, in how many bytes, and how to decode it.

    `number` is the type's number in a GGUF file, `block_size` the values and `block_bytes` the bytes of one block.
    A type that can be written too has `encode(values, importance=None)`: float32 [n, block_size], importance likewise
    or None for ggml's own weighting -> uint8 [n, block_bytes], with the bytes of ggml (IQ2_* and IQ3_*: at most ggml's
    error). Types without a search ignore importance; where `energy_of_row` is set, it stands for the weights that
    exact.with_energy gives for whole rows. Encoding with less error than ggml's is in refine.py.
    """

    number: int
    block_size: int
    block_bytes: int
    energy_of_row = False

    @classmethod
    def decode(cls, blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 [n, block_bytes] -> values [n, block_size] of `dtype`: the float32 value, rounded once."""
        out = torch.empty(blocks.shape[0], cls.block_size, dtype=dtype, device=blocks.device)
        cls.decode_into(blocks, out)
        return out

    @classmethod
    def decode_into(cls, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Write the values of uint8 [n, block_bytes] to `out`, contiguous [n, block_size] of any float dtype."""
        raise NotImplementedError


def reinterpret(field: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., k * itemsize] -> little-endian [..., k] of `dtype`: a view, or a copy if the field is not aligned."""
    if not is_aligned(field, dtype.itemsize):
        field = field.clone(memory_format=torch.contiguous_format)
    return field.view(dtype)


def is_aligned(field: torch.Tensor, itemsize: int) -> bool:
    """Whether uint8 [..., k] can be read as items of `itemsize` bytes where it lies."""
    places = (field.data_ptr(), field.storage_offset(), *field.stride()[:-1], field.shape[-1])
    return field.stride(-1) == 1 and all(place % itemsize == 0 for place in places)


def half(field: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 2 * k] holding float16 -> float32 [n, k]."""
    return reinterpret(field, torch.float16).float()


def half_bytes(values: torch.Tensor) -> torch.Tensor:
    """float32 [n, k] -> uint8 [n, 2 * k] holding float16, rounded to nearest."""
    return values.half().contiguous().view(torch.uint8)


@cache
def shifts(steps: range, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[len(steps)] on `device`, moved there once."""
    with torch.inference_mode(False):
        return torch.tensor(steps, dtype=dtype).to(device)


def bit_fields(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., k] -> uint8 [..., k * 8 // width]: the fields of `width` bits of every byte, lowest first."""
    steps = shifts(range(0, 8, width), torch.uint8, packed.device)
    return (packed.unsqueeze(-1) >> steps).bitwise_and_((1 << width) - 1).flatten(-2)


def bit_planes(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., k] -> uint8 [..., 8 // width, k]: the lowest field of every byte, then the next ones.

    The bytes are shifted in the widest words that their place allows, since a kernel's time goes by its elements.
    """
    dtype = next((wide for wide in (torch.int32, torch.int16) if is_aligned(packed, wide.itemsize)), torch.uint8)
    words = packed.view(dtype).unsqueeze(-2)
    steps = shifts(range(0, 8, width), dtype, packed.device)
    planes = words.new_empty(*words.shape[:-2], len(steps), words.shape[-1])
    torch.bitwise_right_shift(words, steps.unsqueeze(-1), out=planes)
    mask = int.from_bytes([(1 << width) - 1] * dtype.itemsize, "little")
    return planes.bitwise_and_(mask).view(torch.uint8)


def pack_planes(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., 8 // width, k] -> uint8 [..., k]: the inverse of bit_planes."""
    packed, *planes = codes.unbind(-2)
    for place, plane in enumerate(planes, 1):
        packed = packed | plane << width * place
    return packed


def pack_fields(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., k * 8 // width] -> uint8 [..., k]: the inverse of bit_fields."""
    return pack_planes(codes.unflatten(-1, (-1, 8 // width)).transpose(-1, -2), width)


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """The nearest integers, of two the one farther from zero, in place: C's roundf."""
    fraction = values - values.trunc()
    return values.trunc_().add_(fraction.mul_(2).trunc_())
