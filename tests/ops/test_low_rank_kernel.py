"""Decoding with LoRAs against float64: on a GPU if there is one, else in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels import KERNELS, low_rank
from samples import random_blocks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Half of the last place, of which the sum of values and addition may have some more.
BOUNDS = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
# The interpreter multiplies bfloat16 as the integers that it stores.
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.cuda)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def decoded(name: str, n_rows: int, n_columns: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel, and in float64."""
    kind, generator = FORMATS[name], torch.Generator().manual_seed(rank)
    blocks = random_blocks(name, n_rows * n_columns // kind.block_size, seed=n_rows)
    values = kind.decode(blocks).view(n_rows, n_columns).double()
    scale = values.square().mean().sqrt()
    down = (torch.randn(rank, n_columns, generator=generator) * scale / rank**0.5).to(dtype)
    up = torch.randn(n_rows, rank, generator=generator).to(dtype)
    # With a margin behind the values that must stay untouched.
    out = torch.full((n_rows + 1, n_columns), 12345.0).to(dtype).to(DEVICE)
    blocks = blocks.view(n_rows, -1).to(DEVICE)
    low_rank.decode_into(blocks, name, down.to(DEVICE), up.to(DEVICE), out[:-1])
    assert (out[-1] == torch.tensor(12345.0).to(dtype)).all()
    return out[:-1].cpu().double(), values + up.double() @ down.double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to each value, or to what its sum is of where the two parts cancel out."""
    scale = expected.abs().clamp(min=expected.square().mean().sqrt() / 8)
    assert ((actual - expected).abs() / scale).max() <= BOUNDS[dtype]


@pytest.mark.parametrize("name", KERNELS)
def test_every_type(name):
    assert_close(*decoded(name, 5, 256, 4, torch.float16), torch.float16)


@pytest.mark.parametrize("rank", [1, 16, 40, 128, 200])
def test_ranks(rank):
    assert_close(*decoded("Q4_K", 33, 512, rank, torch.float16), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    assert_close(*decoded("Q8_0", 40, 768, 16, dtype), dtype)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "up", "reason"),
    [
        ("Q8_0", (6, 34 * 8), torch.bfloat16, torch.bfloat16, None),
        ("Q8_0", (6, 34 * 9), torch.bfloat16, torch.bfloat16, "rows are no multiple of 256"),
        ("Q4_K", (9, 144), torch.bfloat16, torch.bfloat16, "rows are no multiple of 256"),
        ("Q4_K", (6, 144), torch.float32, torch.float32, "16 bits"),
        ("Q4_K", (6, 144), torch.bfloat16, torch.float32, "16 bits"),
    ],
)
def test_where_it_serves(name, shape, dtype, up, reason):
    blocks, up = torch.zeros(shape, dtype=torch.uint8), torch.zeros(6, 4, dtype=up)
    why_not = low_rank.why_not(name, blocks, dtype, up)
    assert why_not is None if reason is None else reason in why_not
