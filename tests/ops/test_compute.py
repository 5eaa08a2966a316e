"""How a layer multiplies: what each way adds to the error, what it is chosen by, and where it cannot serve."""

import logging
from types import SimpleNamespace

import pytest
import torch
from samples import random_blocks

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")

from gguf_native.config import SETTINGS, one_of
from gguf_native.ops import compute, matmul
from gguf_native.ops.compute import COMPUTE, EXACT, FORMAT_ERROR, METHODS, PACES, Chosen, choose, prepare, why_not
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.eight_bits import row_scales
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels import KERNELS
from gguf_native.ops.layers import GGUFOps
from gguf_native.ops.layout import pack
from gguf_native.ops.matmul import Workspace
from gguf_native.ops.quantize import quantize

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
N_COLUMNS = 3072
# Relative error that a method adds to a product with normally distributed inputs, as its docstring says.
ADDED_ERROR = {"fp8": 0.037, "int8": 0.012}
NEEDS_A_GPU = "it needs an NVIDIA GPU"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(type_name: str, shape: tuple[int, int] = (256, N_COLUMNS), device: torch.device = DEVICE):
    """A packed weight of normally distributed values."""
    return pack(quantize(normal(*shape), type_name).flatten().to(device), type_name, shape, torch.bfloat16)


def inputs(*shape: int, n_outliers: int = 0) -> torch.Tensor:
    """bfloat16 on DEVICE; some columns are a hundred times as large as the others."""
    x = normal(*shape, seed=1)
    x[..., :n_outliers] *= 100
    return x.bfloat16().to(DEVICE)


def product(x: torch.Tensor, weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias in float64."""
    values = dequantize(weight._qdata, weight._params.type, weight._params.orig_shape).double()
    out = x.double() @ values.T
    return out if bias is None else out + bias.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def prepared(method: str, weight) -> Chosen:
    """As `prepare` does it on a GPU that has the method; on the CPU the library has it too."""
    scales = row_scales(FORMATS[weight._params.type], weight._qdata, METHODS[method].dtype)
    return Chosen(METHODS[method], scales)


@pytest.fixture
def said(caplog):
    """Function -> what the pack has logged, as if nothing had been said before."""
    compute.log_exact.cache_clear()
    with caplog.at_level(logging.INFO, "gguf_native"):
        yield lambda: caplog.messages


def test_the_setting_has_the_same_words():
    assert SETTINGS["compute"].kind.allowed == one_of(*COMPUTE).allowed
    assert {"exact", "auto", *METHODS} == set(COMPUTE)
    for pace in PACES.values():
        assert set(pace.order) == METHODS.keys()


@pytest.mark.parametrize("name", [name for name in FORMAT_ERROR if hasattr(FORMATS[name], "encode")])
def test_errors_of_formats_are_true(name):
    values = normal(64, N_COLUMNS)
    assert relative_error(dequantize(quantize(values, name), name), values) == pytest.approx(FORMAT_ERROR[name], 0.03)


def test_errors_of_formats_are_of_types_with_kernels():
    assert FORMAT_ERROR.keys() <= KERNELS.keys()
    assert max(FORMAT_ERROR.values()) < compute.COARSE_ERROR


@pytest.mark.parametrize("kind", ["fp8", "int8", "auto"])
def test_on_a_cpu_all_is_exact_and_one_line_says_so(said, kind):
    weights = [packed(name, (16, 256), torch.device("cpu")) for name in ("Q8_0", "Q4_0")]
    for weight in weights:
        assert choose(kind, weight, normal(2, 256).bfloat16(), Workspace()) is EXACT
    assert said() == [f"GGUF Native: some layers compute exactly instead of in {kind}, which is slower: {NEEDS_A_GPU}."]


def on_a_gpu(shape: tuple[int, int], n_rows_of_blocks: int) -> SimpleNamespace:
    """All that `why_not` asks of a weight."""
    blocks = SimpleNamespace(device=torch.device("cuda", 0), shape=(n_rows_of_blocks, 288))
    return SimpleNamespace(_qdata=blocks, _params=SimpleNamespace(orig_shape=shape, type="Q4_K"))


@pytest.mark.parametrize(
    ("capability", "shape", "n_rows_of_blocks", "fp8", "int8"),
    [
        ((9, 0), (32, 512), 32, None, None),
        ((8, 9), (32, 512), 32, None, None),
        ((8, 6), (32, 512), 32, "Some GPU is older than compute capability 8.9", None),
        ((7, 5), (32, 512), 32, "Some GPU is older than compute capability 8.9", None),
        ((7, 0), (32, 512), 32, *(f"Some GPU is older than compute capability {since}" for since in ("8.9", "7.5"))),
        ((9, 0), (24, 512), 24, *["the sides of some matrices are not divisible by 16"] * 2),
        ((9, 0), (32, 520), 65, *["the sides of some matrices are not divisible by 16"] * 2),
        ((9, 0), (32, 48), 6, *["or their rows are not whole blocks"] * 2),
    ],
)
def test_why_not(monkeypatch, capability, shape, n_rows_of_blocks, fp8, int8):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(compute, "has_kernel", lambda *arguments: True)
    monkeypatch.setattr(compute, "_why_not_on", lambda *arguments: None)
    weight = on_a_gpu(shape, n_rows_of_blocks)
    for method, expected in (("fp8", fp8), ("int8", int8)):
        reason = why_not(method, weight)
        assert reason is None if expected is None else expected in reason


def test_without_a_kernel_the_exact_product_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compute, "has_kernel", lambda *arguments: False)
    assert "without Triton" in why_not("fp8", on_a_gpu((32, 512), 32))


def test_a_product_that_the_library_lacks_is_a_reason(monkeypatch):
    def lacking(*arguments):
        raise RuntimeError("not supported on your device")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setitem(matmul.PRODUCTS, torch.float8_e4m3fn, lacking)
    compute._why_not_on.cache_clear()
    reason = compute._why_not_on("fp8", torch.device("cpu"))
    compute._why_not_on.cache_clear()
    assert reason == f"torch {torch.__version__} has it not for Some GPU (not supported on your device)"
    assert compute._why_not_on("int8", torch.device("cpu")) is None


def test_a_weight_that_is_not_finite_stays_exact(monkeypatch, said):
    monkeypatch.setattr(compute, "why_not", lambda *arguments: None)
    weight = packed("Q8_0", (16, 256))
    assert prepare("int8", weight).method is METHODS["int8"]
    weight._qdata[3, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # an infinite scale
    assert prepare("int8", weight) is EXACT
    assert [line.rpartition(": ")[2] for line in said()] == ["a weight has values that are not finite."]


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("method", METHODS)
def test_added_error(method, type_name):
    weight, x = packed(type_name), inputs(2, 80, N_COLUMNS)
    out = prepared(method, weight).linear(x, weight, None, None)
    assert out.dtype == x.dtype
    assert out.shape == (2, 80, 256)
    assert relative_error(out, product(x, weight)) == pytest.approx(ADDED_ERROR[method], 0.1)


def test_outliers_harm_int8_and_not_fp8():
    weight, x = packed("Q8_0"), inputs(160, N_COLUMNS, n_outliers=4)
    errors = {
        method: relative_error(prepared(method, weight).linear(x, weight, None, None), product(x, weight))
        for method in METHODS
    }
    assert errors["fp8"] == pytest.approx(ADDED_ERROR["fp8"], 0.2)
    assert errors["int8"] > 3 * ADDED_ERROR["int8"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_bias_and_workspace(method, dtype):
    weight, x = packed("Q4_0", (32, 512)), inputs(20, 512).to(dtype)
    bias = 30 * normal(32, seed=2).to(DEVICE, dtype)
    chosen, workspace = prepared(method, weight), Workspace()
    with torch.inference_mode():
        outs = [chosen.linear(x, weight, bias, memory) for memory in (None, workspace, workspace)]
    assert relative_error(outs[0], product(x, weight, bias)) < ADDED_ERROR[method]
    for out in outs:
        assert out.dtype == dtype
        assert torch.equal(out, outs[0])
    # One byte for each value.
    assert {use: buffer.nbytes for (use, _), buffer in workspace.buffers.items()}["weight"] == 32 * 512


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_do_not_lie_one_after_another(method):
    weight, memory = packed("Q4_0", (32, 512)), inputs(2, 20, 1024)
    chosen, workspace = prepared(method, weight), Workspace()
    with torch.inference_mode():
        for x in (memory[0, :, :512].contiguous(), memory[..., :512], memory[:, ::2, 512:]):
            expected = chosen.linear(x.clone(), weight, None, None)
            assert torch.equal(chosen.linear(x, weight, None, workspace), expected)


def test_a_layer_computes_few_inputs_exactly():
    layer = GGUFOps.Linear(512, 32, bias=False)
    layer.load_state_dict({"weight": packed("Q4_0", (32, 512))})
    layer.compute, layer.chosen = "int8", prepared("int8", layer.weight)._replace(min_rows=20)
    for n_rows in (19, 20):
        x = inputs(1, n_rows, 512).bfloat16()
        with torch.inference_mode():
            exact = matmul.linear(x, layer.weight, None, None)
            assert torch.equal(layer(x), exact) == (n_rows < 20)


def auto(type_name: str, n_outliers: int = 0) -> Chosen:
    return choose("auto", packed(type_name), inputs(600, N_COLUMNS, n_outliers=n_outliers), Workspace())


def on_this_gpu() -> list[str]:
    """The methods of the GPU here, the fastest first."""
    capability = torch.cuda.get_device_capability()
    pace = next(pace for since, pace in PACES.items() if capability >= since)
    return [method for method in pace.order if capability >= METHODS[method].since]


@pytest.mark.parametrize(("times", "is_taken"), [(0.98, True), (1.02, False)])
def test_auto_takes_what_adds_less_than_the_error_of_the_format(monkeypatch, times, is_taken):
    error = times * FORMAT_ERROR["Q4_K"]

    class Method(Chosen):
        """In place of a product on a GPU: it errs by so much."""

        def linear(self, x, weight, bias, workspace):
            return (1 + error) * EXACT.linear(x, weight, bias, workspace).float()

    monkeypatch.setattr(compute, "_is_nvidia", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compute, "_prepared", lambda name, weight: Method(None, None))
    weight = packed("Q4_K", (16, 256), torch.device("cpu"))
    chosen = choose("auto", weight, normal(8, 256).bfloat16(), Workspace())
    assert isinstance(chosen, Method) is is_taken


@pytest.mark.cuda
def test_auto_takes_the_fastest_where_the_format_is_coarse():
    assert auto("Q4_K").method is METHODS[on_this_gpu()[0]]


@pytest.mark.cuda
def test_auto_takes_nothing_coarser_than_the_format():
    assert auto("Q8_0") is EXACT
    assert auto("Q6_K").method is METHODS["int8"]


@pytest.mark.cuda
def test_auto_takes_no_int8_for_inputs_with_outliers():
    assert auto("Q6_K", n_outliers=4) is EXACT
    assert auto("Q4_K", n_outliers=4).method in (METHODS["fp8"], None)


@pytest.mark.cuda
def test_auto_takes_the_same_again():
    first, second = auto("Q4_K"), auto("Q4_K")
    assert first.method is second.method
    assert all(torch.equal(*pair) for pair in zip(first.scales, second.scales, strict=True))


@pytest.mark.cuda
def test_auto_is_silent(said):
    for type_name in ("Q8_0", "Q6_K", "Q4_K"):
        auto(type_name)
    assert said() == []


@pytest.mark.parametrize("bias", [None, torch.ones(32)], ids=["no_bias", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_operator_in_eight_bits_is_what_torch_expects(method, bias):
    weight, x = packed("Q4_0", (32, 512)), inputs(2, 9, 512)
    bias = bias if bias is None else bias.to(x)
    scales = prepared(method, weight).scales
    torch.library.opcheck(matmul.linear_eight_bits_op, (x, weight._qdata, "Q4_0", bias, *scales, METHODS[method].dtype))


@pytest.mark.parametrize("bias", [None, torch.ones(32)], ids=["no_bias", "bias"])
def test_operator_for_few_rows_is_what_torch_expects(bias):
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")
    blocks, x = random_blocks("Q4_K", 32 * 2).view(32, -1).to(DEVICE), inputs(2, 3, 512)
    torch.library.opcheck(matmul.linear_few_rows_op, (x, blocks, "Q4_K", bias if bias is None else bias.to(x)))
