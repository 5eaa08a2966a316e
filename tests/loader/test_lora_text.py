"""LoRAs on text encoders: what they make of a prompt is what the host's do with the LoRA on the decoded weights."""

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.sd
from adapters import ADAPTERS, KOHYA, LOW_RANK, PEFT, pairs, tensors
from gguf_native.loader.lora import apply_lora
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.loader.text_encoder import load_text_encoder
from lora_models import BOUND, FLUX, loaded_in_part, packed
from safetensors.torch import load_file
from sampling import relative_error

TEXT = (("tiny_t5", "Q4_K", "llama.cpp"), ("tiny_clip_l", "Q8_0", "comfyui"))
TEXT_LAYERS = {
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (256, 256),
    "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo": (256, 512),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (512, 256),
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding": (49408, 256),
}
# As the tools that train Flux name the layers of CLIP-L and of T5.
TEXT_STYLES = {
    "Kohya, OneTrainer": (
        KOHYA,
        {
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (256, 256),
            "lora_te2_encoder_block_0_layer_0_SelfAttention_v": (256, 256),
            "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0": (512, 256),
        },
    ),
    "diffusers": (PEFT, {"text_encoder.text_model.encoder.layers.1.self_attn.out_proj": (256, 256)}),
}
TEXT_CASES = ["lora", "dora", "loha", "lokr", "glora", "oft", "boft", "diff", "set", *TEXT_STYLES]


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


def text_file(adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file for the encoders of TEXT."""
    if adapter in TEXT_STYLES:
        ends, stems = TEXT_STYLES[adapter]
        return tensors(pairs(*ends, stems))
    named = {
        f"{layer}.{end}": of for layer, shape in TEXT_LAYERS.items() for end, of in ADAPTERS[adapter](shape).items()
    }
    return tensors(named)


def with_text_lora(clip: comfy.sd.CLIP, lora: dict, strength: float = 1.0) -> comfy.sd.CLIP:
    return comfy.sd.load_lora_for_models(None, clip, dict(lora), 0, strength)[1]


def encoding(clip: comfy.sd.CLIP) -> torch.Tensor:
    """What the text encoders make of a prompt, loaded as they are now."""
    tokens = clip.tokenize("a small test of a prompt")
    return torch.cat([part.flatten() for part in clip.cond_stage_model.encode_token_weights(tokens)[:2]])


@pytest.fixture(scope="module")
def decoded_clip(samples) -> comfy.sd.CLIP:
    """What ComfyUI's own loader makes of the encoders' decoded weights."""
    files = [str(samples.decoded(name, kind, torch.float32)) for name, kind, _ in TEXT]
    options = {"t5xxl_model_config": {**samples.TINY_T5}, "model_config": {**samples.TINY_CLIP_L}}
    return comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType.FLUX, model_options=options | {"dtype": torch.float32})


@pytest.mark.parametrize("adapter", TEXT_CASES)
@pytest.mark.parametrize("mode", ["complete", "in part", "dynamic"])
def test_lora_on_text_encoders(samples, decoded_clip, request, mode, adapter):
    expected = encoding(loaded_clip(with_text_lora(decoded_clip, text_file(adapter))))
    without = encoding(loaded_clip(decoded_clip))
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    load = loaded_clip_in_part if mode == "in part" else loaded_clip
    base = load_text_encoder([str(samples.gguf(*file)) for file in TEXT], "flux")
    assert base.is_dynamic() == (mode == "dynamic")
    n_packed = len(packed_layers(base.cond_stage_model))
    lora = load(with_text_lora(base, text_file(adapter)))
    on = encoding(lora)
    assert relative_error(on, expected) < BOUND
    assert relative_error(expected, without) > 5 * BOUND
    layers = packed_layers(base.cond_stage_model)
    assert lora.patcher.patches.keys() <= layers.keys()
    for key in lora.patcher.patches:
        assert (layers[key].side_path.low_rank is not None) == (adapter in (*LOW_RANK, *TEXT_STYLES))
    assert torch.equal(encoding(load(base)), without)
    assert len(packed_layers(base.cond_stage_model)) == n_packed


def loaded_clip(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    clip.load_model()
    return clip


def loaded_clip_in_part(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    loaded_in_part(clip.patcher)
    return clip


def test_node_puts_a_lora_on_a_text_encoder(samples):
    lora = samples.sample("tiny_clip_l_lora")
    clip = load_text_encoder([str(samples.gguf("tiny_clip_l", "Q8_0"))], "stable_diffusion")
    by_host = encoding(loaded_clip(with_text_lora(clip, load_file(lora), -0.5)))
    by_loader = apply_lora(packed(samples, FLUX), clip, str(lora), 1.0, -0.5)[1]
    assert torch.equal(encoding(loaded_clip(by_loader)), by_host)
    assert relative_error(encoding(loaded_clip(clip)), by_host) > 5 * BOUND
