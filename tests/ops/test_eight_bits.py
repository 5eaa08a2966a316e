"""Weights and inputs in 8 bits: against float64, and the kernels against their eager twins.

The kernels run on a GPU where there is one, else in Triton's interpreter (conftest.py).
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")

from gguf_native.ops.eight_bits import PEAKS, decode_scaled_into, quantize_rows_into, row_scales
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels import KERNELS, scaled
from samples import adversarial_blocks, random_blocks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
# Triton's interpreter rounds wrongly to float8.
BY_KERNEL = [INT8, pytest.param(FP8, marks=pytest.mark.cuda)]
N_ROWS = [1, 3, 8]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MARGIN = 5
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities in the interpreter


def rows_of(name: str, n_rows: int, n_blocks: int = 3) -> torch.Tensor:
    """uint8 [n_rows + 1, row_bytes] on the CPU, the last row zeros."""
    blocks = random_blocks(name, n_rows * n_blocks, seed=n_rows).view(n_rows, -1)
    return torch.cat([blocks, torch.zeros_like(blocks[:1])])


def values_of(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """float32 [n_rows, n_columns] on the CPU."""
    return FORMATS[name].decode(blocks.reshape(-1, FORMATS[name].block_bytes)).view(len(blocks), -1)


def finite_and_other_rows(name: str, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Adversarial rows of one block each; `every` so many where the interpreter is slow."""
    blocks = adversarial_blocks(name)[:: 1 if ON_GPU else every]
    finite = values_of(name, blocks).isfinite().all(1)
    return blocks[finite], blocks[~finite]


def by_eager(name: str, blocks: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(values_of(name, blocks).shape, dtype=dtype)
    decode_scaled_into(FORMATS[name], blocks, factors, out)
    return out


def by_kernel(name: str, blocks: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scaled values on the CPU, decoded before a margin that must stay untouched."""
    n_rows, n_columns = values_of(name, blocks).shape
    out = torch.full((n_rows + 1, n_columns), MARGIN, dtype=torch.int8, device=DEVICE)
    scaled.decode_scaled_into(blocks.to(DEVICE), name, factors.to(DEVICE), out[:-1].view(dtype))
    assert (out[-1] == MARGIN).all()
    return out[:-1].view(dtype).cpu()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def half_a_step(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far the nearest number of `dtype` may be from each float64."""
    if dtype == INT8:
        return torch.full_like(exact, 0.5)
    # Three bits of fraction; the smallest step is 2^-9.
    return (exact.abs() * 2**-4).clamp_min(2**-10)


@pytest.mark.parametrize("dtype", PEAKS, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_eager_is_the_nearest_to_float64(name, dtype):
    blocks = rows_of(name, 3)
    exact = values_of(name, blocks).double()
    scales = row_scales(FORMATS[name], blocks, dtype)
    peaks = exact[:-1].abs().amax(1)
    assert scales.scales.dtype == scales.factors.dtype == torch.float32
    torch.testing.assert_close(scales.scales[:-1].double(), peaks / PEAKS[dtype], rtol=1e-6, atol=0)
    torch.testing.assert_close(scales.factors[:-1].double(), PEAKS[dtype] / peaks, rtol=1e-6, atol=0)
    stored = by_eager(name, blocks, scales.factors, dtype).double()
    wanted = exact * scales.factors.double().unsqueeze(1)
    assert ((stored - wanted).abs() <= half_a_step(wanted, dtype) * 1.0001).all()
    assert (stored[:-1].abs().amax(1) == PEAKS[dtype]).all()
    assert not stored[-1].any()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "NVFP4"])  # whose numbers are all finite
def test_rows_with_a_broken_value_have_no_scales(name):
    """On a GPU the kernel finds them."""
    finite, broken = (rows.to(DEVICE) for rows in finite_and_other_rows(name))
    assert row_scales(FORMATS[name], finite, INT8) is not None
    assert len(broken)
    for row in broken[::20]:
        assert row_scales(FORMATS[name], torch.stack([finite[0], row, finite[0]]), INT8) is None


@pytest.mark.parametrize("name", KERNELS)
def test_peaks_by_kernel(name):
    finite, _ = finite_and_other_rows(name, every=37)
    _, broken = finite_and_other_rows(name)
    broken = broken[:: max(1, len(broken) // 16)]
    for blocks, n_rows in ((rows_of(name, 3), 4), (rows_of(name, 1, n_blocks=17), 2), (finite, len(finite))):
        peaks = torch.full((n_rows + 1,), -1.0, device=DEVICE)
        scaled.row_peaks_into(blocks.to(DEVICE), name, peaks[:-1])
        assert torch.equal(peaks[:-1].cpu(), values_of(name, blocks).abs().amax(1))
        assert peaks[-1] == -1
    peaks = torch.zeros(len(broken), device=DEVICE)
    scaled.row_peaks_into(broken.to(DEVICE), name, peaks)
    assert peaks.isnan().all()


@pytest.mark.parametrize("dtype", BY_KERNEL, ids=str)
@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_gives_the_bits_of_its_eager_twin(name, n_rows, dtype):
    blocks = rows_of(name, n_rows)
    factors = row_scales(FORMATS[name], blocks, dtype).factors
    assert_same_bits(by_kernel(name, blocks, factors, dtype), by_eager(name, blocks, factors, dtype))


@pytest.mark.parametrize("dtype", BY_KERNEL, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_gives_the_bits_of_its_eager_twin_for_adversarial_blocks(name, dtype):
    blocks, _ = finite_and_other_rows(name, every=7)
    factors = row_scales(FORMATS[name], blocks, dtype).factors
    assert_same_bits(by_kernel(name, blocks, factors, dtype), by_eager(name, blocks, factors, dtype))


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "MXFP4"])
def test_blocks_at_odd_addresses_and_with_gaps(name):
    blocks = rows_of(name, 3)
    n_rows, row_bytes = blocks.shape
    factors = row_scales(FORMATS[name], blocks, INT8).factors
    odd = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)[1:].view(n_rows, row_bytes).copy_(blocks)
    gaps = torch.zeros(n_rows, row_bytes + 3, dtype=torch.uint8)[:, :row_bytes].copy_(blocks)
    expected = by_eager(name, blocks, factors, INT8)
    assert_same_bits(by_kernel(name, odd, factors, INT8), expected)
    assert_same_bits(by_kernel(name, gaps, factors, INT8), expected)


def inputs(n_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[6, n_columns] on DEVICE: rows of very different size, the last zeros."""
    x = torch.randn(6, n_columns, generator=torch.Generator().manual_seed(n_columns))
    sizes = torch.tensor([1.0, 1e-3, 1e3, 0.1, 10.0, 0.0])
    return (x * sizes.unsqueeze(1)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n_columns", [1, 48, 3072])
def test_quantize_rows(n_columns, dtype):
    x = inputs(n_columns, dtype)
    out, scales = torch.empty_like(x, dtype=FP8), torch.empty(len(x), 1, device=DEVICE)
    quantize_rows_into(x, out, scales)
    exact, peaks = x.double(), x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales[:-1].double(), peaks[:-1] / PEAKS[FP8], rtol=1e-6, atol=0)
    wanted = exact / scales.double()
    assert ((out.double() - wanted).abs() <= half_a_step(wanted, FP8) * 1.0001).all()
    assert not out[-1].double().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n_columns", [1, 48, 700])
def test_kernel_keeps_inputs_that_float8_can_hold(n_columns, dtype):
    """Rounding is for the GPU alone: `test_quantize_rows`."""
    generator = torch.Generator().manual_seed(n_columns)
    held = torch.randint(0, 0x7F, (3, n_columns), dtype=torch.uint8, generator=generator).view(FP8)
    held[:, 0] = torch.tensor([PEAKS[FP8], -PEAKS[FP8], PEAKS[FP8]]).to(FP8)
    powers = torch.tensor([[1.0], [0.25], [32.0]])
    x = (held.float() * powers).to(dtype).to(DEVICE)
    out = torch.full((4, n_columns), MARGIN, dtype=torch.int8, device=DEVICE)
    scales = torch.full((4, 1), -1.0, device=DEVICE)
    for _ in range(2):  # on a GPU the second launch takes the short way
        scaled.quantize_rows_into(x, out[:-1].view(FP8), scales[:-1], PEAKS[FP8])
        assert_same_bits(out[:-1].view(FP8).cpu(), held)
        torch.testing.assert_close(scales[:-1].cpu(), powers, rtol=1e-6, atol=0)
        assert (out[-1] == MARGIN).all()
        assert scales[-1] == -1
