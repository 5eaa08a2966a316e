"""LoRAs under torch.compile: the latent of the plain model, and another strength compiles nothing anew."""

import pytest
import torch
from adapters import ADAPTERS, tensors
from sampling import relative_error, sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
from comfy_api.torch_helpers import set_torch_compile_wrapper
from gguf_native.loader.diffusion_model import load_diffusion_model

FLUX = "tiny_flux_256"
LAYER, SHAPE = "double_blocks.0.img_attn.qkv", (768, 256)


def with_lora(model, adapter: str, strength: float = 1.0, seed: int = 0):
    named = {f"diffusion_model.{LAYER}.{end}": of for end, of in ADAPTERS[adapter](SHAPE).items()}
    return comfy.sd.load_lora_for_models(model, None, tensors(named, seed), strength, 0)[0]


def compiled(model):
    """As by the host's node TorchCompileModel, but only traced, and one layer: attention for CPUs breaks graphs."""
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", keys=[f"diffusion_model.{LAYER}"], fullgraph=True)
    return model


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("adapter", ["lora", "loha"])
def test_compiled_layer_with_loras(samples, host, adapter):
    torch._dynamo.reset()
    compilations = []
    with torch.inference_mode():
        base = load_diffusion_model(str(samples.gguf(FLUX, "Q8_0")))
        on, weaker = with_lora(base, adapter), with_lora(base, adapter, 0.5)
        for model in (on, weaker, with_lora(base, adapter, 0.5, seed=100), base):
            plain, before = sample(model, FLUX, steps=1), n_graphs()
            assert relative_error(sample(compiled(model), FLUX, steps=1), plain) < 1e-5
            compilations.append(n_graphs() - before)
    # Once with a LoRA and once without. Other adapters have their strength in the graph.
    assert (compilations[0], compilations[3]) == (1, 1)
    assert adapter != "lora" or compilations[1:3] == [0, 0]
