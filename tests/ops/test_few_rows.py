"""Linear layers of few rows against float64: on a GPU if there is one, else in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels.few_rows import FEW_ROWS, linear
from samples import random_blocks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The last place of the output; but Triton's interpreter truncates to bfloat16.
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3 if ON_GPU else 2**-7}
N_OUT = 19  # no multiple of the outputs of a program


def blocks_per_step(name: str) -> int:
    return FEW_ROWS[name].lanes // FEW_ROWS[name].pieces


def layer(name: str, n_blocks: int, n_out: int = N_OUT) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, a row for each output, and their values."""
    kind = FORMATS[name]
    blocks = random_blocks(name, n_out * n_blocks, seed=n_blocks)
    return blocks.view(n_out, -1).to(DEVICE), kind.decode(blocks).view(n_out, -1).double().to(DEVICE)


def inputs(n_rows: int, n_in: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(n_rows)).to(dtype).to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """In every row, relative to its norm."""
    error = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= BOUNDS[actual.dtype]


@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_numbers_of_rows(name, n_rows):
    blocks, values = layer(name, 2 * blocks_per_step(name))
    x = inputs(n_rows, values.shape[1], torch.float16)
    actual = linear(blocks, name, x, None)
    assert actual.dtype == x.dtype
    assert_close(actual, x.double() @ values.T)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FEW_ROWS)
def test_dtypes_and_bias_and_rows_of_a_broken_number_of_blocks(name, dtype):
    blocks, values = layer(name, blocks_per_step(name) + 1)
    x, bias = inputs(3, values.shape[1], dtype), inputs(1, N_OUT, dtype)[0]
    assert_close(linear(blocks, name, x, bias), x.double() @ values.T + bias.double())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FEW_ROWS)
def test_inputs_all_of_one_sign(name, dtype):
    """What the fields are too large by is taken away after the multiplication, and must not leave an error behind."""
    blocks, values = layer(name, 3)
    x = inputs(2, values.shape[1], dtype).abs() + 1
    expected = x.double() @ values.T
    error = (linear(blocks, name, x, None).double() - expected).norm() / (x.double() @ values.abs().T).norm()
    assert error <= BOUNDS[dtype]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_a_broken_row_stays_alone(name, broken):
    blocks, values = layer(name, 3)
    x = inputs(3, values.shape[1], torch.float16)
    expected = linear(blocks, name, x, None)
    x[1] = broken
    actual = linear(blocks, name, x, None)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not actual[1].isfinite().any()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_blocks_at_odd_addresses(name):
    blocks, values = layer(name, 2)
    x = inputs(1, values.shape[1], torch.float16)
    for offset in (1, 2):
        moved = torch.zeros(blocks.numel() + offset, dtype=torch.uint8, device=DEVICE)[offset:].view_as(blocks)
        moved.copy_(blocks)
        assert torch.equal(linear(moved, name, x, None), linear(blocks, name, x, None))


@pytest.mark.parametrize("name", FEW_ROWS)
def test_a_second_call_is_the_first_one_over(name):
    blocks, values = layer(name, 2)
    others = inputs(2, values.shape[1], torch.float16)
    first = linear(blocks, name, others, None)
    assert torch.equal(linear(blocks, name, others, None), first)
    assert_close(linear(blocks, name, -others, None), -others.double() @ values.T)
