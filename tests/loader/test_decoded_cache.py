"""`quant_cache_size` in the host: the same latents, fewer decodings, and memory that the host can have back."""

import logging
from collections import Counter

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management as mm
from comfy.model_patcher import ModelPatcher
from gguf_native.loader import model_patcher
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.model_patcher import cache_of
from gguf_native.ops import matmul
from sampling import sample

MODEL = "tiny_flux_256"
LIMIT = 256 << 20
STEPS = 4


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """How often the blocks at each address were decoded, by format."""
    counter, decode = Counter(), matmul.decode

    def counted(blocks, type, change, out):
        counter[type, blocks.data_ptr()] += 1
        return decode(blocks, type, change, out)

    monkeypatch.setattr(matmul, "decode", counted)
    return counter


def load(samples, limit: int, type_name: str = "Q4_K") -> ModelPatcher:
    patcher = load_diffusion_model(str(samples.gguf(MODEL, type_name)))
    cache_of(patcher.model).limit = limit
    cache_of(patcher.model).reset()
    return patcher


def watch(monkeypatch) -> list[int]:
    """The bytes kept whenever sampling ends, before they are given back."""
    kept, reset = [], model_patcher.DecodedCache.reset

    def noted(cache):
        kept.append(cache.nbytes if hasattr(cache, "kept") else 0)
        reset(cache)

    monkeypatch.setattr(model_patcher.DecodedCache, "reset", noted)
    return kept


@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0", "IQ4_XS"])
def test_the_latent_is_the_same_and_decoding_ends_with_the_second_step(samples, decoded, monkeypatch, type_name):
    expected = sample(load(samples, 0, type_name), MODEL, STEPS)
    assert set(decoded.values()) == {STEPS}
    decoded.clear()
    patcher = load(samples, LIMIT, type_name)
    kept = watch(monkeypatch)
    assert torch.equal(sample(patcher, MODEL, STEPS), expected)
    assert set(decoded.values()) == {2}
    assert max(kept) > 0
    # The memory is back when sampling has ended, and is used again by the next.
    assert cache_of(patcher.model).nbytes == 0
    assert torch.equal(sample(patcher, MODEL, STEPS), expected)
    assert set(decoded.values()) == {4}


def test_a_part_of_the_weights(samples, decoded):
    expected = sample(load(samples, 0), MODEL, STEPS)
    decoded.clear()
    patcher = load(samples, 1 << 20)
    assert torch.equal(sample(patcher, MODEL, STEPS), expected)
    assert set(decoded.values()) == {2, STEPS}


def test_the_setting_is_the_limit_in_megabytes(samples):
    patcher = load_diffusion_model(str(samples.gguf(MODEL, "Q4_K")))
    assert cache_of(patcher.model).limit == LIMIT


def test_weights_that_come_anew_in_each_step_are_decoded_in_each(samples, caplog, decoded):
    """As where DynamicVRAM or a low-VRAM mode fetches them: each forward has other tensors."""
    patcher = load(samples, LIMIT)
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv
    borrow = layer.borrow

    def fetched(x):
        weight, bias, token = borrow(x)
        return weight.clone(), bias, token

    layer.borrow = fetched
    with caplog.at_level(logging.INFO, "gguf_native"):
        latent = sample(patcher, MODEL, 6)
    assert "weights stream" in caplog.text
    assert torch.equal(latent, sample(load(samples, 0), MODEL, 6))


def test_the_host_sees_it_and_takes_it_first(samples, monkeypatch):
    patcher = load(samples, LIMIT)
    sizes, freed = [], []
    predict = patcher.model.apply_model

    def between_steps(*arguments, **options):
        result = predict(*arguments, **options)
        cache = cache_of(patcher.model)
        if cache.nbytes and not freed:
            kept, packed = cache.nbytes, patcher.loaded_size() - cache.nbytes
            sizes.extend((kept, packed))
            (loaded,) = [one for one in mm.current_loaded_models if one.model and one.model.is_clone(patcher)]
            # One byte is asked for; the decoded weights are enough, the packed ones stay.
            assert not loaded.model_unload(1)
            freed.append(cache.nbytes)
            assert patcher.loaded_size() == packed
        return result

    monkeypatch.setattr(patcher.model, "apply_model", between_steps)
    latent = sample(patcher, MODEL, STEPS)
    assert sizes[0] > 0
    assert sizes[1] == patcher.model_size()
    assert freed == [0]
    assert torch.equal(latent, sample(load(samples, 0), MODEL, STEPS))


def test_no_room_nothing_kept_and_said(samples, monkeypatch, caplog, decoded):
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 1 << 60)
    patcher = load(samples, LIMIT)
    with caplog.at_level(logging.INFO, "gguf_native"):
        sample(patcher, MODEL, STEPS)
    assert set(decoded.values()) == {STEPS}
    assert "0 of" in caplog.text
    assert "0 MB being free for it" in caplog.text


def test_dynamic_vram(samples, decoded, dynamic_vram_on_cpu, monkeypatch):
    expected = sample(load(samples, 0), MODEL, STEPS)
    patcher = load(samples, LIMIT)
    assert patcher.is_dynamic()
    predict, counted = patcher.model.apply_model, []

    def between_steps(*arguments, **options):
        result = predict(*arguments, **options)
        kept = cache_of(patcher.model).nbytes
        counted.append((kept, patcher.loaded_size() - kept))
        return result

    monkeypatch.setattr(patcher.model, "apply_model", between_steps)
    assert torch.equal(sample(patcher, MODEL, STEPS), expected)
    # The host sees what is kept on top of the weights that it has loaded.
    (kept, loaded) = counted[-1]
    assert kept > 0 and [size for _, size in counted] == [loaded] * STEPS
