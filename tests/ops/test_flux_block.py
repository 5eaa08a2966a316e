"""ComfyUI's own Flux blocks with packed weights under torch.compile: no break, no second compilation, same answer."""

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.ldm.flux.math
from comfy.ldm.flux.layers import DoubleStreamBlock, EmbedND, SingleStreamBlock
from comfy.ldm.modules.attention import attention_pytorch
from gguf_native.ops.layers import GGUFOps
from gguf_native.ops.layout import is_packed, pack
from gguf_native.ops.quantize import quantize

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BACKEND = "inductor" if ON_GPU else "aot_eager"
HIDDEN, HEADS = 256, 2
LENGTHS = {"img": 64, "txt": 32}
COMPUTES = ["exact", pytest.param("fp8", marks=pytest.mark.cuda), pytest.param("int8", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch):
    """On a CPU the host takes another, which asks for the free memory: that breaks a graph."""
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)


def fill(block: torch.nn.Module, type_name: str, compute: str) -> torch.nn.Module:
    """Random packed weights, small random biases, norms of one; ready to compute as the loader leaves it."""
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, layer in block.named_modules():
        if isinstance(layer, GGUFOps.Linear):
            rows, columns = layer.shapes["weight"]
            blocks = quantize(torch.randn(rows, columns, generator=generator) * 0.02, type_name)
            state[f"{name}.weight"] = pack(blocks.flatten().to(DEVICE), type_name, (rows, columns), DTYPE)
            state[f"{name}.bias"] = (torch.randn(rows, generator=generator) * 0.01).to(DEVICE, DTYPE)
        elif isinstance(layer, GGUFOps.RMSNorm):
            state[f"{name}.weight"] = torch.ones(layer.weight.shape, dtype=DTYPE, device=DEVICE)
    block.load_state_dict(state)
    for layer in block.modules():
        if isinstance(layer, GGUFOps.Linear):
            assert is_packed(layer.weight)
            layer.compute = compute
            layer.prepare(DEVICE)
    return block.to(DEVICE)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


def positions(n: int) -> torch.Tensor:
    return EmbedND(HIDDEN // HEADS, 10000, [16, 56, 56])(torch.arange(3 * n, device=DEVICE).view(1, n, 3).float())


def double_block():
    block = DoubleStreamBlock(HIDDEN, HEADS, 4.0, qkv_bias=True, dtype=DTYPE, device=DEVICE, operations=GGUFOps)
    pe = positions(sum(LENGTHS.values()))
    return block, lambda seed: {
        "img": tensor(1, LENGTHS["img"], HIDDEN) * seed,
        "txt": tensor(1, LENGTHS["txt"], HIDDEN) * seed,
        "vec": tensor(1, HIDDEN),
        "pe": pe,
    }


def single_block():
    block = SingleStreamBlock(HIDDEN, HEADS, 4.0, dtype=DTYPE, device=DEVICE, operations=GGUFOps)
    pe = positions(LENGTHS["img"])
    return block, lambda seed: {"x": tensor(1, LENGTHS["img"], HIDDEN) * seed, "vec": tensor(1, HIDDEN), "pe": pe}


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("make", [double_block, single_block])
def test_compiled_without_break_or_second_compilation(make, compute):
    block, inputs = make()
    fill(block, "Q4_K", compute)
    with torch.no_grad():
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        for seed in (1, 2):
            # The blocks add to their inputs in place.
            actual, expected = compiled(**inputs(seed)), block(**inputs(seed))
            pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
            for one, other in pairs:
                # On a GPU the compiler rounds to bfloat16 at other places.
                assert (one - other).norm() <= other.norm() * (1e-2 if ON_GPU else 1e-5)
        assert counter.frame_count == 1
