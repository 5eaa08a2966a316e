"""The library of ggml itself, and the values that encoders are compared with it on."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_native.ops.formats import FORMATS

ROWS, COLUMNS = 24, 1024


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def gaussian() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator())


def heavy_tailed() -> torch.Tensor:
    """Student's t with 2.5 degrees of freedom, from its quotient of a normal and a chi-squared variable."""
    chi = torch._standard_gamma(torch.full((ROWS, COLUMNS), 1.25), generator=generator()) * 2
    return gaussian() * (2.5 / chi).sqrt() * 0.02


def signs_of_zero() -> torch.Tensor:
    """Mostly zeros of both signs, in some blocks nothing else."""
    values = torch.where(torch.rand(ROWS, COLUMNS, generator=generator()) < 0.9, 0.0, gaussian())
    values[:4] = 0
    return values * gaussian().sign().flip(1)


def laplace() -> torch.Tensor:
    return gaussian().sign() * -torch.rand(ROWS, COLUMNS, generator=generator()).clamp_(min=1e-6).log()


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "gaussian": lambda: gaussian() * 0.02,
    "Laplace": lambda: laplace() * 0.02,
    "uniform": lambda: torch.rand(ROWS, COLUMNS, generator=generator()) - 0.5,
    "heavy tailed": heavy_tailed,
    "scales of rows and columns": lambda: gaussian() * (gaussian()[:, :1] + gaussian()[0]).exp(),
    "outlier columns": lambda: gaussian() * torch.where(torch.arange(COLUMNS) % 64 == 3, 20, 1),
    "bfloat16 weights": lambda: (gaussian() * 0.02).bfloat16().float(),
    "few distinct values": lambda: (gaussian() * 4).round() / 2,
    "one huge value": lambda: torch.where(torch.arange(COLUMNS) == 77, 6e4, gaussian() * 0.02),
    "large": lambda: gaussian() * 1e4,
    "negative only": lambda: -gaussian().abs(),
    "positive only": lambda: gaussian().abs(),
    "all zero": lambda: torch.zeros(ROWS, COLUMNS),
    "all minus zero": lambda: -torch.zeros(ROWS, COLUMNS),
    "signs of zero": signs_of_zero,
    "constant rows": lambda: gaussian()[:, :1].expand(ROWS, COLUMNS),
    "scales below half": lambda: gaussian() * 6e-7,
    "1e-10": lambda: gaussian() * 1e-10,
    "around ggml's epsilon": lambda: gaussian() * 3e-15,
    "below ggml's epsilon": lambda: gaussian() * 1e-17,
    "reciprocals overflow": lambda: gaussian() * 1e-38,
    "denormal": lambda: gaussian() * 1e-40,
}
IMPORTANCE: dict[str, Callable[[], torch.Tensor]] = {
    "ones": lambda: torch.ones(COLUMNS),
    "steep": lambda: torch.rand(COLUMNS, generator=generator()) ** 4,
    "some zero": lambda: torch.rand(COLUMNS, generator=generator()).sub_(0.3).clamp_(min=0),
}


def library() -> ctypes.CDLL:
    """The library of ggml itself, as the wheel of libggml-python has it."""
    spec = importlib.util.find_spec("libggml")
    if spec is None:
        pytest.skip("ggml itself is not installed: pip install libggml-python")
    loaded = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("lib*/libggml-base.so"))))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, size, size, size, pointer)
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    return loaded


def by_ggml(ggml: ctypes.CDLL, values: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [rows, columns] -> uint8 [rows, bytes]."""
    values = values.contiguous()
    row_bytes = values.shape[1] // FORMATS[name].block_size * FORMATS[name].block_bytes
    blocks = torch.zeros(values.shape[0], row_bytes, dtype=torch.uint8)
    arguments = (
        values.data_ptr(),
        blocks.data_ptr(),
        0,
        *values.shape,
        None if importance is None else importance.data_ptr(),
    )
    assert ggml.ggml_quantize_chunk(FORMATS[name].number, *arguments) == blocks.numel()
    return blocks
