"""quantize_as_ggml packs every type that can be written into the bytes that ggml itself writes."""

import numpy as np
import pytest
import torch
from ggml_reference import CASES, COLUMNS, IMPORTANCE, by_ggml, gaussian, generator, library
from gguf_native.loader import open_gguf
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.quantize import VALUES_PER_PASS, quantize_as_ggml

# Their encoders are not ggml's: test_grid_encoders.py.
GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
WRITTEN = [name for name, row in FORMATS.items() if hasattr(row, "encode") and name not in GRIDS]
PLAIN = ("F32", "F16", "BF16")
UNSEARCHED = (*PLAIN, "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
SEARCHED = [name for name in WRITTEN if name not in UNSEARCHED]
PACKED = [name for name in WRITTEN if name not in PLAIN]

every_written_type = pytest.mark.parametrize("name", WRITTEN)
every_packed_type = pytest.mark.parametrize("name", PACKED)

# Root mean square error over that of the values, on Gaussian ones: a little above what ggml reaches.
ERROR_BOUNDS = {
    "F32": 0,
    "F16": 3e-4,
    "BF16": 2.5e-3,
    "Q4_0": 0.087,
    "Q4_1": 0.079,
    "Q5_0": 0.044,
    "Q5_1": 0.039,
    "Q8_0": 0.006,
    "Q2_K": 0.30,
    "Q3_K": 0.152,
    "Q4_K": 0.072,
    "Q5_K": 0.037,
    "Q6_K": 0.018,
    "IQ4_NL": 0.077,
    "IQ4_XS": 0.078,
    "MXFP4": 0.116,
    # A ternary type takes its scale from the greatest value: it is for weights that are ternary already.
    "TQ1_0": 1,
    "TQ2_0": 1,
}
every_case = pytest.mark.parametrize("case", CASES)


ggml = pytest.fixture(library, scope="module")


def by_libgguf(values: torch.Tensor, name: str) -> torch.Tensor:
    libgguf = pytest.importorskip("libgguf", reason="libgguf is not installed: pip install libgguf")
    blocks = libgguf.quantize_rows(values.contiguous().numpy(), libgguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.ascontiguousarray(blocks))


def assert_same_blocks(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert got.shape == expected.shape
    wrong = (got != expected).view(-1, FORMATS[name].block_bytes).any(1)
    assert not wrong.any(), f"{int(wrong.sum())} of {len(wrong)} blocks differ, first {int(wrong.int().argmax())}"


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt())


@every_written_type
@every_case
def test_bytes_are_those_of_ggml(ggml, name, case):
    values = CASES[case]()
    assert_same_blocks(quantize_as_ggml(values, name), by_ggml(ggml, values, name), name)


@every_packed_type
@every_case
@pytest.mark.parametrize("kind", IMPORTANCE)
def test_bytes_are_those_of_ggml_with_importance(ggml, name, case, kind):
    values, importance = CASES[case](), IMPORTANCE[kind]()
    assert_same_blocks(quantize_as_ggml(values, name, importance), by_ggml(ggml, values, name, importance), name)


@pytest.fixture(scope="module")
def real_weights(smollm2):
    """float32 [512, 768]: the beginning of SmolLM2's trained embedding, which its file holds in 8 bits."""
    with open_gguf(smollm2) as file:
        (info,) = [info for info in file.tensors.values() if info.type == "Q8_0"]
        return dequantize(file.read(info.name), "Q8_0").flatten()[: 512 * 768].view(512, 768)


@every_written_type
def test_bytes_of_real_weights_are_those_of_ggml(ggml, real_weights, name):
    assert_same_blocks(quantize_as_ggml(real_weights, name), by_ggml(ggml, real_weights, name), name)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_weighted_error(name):
    values, importance = gaussian(), IMPORTANCE["steep"]()
    weight = importance.sqrt()
    error, default = (
        relative_error(dequantize(quantize_as_ggml(values, name, given), name) * weight, values * weight)
        for given in (importance, None)
    )
    assert error < 0.99 * default


@every_packed_type
@pytest.mark.parametrize("case", ["gaussian", "heavy tailed", "outlier columns", "signs of zero"])
def test_bytes_are_those_of_libgguf(name, case):
    values = CASES[case]()
    assert_same_blocks(quantize_as_ggml(values, name), by_libgguf(values, name), name)


@every_written_type
def test_error_is_within_the_bound_of_the_type(name):
    values = gaussian()
    error = relative_error(dequantize(quantize_as_ggml(values, name), name), values)
    assert error <= ERROR_BOUNDS[name]
    assert error >= ERROR_BOUNDS[name] / 2


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"])
def test_decoded_values_encode_to_the_same_values(name):
    decoded = dequantize(quantize_as_ggml(gaussian(), name), name)
    assert torch.equal(dequantize(quantize_as_ggml(decoded, name), name), decoded)


@every_written_type
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_widened_exactly(name, dtype):
    values = gaussian().to(dtype)
    assert torch.equal(quantize_as_ggml(values, name), quantize_as_ggml(values.float(), name))


@every_written_type
@pytest.mark.parametrize("shape", [(256,), (1, 256), (3, 1, 5, 512), (0, 256), (7, 768)], ids=str)
def test_shapes(name, shape):
    values = torch.randn(shape, generator=generator())
    blocks = quantize_as_ggml(values, name)
    row_bytes = shape[-1] // FORMATS[name].block_size * FORMATS[name].block_bytes
    assert blocks.shape == (*shape[:-1], row_bytes)
    rows = [quantize_as_ggml(row, name) for row in values.view(-1, shape[-1])]
    assert torch.equal(blocks.view(-1, row_bytes), torch.stack(rows) if rows else blocks)


@every_written_type
@pytest.mark.parametrize("columns", [256, COLUMNS])
def test_strided_values(name, columns):
    values = gaussian()[:, :columns]
    assert torch.equal(
        quantize_as_ggml(values.t().contiguous().t()[::3], name), quantize_as_ggml(values[::3].clone(), name)
    )


@pytest.mark.parametrize("name", ["F32", "Q4_1", "Q3_K", "Q4_K", "IQ4_XS"])
def test_passes_join_without_a_seam(ggml, name):
    values = torch.randn(2 * VALUES_PER_PASS["cpu"] // 256 + 3, 256, generator=generator())
    assert_same_blocks(quantize_as_ggml(values, name), by_ggml(ggml, values, name), name)


def test_types_can_be_numbered():
    assert torch.equal(quantize_as_ggml(gaussian(), FORMATS["Q6_K"].number), quantize_as_ggml(gaussian(), "Q6_K"))


@pytest.mark.parametrize(
    "importance",
    [torch.ones(COLUMNS - 1), torch.ones(1, COLUMNS), torch.ones(COLUMNS).double(), torch.full((COLUMNS,), -1.0)],
    ids=["short", "matrix", "float64", "negative"],
)
def test_importance_that_does_not_fit_is_refused(importance):
    with pytest.raises(ValueError, match="Importance"):
        quantize_as_ggml(gaussian(), "Q4_K", importance)


@every_written_type
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(name, bad):
    values = gaussian().view(2, -1, COLUMNS)
    values[1, 3, 5] = values[1, 4, 0] = bad
    with pytest.raises(ValueError, match=rf"\(1, 3, 5\).*{bad}.*{name}"):
        quantize_as_ggml(values, name)


def test_a_type_without_encoder_lists_those_with_one():
    with pytest.raises(ValueError, match=r"IQ1_S can be read only.*Q4_0.*Q4_K"):
        quantize_as_ggml(gaussian(), "IQ1_S")


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match="Q9_K"):
        quantize_as_ggml(gaussian(), "Q9_K")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8], ids=str)
def test_a_dtype_that_would_lose_or_is_no_float_is_refused(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        quantize_as_ggml(torch.zeros(1, 256, dtype=dtype), "Q4_K")


@pytest.mark.parametrize("shape", [(4, 1000), (), (256, 8)], ids=str)
def test_rows_that_are_not_whole_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="256"):
        quantize_as_ggml(torch.zeros(shape), "Q4_K")


@pytest.mark.cuda
@pytest.mark.parametrize("weighted", [False, True], ids=["by itself", "importance"])
@pytest.mark.parametrize("name", PACKED)
def test_a_gpu_gives_the_same_bytes(name, weighted):
    importance = IMPORTANCE["steep"]() if weighted else None
    on_gpu = None if importance is None else importance.cuda()
    for case in ("gaussian", "heavy tailed", "outlier columns"):
        values = CASES[case]()
        expected = quantize_as_ggml(values, name, importance)
        assert torch.equal(quantize_as_ggml(values.cuda(), name, on_gpu).cpu(), expected), case
