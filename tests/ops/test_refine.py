"""quantize beats ggml: by how much on Gaussian values, and never the other way on any of the others."""

from itertools import product

import pytest
import torch
from ggml_reference import CASES, COLUMNS, IMPORTANCE, ROWS, by_ggml, gaussian, generator, library
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.formats.refine import REFINED
from gguf_native.ops.formats.refine_columns import Columns, IntegerCodes
from gguf_native.ops.formats.refine_unusual import are_unusual
from gguf_native.ops.quantize import LEAST_IMPORTANCE, VALUES_PER_PASS, quantize, quantize_as_ggml

# Root mean square error on Gaussian values over that of ggml's default: a little above what the refinement reaches.
RATIO_BOUNDS = {
    "Q4_0": 0.945,
    "Q4_1": 0.89,
    "Q5_0": 0.945,
    "Q5_1": 0.88,
    "Q8_0": 0.9,
    "Q2_K": 0.875,
    "Q3_K": 0.957,
    "Q4_K": 0.979,
    "Q5_K": 0.945,
    "Q6_K": 0.942,
    "IQ4_NL": 0.971,
    "IQ4_XS": 0.971,
    "MXFP4": 0.98,
}
# Where values are all alike, the rounding of the scale to float16 is all the error, and luck.
ROUNDING_OF_HALF = 2.0**-12
# An eighth of these columns have less than the least importance, which ggml does not raise.
ALLOWANCE = {("two values", "steeper"): 1.0002}

# Values of one sign, of one size or of few sizes, and importance that few columns have.
UNUSUAL_CASES = {
    "0 to 1": lambda: torch.rand(ROWS, COLUMNS, generator=generator()),
    "nearly alike": lambda: 5 + gaussian() * 0.001,
    "two values": lambda: gaussian().sign() + gaussian().flip(1) * 0.01,
    "three values": lambda: (gaussian() * 2).round().clamp(-1, 1) + gaussian().flip(1) * 0.01,
}
UNUSUAL_IMPORTANCE = {
    "steeper": lambda: torch.rand(COLUMNS, generator=generator()) ** 8,
    "every seventh": lambda: (torch.arange(COLUMNS) % 7 == 0).float(),
    "six decades": lambda: 10 ** (torch.rand(COLUMNS, generator=generator()) * 6 - 3),
    "lognormal": lambda: torch.randn(COLUMNS, generator=generator()).exp(),
}
ALL_CASES, ALL_IMPORTANCE = CASES | UNUSUAL_CASES, IMPORTANCE | UNUSUAL_IMPORTANCE
WEIGHTED_CASES = (
    *product(CASES, IMPORTANCE),
    *product(UNUSUAL_CASES, ALL_IMPORTANCE),
    *product(("gaussian", "outlier columns", "one huge value"), UNUSUAL_IMPORTANCE),
)

every_refined_type = pytest.mark.parametrize("name", REFINED)
ggml = pytest.fixture(library, scope="module")


def error(packed: torch.Tensor, values: torch.Tensor, name: str, importance: torch.Tensor | float = 1.0) -> float:
    """The weighted squared error of packed values."""
    return float(((dequantize(packed, name).double() - values.double()).square() * importance).sum())


def columns_of(values: torch.Tensor, block_size: int) -> Columns:
    blocks = values.view(-1, block_size)
    columns = Columns(len(blocks), block_size, min(block_size, 16), IntegerCodes(0, 1), False, values.device)
    columns.take(blocks, None)
    return columns


def test_every_type_with_a_search_is_refined():
    assert set(RATIO_BOUNDS) == set(REFINED)
    assert set(REFINED) <= set(FORMATS)


@every_refined_type
def test_error_on_gaussian_values_is_well_below_that_of_ggml(ggml, name):
    values = gaussian()
    ratio = (error(quantize(values, name), values, name) / error(by_ggml(ggml, values, name), values, name)) ** 0.5
    assert RATIO_BOUNDS[name] - 0.02 < ratio <= RATIO_BOUNDS[name]


@every_refined_type
@pytest.mark.parametrize("case", ALL_CASES)
def test_error_is_never_above_that_of_ggml(ggml, name, case):
    values = ALL_CASES[case]()
    assert error(quantize(values, name), values, name) <= error(by_ggml(ggml, values, name), values, name)


@every_refined_type
@pytest.mark.parametrize(("case", "kind"), WEIGHTED_CASES)
def test_weighted_error_is_never_above_that_of_ggml(ggml, name, case, kind):
    values, importance = ALL_CASES[case](), ALL_IMPORTANCE[kind]()
    weights = importance.clamp(min=float(importance.mean()) * LEAST_IMPORTANCE)
    ours = error(quantize(values, name, importance), values, name, weights)
    rounding = float((values.double() * ROUNDING_OF_HALF).square().mul(weights).sum())
    reference = error(by_ggml(ggml, values, name, importance), values, name, weights)
    assert ours <= max(reference * ALLOWANCE.get((case, kind), 1), rounding)


@pytest.mark.parametrize("case", ["gaussian", "heavy tailed", "outlier columns"])
def test_blocks_of_ordinary_values_are_seldom_searched_twice(case):
    assert are_unusual(columns_of(CASES[case](), 32)).float().mean() < 0.05
    assert are_unusual(columns_of(CASES[case](), 256)).float().mean() < 0.02


@pytest.mark.parametrize("case", UNUSUAL_CASES)
@pytest.mark.parametrize("size", [2.0**-100, 1, 2.0**30], ids=str)
def test_blocks_of_unusual_values_are_recognised_at_any_size(case, size):
    assert are_unusual(columns_of(UNUSUAL_CASES[case]() * size, 256)).float().mean() > 0.95


@every_refined_type
def test_importance_lowers_the_weighted_error(name):
    values, importance = gaussian(), IMPORTANCE["steep"]()
    weighted, plain = (error(quantize(values, name, given), values, name, importance) for given in (importance, None))
    assert weighted < 0.999 * plain


@every_refined_type
def test_equal_importance_is_none(name):
    values = gaussian()
    assert torch.equal(quantize(values, name, torch.full((COLUMNS,), 3.0)), quantize(values, name))
    assert torch.equal(quantize(values, name, torch.zeros(COLUMNS)), quantize(values, name))


@every_refined_type
def test_bytes_do_not_depend_on_passes_nor_on_threads(name, monkeypatch):
    values, importance = gaussian(), IMPORTANCE["steep"]()
    expected = quantize(values, name), quantize(values, name, importance)
    monkeypatch.setitem(VALUES_PER_PASS, "cpu", 768)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = quantize(values, name), quantize(values, name, importance)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, got, expected))


@every_refined_type
def test_values_are_left_alone(name):
    values = gaussian()
    quantize(values, name)
    assert torch.equal(values, gaussian())


@every_refined_type
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-9, 1e9, 1e20, 3e38], ids=str)
def test_sizes_beyond_float16_give_finite_values(name, size):
    values = torch.rand(4, 256, generator=generator()).sub_(0.5).mul_(size)
    decoded = dequantize(quantize(values, name), name)
    assert decoded.isfinite().all()
    assert (decoded.abs() <= values.abs().max() * 1.5).all()


@every_refined_type
def test_zeros_are_bytes_of_zero_scales(name):
    assert not dequantize(quantize(torch.zeros(1, 256), name), name).any()


@every_refined_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(name, bad):
    values = gaussian().view(2, -1, COLUMNS)
    values[1, 3, 5] = bad
    with pytest.raises(ValueError, match=rf"\(1, 3, 5\).*{bad}.*{name}"):
        quantize(values, name)


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if hasattr(row, "encode")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_widened_exactly(name, dtype):
    values = gaussian()[:2].to(dtype)
    assert torch.equal(quantize(values, name), quantize(values.float(), name))


@pytest.mark.parametrize("name", ["F32", "BF16", "TQ1_0"])
def test_other_types_are_written_as_by_ggml(name):
    assert torch.equal(quantize(gaussian(), name), quantize_as_ggml(gaussian(), name))


@every_refined_type
@pytest.mark.parametrize("shape", [(256,), (3, 1, 5, 512), (0, 256), (7, 768)], ids=str)
def test_shapes(name, shape):
    values = torch.randn(shape, generator=generator())
    blocks = quantize(values, name)
    row_bytes = shape[-1] // FORMATS[name].block_size * FORMATS[name].block_bytes
    assert blocks.shape == (*shape[:-1], row_bytes)
    rows = [quantize(row, name) for row in values.view(-1, shape[-1])]
    assert torch.equal(blocks.view(-1, row_bytes), torch.stack(rows) if rows else blocks)
