"""Layers with packed weights: the answers are those of the host's own layers with the decoded weights."""

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management
import comfy.ops
from gguf_native.ops.compute import METHODS, Chosen
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.eight_bits import row_scales
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.layers import GGUFOps, WeightShapeError
from gguf_native.ops.layout import is_packed
from gguf_native.ops.matmul import Workspace, dequantize_op, dequantize_rows_op
from packed_weights import packed_weight

HOST = comfy.ops.manual_cast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (layer, arguments, options, shape of an input, options of the call)
LAYERS = [
    ("Linear", (512, 24), {}, (3, 7, 512), {}),
    ("Linear", (256, 1), {"bias": False}, (1, 256), {}),
    ("Conv1d", (64, 32, 3), {"padding": 1}, (2, 64, 9), {}),
    ("Conv1d", (64, 32, 4), {"stride": 2, "dilation": 2, "bias": False}, (1, 64, 20), {}),
    ("Conv2d", (32, 32, 3), {"padding": 1}, (2, 32, 5, 6), {}),
    ("Conv2d", (64, 32, 3), {"padding": 1, "groups": 4, "stride": 2}, (1, 64, 7, 5), {}),
    ("Conv2d", (32, 32, 3), {"padding": 1, "padding_mode": "reflect"}, (1, 32, 5, 5), {}),
    ("Conv2d", (32, 32, 3), {"padding": (1, 2), "padding_mode": "circular", "bias": False}, (1, 32, 5, 5), {}),
    ("Conv2d", (32, 32, 3), {"padding": "same", "padding_mode": "replicate"}, (1, 32, 5, 5), {}),
    ("Conv2d", (256, 8, 1), {}, (1, 256, 3, 3), {}),
    ("Conv3d", (32, 32, 3), {"padding": 1}, (1, 32, 3, 4, 4), {}),
    ("Conv3d", (32, 32, 3), {"padding": (0, 1, 1)}, (1, 32, 1, 4, 4), {"autopad": "causal_zero"}),
    ("Conv3d", (16, 256, (1, 2, 2)), {"stride": (1, 2, 2)}, (1, 16, 1, 4, 4), {}),
    ("ConvTranspose1d", (32, 64, 4), {"stride": 2, "padding": 1}, (2, 32, 5), {}),
    ("ConvTranspose1d", (32, 64, 4), {"stride": 3, "bias": False}, (1, 32, 5), {"output_size": [17]}),
    ("ConvTranspose2d", (32, 64, 4), {"stride": 2, "padding": 1, "groups": 2}, (1, 32, 3, 4), {}),
    ("ConvTranspose2d", (32, 64, 3), {"stride": 2}, (1, 32, 3, 4), {"output_size": [8, 10]}),
]
LAYER_IDS = [f"{index}-{row[0]}" for index, row in enumerate(LAYERS)]


@pytest.fixture(autouse=True)
def inference(request):
    if "compiled" in request.node.name:
        yield
        return
    with torch.inference_mode():
        yield


def decoded(weight, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(weight._qdata, weight._params.type, weight._params.orig_shape, dtype)


def pair(name: str, arguments: tuple, options: dict, type_name: str):
    """Our layer with a packed weight, the host's with the same weight decoded, both with the same bias."""
    ours, theirs = getattr(GGUFOps, name)(*arguments, **options), getattr(HOST, name)(*arguments, **options)
    weight = packed_weight(tuple(theirs.weight.shape), type_name)
    state = {"weight": weight}
    if theirs.bias is not None:
        state["bias"] = torch.randn(theirs.bias.shape, generator=torch.Generator().manual_seed(5))
    assert ours.load_state_dict(state) == ([], [])
    theirs.load_state_dict(state | {"weight": decoded(weight, torch.float32)})
    assert is_packed(ours.weight)
    return ours, theirs


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize(("name", "arguments", "options", "shape", "call"), LAYERS, ids=LAYER_IDS)
def test_answers_are_those_of_the_decoded_weight(name, arguments, options, shape, call, type_name, dtype):
    ours, theirs = pair(name, arguments, options, type_name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert same(ours(x, **call), theirs(x, **call))


@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_embedding_rows_are_those_of_the_decoded_weight(type_name, out_dtype):
    ours, theirs = GGUFOps.Embedding(12, 256), HOST.Embedding(12, 256)
    weight = packed_weight((12, 256), type_name)
    ours.load_state_dict({"weight": weight})
    theirs.load_state_dict({"weight": decoded(weight, torch.float32)})
    for index in (torch.tensor([[0, 11, 5], [5, 5, 1]]), torch.tensor(3), torch.empty(0, dtype=torch.int64)):
        expected = theirs(index, out_dtype=out_dtype)
        assert same(ours(index, out_dtype=out_dtype), expected)


@pytest.mark.parametrize(("name", "arguments", "options", "shape", "call"), LAYERS, ids=LAYER_IDS)
def test_plain_weights_are_the_hosts_affair(name, arguments, options, shape, call):
    ours, theirs = getattr(GGUFOps, name)(*arguments, **options), getattr(HOST, name)(*arguments, **options)
    state = {key: torch.randn_like(tensor).bfloat16() for key, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(shape)
    assert same(ours(x, **call), theirs(x, **call))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [("LayerNorm", (8,), (2, 8)), ("RMSNorm", (8,), (2, 8)), ("GroupNorm", (2, 8), (2, 8, 3))],
)
def test_norms_are_those_of_the_host(name, arguments, shape):
    ours, hosts = getattr(GGUFOps, name)(*arguments), getattr(HOST, name)(*arguments)
    weights = {key: torch.randn(8) for key in hosts.state_dict()}
    for layer in (ours, hosts):
        layer.load_state_dict(weights)
    x = torch.randn(shape)
    assert torch.equal(ours(x), hosts(x))
    with pytest.raises(WeightShapeError, match=r"weight' has shape \[4\]; the model needs \[8\]"):
        ours.load_state_dict({key: torch.randn(4) for key in weights})


@pytest.mark.parametrize(("decode_dtype", "is_rounded"), [(None, False), (torch.float16, True)])
def test_decode_dtype_rounds_first(decode_dtype, is_rounded):
    ours, theirs = pair("Linear", (512, 24), {}, "Q4_K")
    ours.decode_dtype = decode_dtype
    x = torch.randn(3, 512)
    rounded = decoded(ours.weight, decode_dtype or torch.float32).float()
    assert same(ours(x), torch.nn.functional.linear(x, rounded, theirs.bias))
    assert torch.equal(ours(x), theirs(x)) != is_rounded


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_loading_copies_no_block(inference):
    with inference():
        ours = GGUFOps.Linear(512, 24, dtype=torch.float16)
        weight = packed_weight((24, 512), "Q4_K", torch.bfloat16)
        ours.load_state_dict({"weight": weight, "bias": torch.zeros(24)})
    assert ours.weight._qdata.data_ptr() == weight._qdata.data_ptr()
    assert ours.weight.dtype == ours.bias.dtype == torch.float16
    assert not ours.weight.requires_grad


def test_moves_keep_the_blocks():
    ours, _ = pair("Conv2d", (32, 32, 3), {}, "Q8_0")
    expected = ours.weight._qdata.clone()
    for move, dtype in (
        (lambda: ours.to(torch.bfloat16), torch.bfloat16),
        (lambda: ours.half(), torch.float16),
        (lambda: ours.to("cpu", torch.float32), torch.float32),
    ):
        move()
        assert is_packed(ours.weight)
        assert torch.equal(ours.weight._qdata, expected)
        assert ours.weight.dtype == ours.bias.dtype == dtype
    assert is_packed(ours.to("meta").weight)
    assert ours.weight.device.type == ours.weight._qdata.device.type == "meta"


def test_state_costs_the_packed_bytes():
    ours, _ = pair("Linear", (512, 24), {}, "Q4_K")
    state = ours.state_dict()
    assert list(state) == ["weight", "bias"]
    assert state["weight"].nbytes == 24 * 512 // 256 * 144
    assert comfy.model_management.module_size(ours) == 24 * 512 // 256 * 144 + 24 * 4


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d"])
def test_missing_and_unexpected_keys_are_reported(name):
    arguments = {"Linear": (256, 4), "Embedding": (4, 256), "Conv2d": (32, 8, 3)}[name]
    model = torch.nn.Sequential(getattr(GGUFOps, name)(*arguments))
    missing, unexpected = model.load_state_dict({"0.scale": torch.ones(1)}, strict=False)
    wanted = ["0.weight"] if name == "Embedding" else ["0.weight", "0.bias"]
    assert missing == wanted
    assert unexpected == ["0.scale"]
    assert model[0].missing == tuple(key.removeprefix("0.") for key in wanted)


def test_layer_without_bias_needs_none():
    ours = GGUFOps.Linear(256, 4, bias=False)
    assert ours.load_state_dict({"weight": packed_weight((4, 256), "Q4_K")}) == ([], [])
    assert ours.bias is None


@pytest.mark.parametrize("weight", [packed_weight((4, 512), "Q4_K"), torch.ones(4, 512)], ids=["packed", "plain"])
def test_wrong_shape_is_refused(weight):
    model = torch.nn.Sequential(GGUFOps.Linear(256, 4))
    with pytest.raises(WeightShapeError, match=r"'0\.weight' has shape \[4, 512\]; the model needs \[4, 256\]"):
        model.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(4)})


def test_shape_of_the_layer_wins_over_as_many_values():
    ours = GGUFOps.Conv2d(32, 8, 1, bias=False)
    weight = packed_weight((8, 32), "Q8_0")
    ours.load_state_dict({"weight": weight})
    assert ours.weight.shape == (8, 32, 1, 1)
    x = torch.randn(1, 32, 2, 2)
    dense = decoded(weight, torch.float32)[..., None, None]
    assert torch.equal(ours(x), torch.nn.functional.conv2d(x, dense))


@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d"])
def test_cancel_stops_at_the_next_layer(name):
    arguments, x = {
        "Linear": ((256, 4), torch.ones(1, 256)),
        "Embedding": ((4, 256), torch.tensor([1])),
        "Conv2d": ((32, 8, 3), torch.ones(1, 32, 4, 4)),
    }[name]
    ours = getattr(GGUFOps, name)(*arguments)
    shape = {"Linear": (4, 256), "Embedding": (4, 256), "Conv2d": (8, 32, 3, 3)}[name]
    state = {"weight": packed_weight(shape, "Q8_0")}
    ours.load_state_dict(state | ({} if name == "Embedding" else {"bias": torch.zeros(shape[0])}))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ours(x)
    ours(x)


def test_weight_functions_of_others_see_the_decoded_weight():
    """The host and other packs hang functions on a layer; they expect numbers."""
    ours, theirs = pair("Linear", (512, 24), {}, "Q4_K")
    x = torch.randn(3, 512)
    for layer in (ours, theirs):
        layer.weight_function = [lambda weight: weight * 2]
        layer.bias_function = [lambda bias: bias + 1]
    assert same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Embedding"])
def test_compiled_without_a_break_for_any_size(name):
    with torch.no_grad():
        if name == "Embedding":
            ours = GGUFOps.Embedding(12, 256)
            ours.load_state_dict({"weight": packed_weight((12, 256), "Q4_K")})
            inputs = [torch.arange(n) for n in (3, 5, 9)]
        elif name == "Linear":
            ours, _ = pair("Linear", (512, 24), {}, "Q4_K")
            # Few rows would be another graph.
            inputs = [torch.randn(n, 512) for n in (10, 13, 30)]
        else:
            ours, _ = pair("Conv2d", (32, 32, 3), {"padding": 1}, "Q8_0")
            inputs = [torch.randn(1, 32, n, n + 1) for n in (3, 5, 9)]
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
        for x in inputs:
            assert torch.equal(compiled(x), ours(x))
        assert counter.frame_count == 1


def eight_bit_layer(is_prepared: bool, device: str = "cpu") -> GGUFOps.Linear:
    """A layer for int8; prepared as on a GPU, or not at all."""
    ours, _ = pair("Linear", (512, 32), {}, "Q4_K")
    ours.to(device, torch.bfloat16)
    ours.compute, ours.workspace = "int8", Workspace()
    if is_prepared:
        ours.chosen = Chosen(METHODS["int8"], row_scales(FORMATS["Q4_K"], ours.weight._qdata, torch.int8))
    return ours


def compiled_whole(layer: GGUFOps.Linear):
    torch._dynamo.reset()
    return torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_compiled_layer_in_eight_bits_makes_no_choice_of_its_own(is_prepared):
    """Where nothing was chosen before, it is exact."""
    with torch.no_grad():
        ours = eight_bit_layer(is_prepared)
        layer = compiled_whole(ours)
        inputs = [torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (17, 20, 33)]
        answers = [layer(x) for x in inputs]
        assert (ours.chosen is not None) == is_prepared
        ours.compute = "int8" if is_prepared else "exact"
        for x, answer in zip(inputs, answers, strict=True):
            assert same(answer, ours(x))
        ours.compute = "exact"
        assert torch.equal(answers[0], ours(inputs[0])) != is_prepared


@pytest.mark.cuda
@pytest.mark.parametrize("n_rows", [2, 33])
def test_compiled_on_a_gpu_without_a_break(n_rows):
    """Few rows have a product of their own, which torch.compile must not look into."""
    with torch.no_grad():
        ours = eight_bit_layer(True, "cuda")
        x = torch.randn(n_rows, 512, device="cuda").bfloat16()
        answer = compiled_whole(ours)(x)
        torch.testing.assert_close(answer, ours(x))


def test_gradients_are_those_of_the_exact_product():
    with torch.inference_mode(False), torch.enable_grad():
        ours = eight_bit_layer(True)
        x = torch.randn(20, 512).bfloat16().requires_grad_()
        (gradient,) = torch.autograd.grad(ours(x).sum(), x)
        expected = decoded(ours.weight, torch.bfloat16).sum(0).expand(20, -1)
    assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_operators_are_what_torch_expects(dtype):
    weight = packed_weight((6, 512), "Q4_K")
    number = FORMATS["Q4_K"].number
    torch.library.opcheck(dequantize_op, (weight._qdata, number, [6, 512], dtype))
    torch.library.opcheck(dequantize_rows_op, (weight._qdata, number, torch.tensor([[0, 5], [2, 2]]), dtype))
