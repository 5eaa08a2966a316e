"""Triton kernels against their eager twins: on a GPU where there is one, else in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from gguf_native.ops.dequantize import dequantize, has_kernel
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.formats.plain import PlainFormat
from gguf_native.ops.kernels import KERNELS, launch
from samples import adversarial_blocks, random_blocks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDED = [
    torch.float16,
    # Triton's interpreter truncates to bfloat16; a GPU rounds.
    pytest.param(torch.bfloat16, marks=pytest.mark.cuda),
]
# One, a few that fill no program, and some programs and a rest.
COUNTS = [1, 3, 37]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities in the interpreter


def by_kernel(name: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decoded values, with a margin behind them that must stay untouched."""
    block_size = FORMATS[name].block_size
    out = torch.full((len(blocks) + 1, block_size), float("nan"), dtype=dtype, device=DEVICE)
    out[-1] = 12345
    launch.decode_into(blocks, name, out[:-1])
    assert (out[-1] == torch.tensor(12345, dtype=dtype)).all()
    return out[:-1]


def by_eager(name: str, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return FORMATS[name].decode(blocks.cpu(), dtype).to(DEVICE)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaNs compare by place: processors differ in the payload that they pass on."""
    assert torch.equal(actual.isnan(), expected.isnan())
    integer = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    assert torch.equal(actual.nan_to_num(1).view(integer), expected.nan_to_num(1).view(integer))


def test_every_quantised_type_has_a_kernel():
    assert set(KERNELS) == {name for name, kind in FORMATS.items() if not issubclass(kind, PlainFormat)}


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", KERNELS)
def test_random_blocks(name, n):
    blocks = random_blocks(name, n, seed=n).to(DEVICE)
    assert_same_bits(by_kernel(name, blocks, torch.float32), by_eager(name, blocks, torch.float32))


@pytest.mark.parametrize("name", KERNELS)
def test_adversarial_blocks(name):
    # The interpreter is slow: it gets every seventh.
    blocks = adversarial_blocks(name)[:: 1 if ON_GPU else 7].to(DEVICE)
    assert_same_bits(by_kernel(name, blocks, torch.float32), by_eager(name, blocks, torch.float32))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "NVFP4"])
def test_other_dtypes_are_the_float32_value_rounded_once(name, dtype):
    blocks = random_blocks(name, 9, seed=5).to(DEVICE)
    assert_same_bits(by_kernel(name, blocks, dtype), by_eager(name, blocks, dtype))


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "MXFP4"])
def test_blocks_at_odd_addresses_and_with_gaps(name):
    size = FORMATS[name].block_bytes
    blocks = random_blocks(name, 6, seed=2)
    odd = torch.zeros(6 * size + 1, dtype=torch.uint8, device=DEVICE)[1:].view(6, size)
    odd.copy_(blocks)
    gaps = torch.zeros(6, size + 3, dtype=torch.uint8, device=DEVICE)[:, :size]
    gaps.copy_(blocks)
    expected = by_eager(name, blocks, torch.float32)
    assert_same_bits(by_kernel(name, odd, torch.float32), expected)
    assert_same_bits(by_kernel(name, gaps, torch.float32), expected)


@pytest.mark.skipif(ON_GPU, reason="on a GPU the kernels do serve")
def test_the_cpu_never_uses_a_kernel():
    assert not any(has_kernel(kind, torch.device("cpu")) for kind in FORMATS.values())


@pytest.mark.cuda
@pytest.mark.parametrize("name", KERNELS)
def test_dequantize_takes_the_kernel(name):
    assert has_kernel(FORMATS[name], DEVICE)
    blocks = random_blocks(name, 4096, seed=1)
    expected = FORMATS[name].decode(blocks, torch.bfloat16)
    assert torch.equal(dequantize(blocks.to(DEVICE), name, dtype=torch.bfloat16).cpu(), expected.view(4096, -1))
