"""Another strength, another LoRA, none: side paths change, and nothing is loaded, moved or read again."""

import dataclasses
import logging

import pytest
import torch
from adapters import ADAPTERS, tensors
from sampling import relative_error, sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_patcher
import comfy.sd
from gguf_native.config import settings
from gguf_native.loader import model_patcher
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.packed_layers import packed_layers

FLUX = "tiny_flux_256"
LAYERS = {"double_blocks.0.img_attn.qkv": (768, 256), "single_blocks.1.linear1": (1792, 256)}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture
def base(samples) -> comfy.model_patcher.ModelPatcher:
    return load_diffusion_model(str(samples.gguf(FLUX, "Q4_K")))


def lora_file(adapter: str = "alpha", seed: int = 0) -> dict[str, torch.Tensor]:
    named = {
        f"diffusion_model.{layer}.{end}": of
        for layer, shape in LAYERS.items()
        for end, of in ADAPTERS[adapter](shape).items()
    }
    return tensors(named, seed)


def with_lora(model, lora: dict, strength: float = 1.0):
    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


def held(model: torch.nn.Module) -> dict[str, tuple]:
    """What must stay as it is: which tensors the layers hold, and where their blocks lie."""
    return {key: (id(layer.weight), layer.weight._qdata.data_ptr()) for key, layer in packed_layers(model).items()}


def factors(model: torch.nn.Module, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    return packed_layers(model)[f"diffusion_model.{layer}.weight"].side_path.low_rank


@pytest.fixture
def moves(monkeypatch) -> list[str]:
    """Names of what the host has done to load, unload or move a model, as it does it."""
    done = []

    def noted(owner, name):
        original = getattr(owner, name)

        def wrapper(self, *args, **kwargs):
            if not isinstance(self, torch.nn.Module) or hasattr(self, "diffusion_model"):
                done.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    noted(comfy.model_patcher.ModelPatcher, "load")
    noted(torch.nn.Module, "to")
    return done


def test_without_dynamic_vram_the_host_neither_loads_nor_moves_the_model(base, moves):
    lora, other = lora_file(), lora_file(seed=100)
    sample(with_lora(base, lora), FLUX, steps=1)
    assert "load" in moves and "to" in moves
    before = held(base.model)
    moves.clear()
    latents = [
        sample(model, FLUX, steps=1)
        for model in (with_lora(base, lora, 0.5), with_lora(base, other), with_lora(with_lora(base, lora), other), base)
    ]
    assert moves == []
    assert held(base.model) == before
    # As from a model that never had another LoRA.
    base.detach()
    assert torch.equal(sample(base, FLUX, steps=1), latents[3])
    for latent, model in ((latents[0], with_lora(base, lora, 0.5)), (latents[1], with_lora(base, other))):
        base.detach()
        assert torch.equal(sample(model, FLUX, steps=1), latent)
        assert relative_error(latent, latents[3]) > 1e-3


def test_so_it_is_when_the_model_is_loaded_in_part(base, moves):
    lora = lora_file()
    patched = with_lora(base, lora)
    patched.patch_model(CPU, patched.model_size() * 0.95)
    loaded = loaded_now(patched)
    assert 0 < len(loaded) < len(packed_layers(base.model))
    before = held(base.model)
    moves.clear()
    weaker = with_lora(base, lora, 0.5)
    weaker.partially_load(CPU, 1)
    assert "to" not in moves
    assert held(base.model) == before
    assert torch.equal(factors(base.model, "single_blocks.1.linear1").up, 0.5 * 0.5 * up_of(lora))
    assert loaded_now(base) >= loaded


def loaded_now(patcher) -> set[str]:
    """The packed weights that have found room on the device."""
    layers = packed_layers(patcher.model).items()
    return {key for key, layer in layers if getattr(layer, "comfy_patched_weights", False)}


def up_of(lora: dict) -> torch.Tensor:
    """alpha / rank of these files is 0.5."""
    return lora["diffusion_model.single_blocks.1.linear1.lora_up.weight"]


@pytest.mark.usefixtures("dynamic_vram_on_cpu")
def test_under_dynamic_vram_the_slots_of_packed_weights_stay_filled(base):
    """The host marks every slot as empty when patches differ; a CPU has no slots, so the marks stand alone here."""
    lora = lora_file()
    sample(with_lora(base, lora), FLUX, steps=1)
    large = [layer for layer in packed_layers(base.model).values() if layer.weight._qdata.nbytes > 2**16]
    biased = base.model.diffusion_model.double_blocks[1].img_attn.qkv
    assert len(large) > 10 and biased in large
    with_bias = with_lora(base, lora | {"diffusion_model.double_blocks.1.img_attn.qkv.diff_b": torch.ones(768)})
    expected = [
        (with_lora(base, lora, 0.5), True),
        (base, True),
        # Its bias is patched in the slot: filled anew with the patch, and anew without it.
        (with_bias, False),
        (with_lora(base, lora), False),
        (base, True),
    ]
    for model, bias_stays in expected:
        for layer in large:
            layer._v, layer._v_signature = object(), "filled"
        model.partially_load(CPU)
        stayed = {layer for layer in large if layer._v_signature == "filled"}
        assert stayed == (set(large) if bias_stays else set(large) - {biased})
    for layer in large:
        del layer._v, layer._v_signature


def parts_sent(sent: list[torch.Tensor], lora: dict) -> set[str]:
    names = [key for key, tensor in lora.items() if any(tensor is other for other in sent)]
    return {"up" if "lora_up" in name else "down" for name in names}


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_a_change_leaves_is_not_sent_again(samples, request, dynamic, sent):
    if dynamic:
        request.getfixturevalue("dynamic_vram_on_cpu")
    base = load_diffusion_model(str(samples.gguf(FLUX, "Q4_K")))
    lora, other = lora_file(), lora_file(seed=100)
    weaker = with_lora(base, lora, 0.5)
    both, lora_stronger = with_lora(weaker, other, -1.0), with_lora(with_lora(base, lora, 2.0), other, -1.0)
    # Which factors of `lora` and of `other` each change sends.
    for model, of_lora, of_other in (
        (with_lora(base, lora), {"up", "down"}, set()),
        (weaker, {"up"}, set()),
        (both, set(), {"up", "down"}),
        (lora_stronger, {"up"}, set()),
        (with_lora(base, other, -1.0), set(), set()),
        (with_lora(base, other), set(), {"up"}),
    ):
        sent.clear()
        model.partially_load(CPU)
        assert [parts_sent(sent, file) for file in (lora, other)] == [of_lora, of_other]
    for layer in LAYERS:
        down, up = factors(base.model, layer)
        assert torch.equal(down, other[f"diffusion_model.{layer}.lora_down.weight"])
        assert torch.equal(up, 0.5 * other[f"diffusion_model.{layer}.lora_up.weight"])
    base.partially_load(CPU)
    assert not any(layer.side_path for layer in packed_layers(base.model).values())


def test_only_the_layers_of_a_lora_get_a_side_path(base):
    one = {key: tensor for key, tensor in lora_file().items() if "linear1" in key}
    with_lora(base, lora_file()).partially_load(CPU)
    kept = packed_layers(base.model)["diffusion_model.double_blocks.0.img_attn.qkv.weight"].side_path
    more = with_lora(base, lora_file())
    more.partially_load(CPU)
    # The same tensors of the same strength, from another call of the host's conversion.
    again = packed_layers(base.model)["diffusion_model.double_blocks.0.img_attn.qkv.weight"].side_path
    assert torch.equal(again.low_rank.up, kept.low_rank.up)
    with_lora(base, one).partially_load(CPU)
    assert [key for key, layer in packed_layers(base.model).items() if layer.side_path] == [
        "diffusion_model.single_blocks.1.linear1.weight"
    ]


def test_a_lora_that_changes_plain_tensors_is_loaded_by_the_host_and_said_once(base, moves, caplog):
    model_patcher.log_loading_anew.cache_clear()
    lora = lora_file("bias")
    off = sample(base, FLUX, steps=1)
    with caplog.at_level(logging.INFO, logger="gguf_native"):
        strong = sample(with_lora(base, lora), FLUX, steps=1)
        moves.clear()
        weak = sample(with_lora(base, lora, 0.1), FLUX, steps=1)
        assert torch.equal(sample(base, FLUX, steps=1), off)
    assert moves.count("load") == 2
    assert relative_error(weak, off) < relative_error(strong, off)
    assert sum("loads the whole model anew" in message for message in caplog.messages) == 1


def test_weight_wrappers_and_compute_dtypes_still_reach_the_host(base):
    """Other reasons for which the host loads a model anew."""
    off = sample(base, FLUX, steps=1)
    wrapped = base.clone()
    wrapped.add_weight_wrapper("diffusion_model.single_blocks.1.linear1.weight", lambda weight: weight * 0)
    assert relative_error(sample(wrapped, FLUX, steps=1), off) > 1e-3
    assert torch.equal(sample(base, FLUX, steps=1), off)
    half = base.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    assert relative_error(sample(half, FLUX, steps=1), off) > 1e-3
    assert torch.equal(sample(base, FLUX, steps=1), off)


@pytest.fixture
def three_allowed(monkeypatch):
    monkeypatch.setattr(model_patcher, "told", set())
    monkeypatch.setattr(model_patcher, "settings", lambda: dataclasses.replace(settings(), max_loras=3))


@pytest.mark.usefixtures("three_allowed")
def test_more_than_max_loras_are_applied_and_their_cost_is_said_once(base, caplog):
    model, expected = base, torch.zeros(())
    with caplog.at_level(logging.WARNING, logger="gguf_native"):
        for number in range(5):
            lora = lora_file(seed=100 * number)
            model = with_lora(model, lora)
            expected = expected + 0.5 * up_of(lora) @ lora["diffusion_model.single_blocks.1.linear1.lora_down.weight"]
            model.partially_load(CPU)
    down, up = factors(base.model, "single_blocks.1.linear1")
    assert down.shape[0] == 5 * 4
    torch.testing.assert_close(up @ down, expected, rtol=1e-4, atol=1e-5)
    (message,) = caplog.messages
    values = 4 * 4 * sum(out + into for out, into in LAYERS.values())
    share = 100 * values / sum(layer.weight.numel() for layer in packed_layers(base.model).values())
    assert "4 LoRAs on one model, more than max_loras, which is 3" in message
    assert f"{share:.1f} % more multiplications" in message
    assert f"{values * 4 / 2**20:.1f} MB" in message


@pytest.mark.usefixtures("three_allowed")
def test_a_lora_in_slices_is_one(base, caplog):
    stems = {f"transformer.transformer_blocks.0.attn.to_{part}": (256, 256) for part in "qkv"}
    slices = {f"{stem}.lora_{end}.weight": (256, 4) if end == "B" else (4, 256) for stem in stems for end in "AB"}
    model = base
    for number in range(3):
        model = with_lora(model, tensors(slices, 100 * number))
    with caplog.at_level(logging.WARNING, logger="gguf_native"):
        model.partially_load(CPU)
    assert factors(base.model, "double_blocks.0.img_attn.qkv").down.shape[0] == 9 * 4
    assert caplog.messages == []
