"""What a layer does with its weight around a product: how the host sends it, and that it is given back."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.ops
from gguf_native.ops import layers
from gguf_native.ops.layers import GGUFOps
from gguf_native.ops.layout import is_packed
from packed_weights import packed_weight

HOST = comfy.ops.manual_cast


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("name", "arguments", "x", "product"),
    [
        ("Linear", (256, 4), torch.ones(1, 256), "linear"),
        ("Embedding", (4, 256), torch.tensor([1]), "gather_rows"),
        ("Conv2d", (32, 8, 3), torch.ones(1, 32, 4, 4), None),
    ],
)
def test_a_forward_that_fails_gives_the_weight_back(name, arguments, x, product, monkeypatch):
    """Memory may run out in it, and it runs again: DynamicVRAM and the ring want back what was borrowed."""

    def full(*_, **__):
        raise torch.OutOfMemoryError

    ours, given_back = getattr(GGUFOps, name)(*arguments, **({} if name == "Embedding" else {"bias": False})), []
    ours.load_state_dict({"weight": packed_weight(tuple(getattr(HOST, name)(*arguments).weight.shape), "Q8_0")})
    monkeypatch.setattr(*((layers, product) if product else (ours, "_conv_forward")), full)
    monkeypatch.setattr(ours, "give_back", lambda weight, bias, token: given_back.append(weight))
    with pytest.raises(torch.OutOfMemoryError):
        ours(x)
    assert len(given_back) == 1


@pytest.mark.parametrize("fails", ["decode_weight", "rewrite", "bias"])
def test_what_fails_before_the_product_gives_the_weight_back(fails, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    ours, given_back = GGUFOps.Linear(256, 4), []
    ours.load_state_dict({"weight": packed_weight((4, 256), "Q8_0"), "bias": torch.ones(4)})
    ours.side_path = SimpleNamespace(low_rank=None, rewrite=full if fails == "rewrite" else lambda weight: weight)
    monkeypatch.setattr(ours, "give_back", lambda weight, bias, token: given_back.append(weight))
    x = torch.ones(1, 256)
    if fails == "decode_weight":
        monkeypatch.setattr(layers, fails, full)
    if fails == "bias":
        ours.side_path, x = None, x.bfloat16()
        monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        ours(x)
    assert len(given_back) == 1


class Sendings(TorchDispatchMode):
    """Of each operation that made something on a device out of a tensor in RAM: (who asked for it, the tensor)."""

    def __init__(self):
        super().__init__()
        self.asking, self.seen = "layer", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        if isinstance(answer, torch.Tensor) and answer.device.type != "cpu":
            in_ram = (arg for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cpu")
            self.seen += [(self.asking, tensor) for tensor in in_ram]
        return answer


@pytest.mark.parametrize(
    ("name", "arguments", "x"),
    [
        ("Linear", (512, 24), torch.ones(1, 512)),
        ("Linear", (512, 24), torch.ones(64, 512)),
        ("Conv2d", (32, 32, 3), torch.ones(1, 32, 5, 5)),
        ("ConvTranspose1d", (32, 64, 4), torch.ones(1, 32, 5)),
        ("Embedding", (12, 256), torch.tensor([3, 1])),
    ],
    ids=["few rows", "Linear", "Conv2d", "ConvTranspose1d", "Embedding"],
)
def test_without_dynamic_vram_the_host_sends_the_blocks(name, arguments, x, monkeypatch):
    """On a stream of its own where it has one, and it hears of the last use. The device "meta" stands in for a GPU."""
    ours = getattr(GGUFOps, name)(*arguments)
    state = {"weight": packed_weight(tuple(getattr(HOST, name)(*arguments).weight.shape), "Q8_0")}
    if name != "Embedding":
        state["bias"] = torch.ones(ours.expected_shapes()["bias"])
    ours.load_state_dict(state)
    in_ram, x = [ours.weight, *([ours.bias] if "bias" in state else [])], x.to("meta")
    cast, uncast, sendings = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight, Sendings()
    borrowed, given_back = [], []

    def cast_bias_weight(layer, *arguments, offloadable=False, **options):
        sendings.asking = "host"
        weight, bias, token = cast(layer, *arguments, offloadable=offloadable, **options)
        sendings.asking = "layer"
        borrowed.append((layer, weight, token))
        return weight, bias, token

    def uncast_bias_weight(layer, weight, bias, token):
        given_back.append((layer, token))
        uncast(layer, weight, bias, token)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", uncast_bias_weight)
    with sendings:
        assert ours(x).is_meta

    ((layer, weight, token),) = borrowed
    assert layer is ours
    assert is_packed(weight)
    assert weight._qdata.is_meta
    assert (weight._qdata.dtype, weight._qdata.nbytes) == (torch.uint8, state["weight"]._qdata.nbytes)
    ((layer, returned),) = given_back
    assert layer is ours
    assert returned is token
    assert {asking for asking, _ in sendings.seen} == {"host"}
    assert {id(tensor) for _, tensor in sendings.seen} == {id(tensor) for tensor in in_ram}
    assert [id(parameter) for parameter in ours.parameters()] == [id(tensor) for tensor in in_ram]
