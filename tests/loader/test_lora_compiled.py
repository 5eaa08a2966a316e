"""LoRAs under torch.compile: the latent of the plain model, and another strength compiles nothing anew."""

import pytest
import torch
from adapters import ADAPTERS, LOW_RANK, tensors
from sampling import relative_error, sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
from comfy_api.torch_helpers import set_torch_compile_wrapper
from gguf_native.loader.diffusion_model import load_diffusion_model

FLUX = "tiny_flux_256"
LAYER, SHAPE = "double_blocks.0.img_attn.qkv", (768, 256)


def with_loras(model, adapters: tuple[str, ...], strength: float = 1.0, seed: int = 0):
    """One LoRA for each adapter, all of them on the same weight."""
    for number, adapter in enumerate(adapters):
        named = {f"diffusion_model.{LAYER}.{end}": of for end, of in ADAPTERS[adapter](SHAPE).items()}
        lora = tensors(named, seed + 10 * number)
        model = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
    return model


def compiled(model, fullgraph: bool = True):
    """As by the host's node TorchCompileModel, but only traced, and one layer: attention for CPUs breaks graphs."""
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", keys=[f"diffusion_model.{LAYER}"], fullgraph=fullgraph)
    return model


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


LOW_RANK_CASES = [("lora",), ("alpha",), ("lora", "alpha", "lora")]
# The host's arithmetic of these asks how large a tensor is: torch.compile cannot look ahead over that.
BRANCHING = ("oft with alpha", "boft")
# Of a matrix, which this layer has, that is loha.
FOR_CONVOLUTIONS = ("loha tucker",)
OTHER_CASES = [(adapter,) for adapter in ADAPTERS if adapter not in LOW_RANK + BRANCHING + FOR_CONVOLUTIONS]
OTHER_CASES += [("lora", "loha"), ("lokr", "dora", "oft")]


@pytest.mark.parametrize("adapters", LOW_RANK_CASES + OTHER_CASES, ids=" and ".join)
def test_compiled_layer_with_loras(samples, host, adapters):
    torch._dynamo.reset()
    compilations = []
    with torch.inference_mode():
        base = load_diffusion_model(str(samples.gguf(FLUX, "Q8_0")))
        on, weaker = with_loras(base, adapters), with_loras(base, adapters, 0.5)
        for model in (on, weaker, with_loras(base, adapters, 0.5, seed=100), base):
            plain, before = sample(model, FLUX, steps=1), n_graphs()
            assert relative_error(sample(compiled(model), FLUX, steps=1), plain) < 1e-5
            compilations.append(n_graphs() - before)
    # Once with LoRAs and once without. Other adapters have their strength in the graph.
    assert (compilations[0], compilations[3]) == (1, 1)
    assert adapters not in LOW_RANK_CASES or compilations[1:3] == [0, 0]


@pytest.mark.parametrize("adapter", BRANCHING)
def test_compiled_layer_with_a_lora_that_breaks_the_graph(samples, host, adapter):
    torch._dynamo.reset()
    with torch.inference_mode():
        base = load_diffusion_model(str(samples.gguf(FLUX, "Q8_0")))
        for model, is_broken in ((base, False), (with_loras(base, (adapter,)), True)):
            plain, before = sample(model, FLUX, steps=1), n_graphs()
            assert relative_error(sample(compiled(model, fullgraph=False), FLUX, steps=1), plain) < 1e-5
            assert (n_graphs() > before + 1) == is_broken
