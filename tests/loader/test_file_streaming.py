"""A model's file pinned for its streamer, and given back when the host asks."""

import gc
import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from adapters import ADAPTERS, tensors
from sampling import sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from gguf_native.loader import file_streaming, model_patcher
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.file_streaming import send_once, stream_from_files, streamer_of, unpin_parts
from gguf_native.loader.packed_layers import cache_of, packed_layers
from gguf_native.loader.residency import ATTACHMENT
from gguf_native.ops import streaming
from gguf_native.ops.layers import GGUFOps
from gguf_native.ops.pinned_part import part_of
from pinned_machine import GPU, PINNED_BEFORE, Part, pinning_machine

FLUX = "tiny_flux_256"
LAYER = "double_blocks.0.img_attn.qkv"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def system(host, monkeypatch):
    yield from pinning_machine(monkeypatch)


class Stream:
    """In place of torch.cuda.Stream, which needs a GPU."""

    def __init__(self, device):
        self.device = device


@pytest.fixture(scope="module")
def path(samples):
    """Made before DynamicVRAM is on, under which the host's models have no weights of their own."""
    return samples.gguf(FLUX, "Q4_K")


@pytest.fixture
def base(path, dynamic_vram_on_cpu, monkeypatch, system):
    """A model under DynamicVRAM, with slots in place of GPU memory and parts in place of pinned ones."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    patcher = load_diffusion_model(str(path))
    layers = packed_layers(patcher.model).values()
    # A small file is one part.
    (whole,) = {part_of(layer.weight._qdata) for layer in layers}
    assert 0.9 * path.stat().st_size < whole.nbytes <= path.stat().st_size
    part = Part(500, system.done)
    for layer in layers:
        layer._v_signature = None
        layer.weight._qdata.untyped_storage()._gguf_native_part = part
        if layer.weight._qdata.nbytes > 2**14:
            layer._v = None
    yield patcher
    # The model may go when the stand-ins are gone already.
    part.is_asked_for = False
    for layer in layers:
        layer.streamer = None
        layer.__dict__.pop("_v", None)


def test_what_loras_have_pinned_can_be_spared(base, system, monkeypatch):
    of_lora = Part(30, system.done)
    of_lora.pin(GPU)
    monkeypatch.setattr(file_streaming, "parts_of_loras", {of_lora})
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda nbytes: not of_lora.is_asked_for)
    stream_from_files(base.model, GPU)
    assert streamer_of(base.model) is not None and not of_lora.is_asked_for


def test_layers_with_a_slot_share_a_streamer(base):
    stream_from_files(base.model, GPU)
    streamer, layers = streamer_of(base.model), packed_layers(base.model).values()
    with_slot = [layer for layer in layers if hasattr(layer, "_v")]
    assert 0 < len(with_slot) < len(layers)
    assert {layer for layer in layers if layer.streamer is not None} == set(with_slot)
    assert {layer.streamer for layer in with_slot} == {streamer}
    assert streamer.parts == [part_of(with_slot[0].weight._qdata)] and streamer.parts[0].is_asked_for
    assert streamer.ring_bytes >= 2 * max(layer.weight._qdata.nbytes for layer in with_slot)
    # The next load goes on with it.
    streamer.after["layer"] = "next"
    streamer.works = True
    stream_from_files(base.model, GPU)
    assert streamer_of(base.model) is streamer
    assert streamer.after and streamer.works is None


def test_the_cache_of_decoded_weights_is_told_that_weights_stream(base):
    cache = cache_of(base.model)
    cache.limit = 1 << 20
    cache.reset()
    stream_from_files(base.model, GPU)
    assert not cache.is_settled
    streamer_of(base.model).begins()
    assert cache.is_settled


def test_the_ring_is_not_sized_by_a_table_of_words(base, monkeypatch):
    with_slot = [layer for layer in packed_layers(base.model).values() if hasattr(layer, "_v")]
    largest = max(with_slot, key=lambda layer: layer.weight._qdata.nbytes)
    monkeypatch.setattr(streaming, "LOOK_AHEAD", 0)
    monkeypatch.setattr(largest, "__class__", GGUFOps.Embedding)
    stream_from_files(base.model, GPU)
    others = [layer.weight._qdata.nbytes for layer in with_slot if isinstance(layer, GGUFOps.Linear)]
    assert streamer_of(base.model).ring_bytes == 2 * max(others)


def test_another_gpu_gets_another_streamer(base):
    stream_from_files(base.model, GPU)
    first = streamer_of(base.model)
    stream_from_files(base.model, torch.device("cuda", 1))
    assert streamer_of(base.model) is not first
    assert streamer_of(base.model).parts == first.parts


def test_without_pinned_parts_there_is_no_streamer(base, system):
    system.room.budget = False
    stream_from_files(base.model, GPU)
    assert streamer_of(base.model) is None
    system.room.budget = True
    stream_from_files(base.model, CPU)
    assert streamer_of(base.model) is None
    stream_from_files(base.model, GPU)
    assert streamer_of(base.model) is not None


def test_a_patched_bias_and_a_lost_slot_are_left_to_the_host(base):
    stream_from_files(base.model, GPU)
    one, other = base.model.diffusion_model.double_blocks[0].img_attn.qkv, base.model.diffusion_model.img_in
    assert one.streamer is not None
    one.bias_lowvram_function = object()
    other.__dict__.pop("_v", None)
    stream_from_files(base.model, GPU)
    assert one.streamer is other.streamer is None
    # A LoRA that enlarges a weight makes it dense.
    third = base.model.diffusion_model.double_blocks[0].txt_attn.qkv
    packed, third.weight = third.weight, torch.nn.Parameter(torch.zeros(third.weight.shape), requires_grad=False)
    assert third.streamer is not None
    stream_from_files(base.model, GPU)
    assert third.streamer is None
    third.weight = packed
    one.bias_lowvram_function = None
    stream_from_files(base.model, GPU)
    assert one.streamer is not None


def test_unpinned_after_the_last_copy_and_counted_no_more(base, system):
    assert unpin_parts(base.model) == 0
    stream_from_files(base.model, GPU)
    streamer = streamer_of(base.model)
    streamer.works = True
    system.done.clear()
    assert unpin_parts(base.model) == 500
    assert system.done == [("unpin", 500)]
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    # Whoever borrows next asks again.
    assert streamer.works is None and not streamer.sent
    assert unpin_parts(base.model) == 0
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    stream_from_files(base.model, GPU)
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 500


def test_the_part_of_what_a_patch_makes_dense_is_unpinned_by_the_same_load(base, system):
    layers = [layer for layer in packed_layers(base.model).values() if hasattr(layer, "_v")]
    packed, alone = layers[0].weight, Part(70, system.done)
    packed._qdata.untyped_storage()._gguf_native_part = alone
    stream_from_files(base.model, GPU)
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 570
    layers[0].weight = torch.nn.Parameter(torch.zeros(packed.shape), requires_grad=False)
    stream_from_files(base.model, GPU)
    assert not alone.is_asked_for and mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 500
    layers[0].weight = packed
    stream_from_files(base.model, GPU)
    assert alone.is_asked_for
    assert unpin_parts(base.model) == 570
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE


def test_what_was_refused_is_not_freed(base, monkeypatch, caplog):
    """The host would take it for memory that it has now, and the log for a reason that is none."""
    stream_from_files(base.model, GPU)
    next(iter(streamer_of(base.model).parts)).is_refused = True
    file_streaming.log_unpinned_while_sampling.cache_clear()
    monkeypatch.setattr(base.model, "current_patcher", base)
    with caplog.at_level(logging.INFO, "gguf_native"):
        assert unpin_parts(base.model) == 0
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    assert caplog.messages == []


def test_a_later_load_may_stream_from_more(base, system):
    """A split file of which the first load paged in one part, or a larger layer that a LoRA had to itself."""
    layers = [layer for layer in packed_layers(base.model).values() if hasattr(layer, "_v")]
    largest = max(layers, key=lambda layer: layer.weight._qdata.nbytes)
    part = largest.weight._qdata.untyped_storage()._gguf_native_part = Part(70, system.done)
    largest.bias_lowvram_function = object()
    stream_from_files(base.model, GPU)
    streamer = streamer_of(base.model)
    assert part not in streamer.parts and not part.is_asked_for
    largest.bias_lowvram_function = None
    stream_from_files(base.model, GPU)
    assert streamer_of(base.model) is streamer
    assert part in streamer.parts and part.is_asked_for
    assert streamer.ring_bytes >= 2 * largest.weight._qdata.nbytes
    largest.weight._qdata.untyped_storage()._gguf_native_part = next(
        other for other in streamer.parts if other is not part
    )


@pytest.mark.parametrize("works", [True, False])
def test_the_host_sends_no_blocks_ahead_of_a_streamer(base, works):
    """As it would for LTX-2, over the same bus and with a copy in RAM; it may where the streamer does not work."""
    seen = []

    def forward(x, transformer_options):
        seen.append(transformer_options["prefetch_dynamic_vbars"])

    base.load_device = GPU
    send_once(base)
    base.load_device = CPU
    (wrapper,) = base.get_wrappers(WrappersMP.DIFFUSION_MODEL, ATTACHMENT)
    run = WrapperExecutor.new_class_executor(forward, base.model.diffusion_model, [wrapper]).execute
    options = {"cond_or_uncond": [0], "prefetch_dynamic_vbars": True}
    run(None, transformer_options=dict(options))
    stream_from_files(base.model, GPU)
    streamer_of(base.model).parts[0].is_refused = not works
    run(None, transformer_options=dict(options))
    run(None, transformer_options=options | {"prefetch_dynamic_vbars": False})
    assert seen == [True, not works, False]
    # Who asks for it is the host, of every model under DynamicVRAM.
    assert 'transformer_options["prefetch_dynamic_vbars"] = (' in inspect.getsource(
        comfy.model_base.BaseModel._apply_model
    )


@pytest.mark.parametrize("ask", ["partially_unload_ram", "unregister_inactive_pins"])
def test_the_host_has_the_pages_back_when_it_asks_for_weights(base, monkeypatch, ask):
    rest = []
    host = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(host, ask, lambda self, nbytes, subsets: rest.append((nbytes, tuple(subsets))) or 30)
    stream_from_files(base.model, GPU)
    free = getattr(base, ask)
    # What ends with each prompt: the patches alone.
    assert free(1e30, subsets=["patches", "patches-loaded"]) == 30
    assert free(1e30, ["weights-loaded"]) == 30
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 500
    rest.clear()
    assert free(200, subsets=["weights", "patches"]) == 500
    assert rest == []
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    stream_from_files(base.model, GPU)
    assert free(700) == 530
    assert rest == [(200, model_patcher.EVERY_PIN)]


def test_a_model_that_goes_takes_its_pages_along(base, system):
    stream_from_files(base.model, GPU)
    clone = base.clone()
    del clone
    gc.collect()
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 500
    base.__del__()
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE


@pytest.mark.parametrize(
    "leave",
    [lambda patcher: patcher.cleanup(), lambda patcher: patcher.partially_unload(CPU, 1)],
    ids=["after sampling", "when memory is asked for"],
)
def test_the_ring_is_given_back(base, monkeypatch, leave):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "partially_unload", lambda *arguments: 0)
    stream_from_files(base.model, GPU)
    streamer, resets = streamer_of(base.model), []
    monkeypatch.setattr(streamer, "reset", lambda: resets.append(None))
    leave(base)
    assert resets == [None]


@pytest.mark.parametrize("used", [False, True])
def test_the_ring_is_given_back_when_another_model_loads(base, monkeypatch, path, used):
    """Of a text encoder, say, which nobody tells that it is done; not if both are wanted at a time."""
    loaded = SimpleNamespace(model=base, currently_used=used, device=GPU)
    monkeypatch.setattr(mm, "current_loaded_models", [loaded])
    other = load_diffusion_model(str(path))
    stream_from_files(base.model, GPU)
    resets = []
    monkeypatch.setattr(streamer_of(base.model), "reset", lambda: resets.append(None))
    # Each load begins anew by itself.
    monkeypatch.setattr(model_patcher, "stream_from_files", lambda *_: None)
    base.clone().partially_load(CPU)
    assert resets == []
    other.partially_load(CPU)
    assert resets == [None] * (not used)


def test_each_load_asks_for_the_file_once_patches_have_found_their_place(base, monkeypatch):
    seen = []

    def noted(model, device):
        qkv = model.diffusion_model.double_blocks[0].img_attn.qkv
        seen.append((device, qkv.side_path is not None, qkv.bias_lowvram_function is not None))

    monkeypatch.setattr(model_patcher, "stream_from_files", noted)
    for layer in packed_layers(base.model).values():
        layer.__dict__.pop("_v", None)
    with_lora(base).partially_load(CPU)
    base.partially_load(CPU)
    assert seen == [(CPU, True, True), (CPU, False, False)]


def with_lora(model):
    """One that patches a bias too."""
    named = {f"diffusion_model.{LAYER}.{end}": of for end, of in ADAPTERS["bias"]((768, 256)).items()}
    return comfy.sd.load_lora_for_models(model, None, tensors(named, 0), 1.0, 0)[0]


def test_a_load_by_the_host_and_a_sampling_with_a_lora(base, path):
    """All of it in the host's own order, on the CPU, where nothing is borrowed from a streamer."""
    for layer in packed_layers(base.model).values():
        layer.__dict__.pop("_v", None)
    expected = sample(load_diffusion_model(str(path)), FLUX, 1)
    sample(with_lora(base), FLUX, 1)
    assert torch.equal(sample(base, FLUX, 1), expected)
    assert streamer_of(base.model) is None
