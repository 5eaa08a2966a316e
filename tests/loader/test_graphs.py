"""`enable_cuda_graph` in the host: when a forward may be recorded, and what has recordings forgotten."""

import ctypes
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from adapters import ADAPTERS, tensors
from sampling import sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.cli_args
import comfy.hooks
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from gguf_native.config import settings
from gguf_native.loader import graphs
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.graphs import graphs_of, held_weights, record_forwards, replaying, why_not
from gguf_native.loader.packed_layers import packed_layers
from gguf_native.loader.residency import ATTACHMENT
from gguf_native.ops.graph import ForwardGraphs
from gguf_native.ops.matmul import Workspace
from gguf_native.quantizer.collect import Seen, watching

FLUX = "tiny_flux_256"
LAYER, SHAPE = "double_blocks.0.img_attn.qkv", (768, 256)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPTIONS = {"cond_or_uncond": [0], "wrappers": {WrappersMP.DIFFUSION_MODEL: {ATTACHMENT: [replaying]}}}


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def path(samples) -> str:
    """Made before DynamicVRAM is on, under which the host's models have no weights of their own."""
    return str(samples.gguf(FLUX, "Q4_K"))


def record(patcher) -> ForwardGraphs | None:
    """What loading does where the model is for a GPU."""
    patcher.load_device = GPU
    record_forwards(patcher, Workspace())
    patcher.load_device = CPU
    return graphs_of(patcher.model.diffusion_model)


@pytest.fixture
def patcher(path):
    return load_diffusion_model(path)


def with_lora(model, adapter: str = "lora", strength: float = 1.0):
    named = {f"diffusion_model.{LAYER}.{end}": of for end, of in ADAPTERS[adapter](SHAPE).items()}
    return comfy.sd.load_lora_for_models(model, None, tensors(named, 0), strength, 0)[0]


def test_only_for_a_gpu_of_nvidia_and_where_the_setting_is_on(patcher, monkeypatch):
    assert graphs_of(patcher.model.diffusion_model) is None
    assert not patcher.get_wrappers(WrappersMP.DIFFUSION_MODEL, ATTACHMENT)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert record(patcher) is None
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "settings", lambda: dataclasses.replace(settings(), enable_cuda_graph=False))
        assert record(patcher) is None
    assert record(patcher) is not None
    # Every clone goes through the same.
    assert patcher.clone().get_wrappers(WrappersMP.DIFFUSION_MODEL, ATTACHMENT) == [replaying]
    assert graphs_of(patcher.clone().model.diffusion_model) is graphs_of(patcher.model.diffusion_model)


def test_on_a_cpu_the_forward_runs_as_ever(path, patcher):
    expected = sample(load_diffusion_model(path), FLUX, 4)
    asked = spied(record(patcher))
    assert torch.equal(sample(patcher, FLUX, 4), expected)
    assert len(asked) == 4
    assert not graphs_of(patcher.model.diffusion_model).recordings


def spied(forward_graphs: ForwardGraphs) -> list[tuple]:
    """(args, kwargs) of each forward that the graphs are asked for."""
    asked, forward = [], forward_graphs.forward

    def noted(run, args, kwargs, options):
        asked.append((args, dict(kwargs)))
        return forward(run, args, kwargs, options)

    forward_graphs.forward = noted
    return asked


class Graphs:
    """In place of ForwardGraphs: notes what it is given and runs it."""

    def forward(self, run, args, kwargs, options):
        self.args, self.options = args, options
        self.kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        return run(*args, **kwargs)


class Wrapped(torch.nn.Module):
    """A model that calls its forward as the host's models do."""

    def __init__(self):
        super().__init__()
        self.gguf_native_graphs = Graphs()

    def forward(self, x, transformer_options):
        wrappers = [replaying]
        return WrapperExecutor.new_class_executor(self.plain, self, wrappers).execute(x, transformer_options)

    def plain(self, x, transformer_options):
        return x + len(transformer_options)


def test_torch_compile_sees_the_forward_alone():
    torch._dynamo.reset()
    model, x = Wrapped(), torch.ones(3)
    with torch.inference_mode(False), torch.no_grad():
        out = torch.compile(model, backend="eager", fullgraph=True)(x, OPTIONS)
        assert not hasattr(model.gguf_native_graphs, "args")
        assert torch.equal(out, model(x, OPTIONS))
        assert hasattr(model.gguf_native_graphs, "args")


def through(wrapped, options: dict | None, **others) -> Graphs:
    """A forward of a model with graphs through the host's executor."""
    owner = SimpleNamespace(gguf_native_graphs=Graphs())
    executor = WrapperExecutor.new_class_executor(wrapped, owner, [replaying])
    executor.execute(torch.ones(1), transformer_options=options, **others)
    return owner.gguf_native_graphs


def test_what_no_model_reads_does_not_tell_forwards_apart():
    seen = []
    options = OPTIONS | {"uuids": [object()], "callbacks": {"a": print}, "block": 3}
    asked = through(lambda x, transformer_options, control: seen.append(transformer_options), options, control=None)
    assert asked.kwargs["transformer_options"] == {"cond_or_uncond": [0], "block": 3, "wrappers": []}
    assert asked.options is options
    # The forward itself gets all of it.
    assert seen == [options]


def test_other_wrappers_tell_forwards_apart():
    """Hooks bring them for a part of the prompt."""
    of_models = {ATTACHMENT: [replaying], "theirs": [print], None: [print]}
    asked = through(
        lambda x, transformer_options: None, OPTIONS | {"wrappers": {WrappersMP.DIFFUSION_MODEL: of_models}}
    )
    assert asked.kwargs["transformer_options"]["wrappers"] == ["theirs", "None"]


@pytest.mark.parametrize("options", [None, {}, {"patches": {}}])
def test_a_forward_without_the_hosts_options_passes(options):
    seen = []
    assert not hasattr(through(lambda x, transformer_options: seen.append(transformer_options), options), "args")
    assert seen == [options]


def test_a_forward_with_gradients_passes():
    with torch.inference_mode(False), torch.enable_grad():
        assert not hasattr(through(lambda x, transformer_options: None, OPTIONS), "args")


@pytest.fixture
def may(patcher, monkeypatch):
    """why_not of the loaded model, with room for what it needs."""
    monkeypatch.setattr(graphs, "mm", SimpleNamespace(**vars(mm)))
    monkeypatch.setattr(graphs.mm, "get_free_memory", lambda device, torch_free_too: (8 << 30, 1 << 30))

    def asked(by=patcher, options=OPTIONS) -> str | None:
        by.partially_load(CPU)
        by.model.current_patcher = by
        reason = why_not(by.model, torch.zeros(1, 16, 8, 8), options)
        by.model.current_patcher = None
        return reason

    return asked


def test_nothing_is_against_a_plain_model_and_a_plain_lora(patcher, may):
    assert may() is None
    assert may(with_lora(patcher)) is None
    assert may(options={"cond_or_uncond": [0]}) is None


def test_another_node_around_each_forward(may):
    wrappers = {WrappersMP.DIFFUSION_MODEL: {ATTACHMENT: [replaying], "easycache": [print], "mine": [print]}}
    assert may(options=OPTIONS | {"wrappers": wrappers}) == "another node works around each forward (easycache, mine)"
    # Those around something else do no harm.
    assert may(options=OPTIONS | {"wrappers": {WrappersMP.APPLY_MODEL: {"compile": [print]}}}) is None


def test_hooks(patcher, may):
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    forced = patcher.clone()
    forced.forced_hooks = hooks
    assert may(forced) == "hooks change weights while the model samples"
    registered = patcher.clone()
    registered.add_hook_patches(hooks.hooks[0], {f"diffusion_model.{LAYER}.weight": ("diff", (torch.zeros(SHAPE),))})
    assert may(registered) == "hooks change weights while the model samples"
    assert may() is None


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_who_watches_layers_sees_each_forward(patcher, may, register):
    handle = getattr(patcher.model.diffusion_model.double_blocks[0].img_attn.qkv, register)(lambda *_: None)
    assert may() == "another node watches the model's layers"
    handle.remove()
    assert may() is None


def test_importance_is_counted_in_each_forward(patcher, may):
    with watching(patcher.model.diffusion_model, Seen()):
        assert may() == "another node watches the model's layers"
    assert may() is None


def test_a_copy_for_another_gpu_is_asked_about_that_one(patcher, monkeypatch, path):
    """The host makes it by our loader, which knows only the first GPU, and gives it its own afterwards."""
    asked = []

    def load(path: str):
        made = load_diffusion_model(path)
        made.load_device = GPU
        record_forwards(made, Workspace())
        made.load_device = CPU
        return made

    patcher.cached_patcher_init = (load, (str(path),))
    other = torch.device("cuda", 1)
    copy = patcher.deepclone_multigpu(new_load_device=other)
    assert copy.load_device == other
    copy.model.device, copy.model.dynamic_vbars = other, {other: Pages(1)}
    recorder = graphs_of(copy.model.diffusion_model)
    with recorder.held_weights() as weights:
        assert weights is not None and copy.model.dynamic_vbars[other].n_pins == 1
    monkeypatch.setattr(graphs, "mm", SimpleNamespace(**vars(mm)))
    monkeypatch.setattr(graphs.mm, "get_free_memory", lambda device, torch_free_too: asked.append(device) or (0, 0))
    for layer in packed_layers(copy.model).values():
        layer._v, layer._v_signature = copy.model.dynamic_vbars[other].slot(0), (ctypes.c_uint32 * 1)(1)
    assert "would have to be free" in recorder.why_not(torch.zeros(1, 16, 8, 8), OPTIONS)
    assert asked == [other]


@pytest.mark.parametrize("adapter", ["loha", "dora", "lokr"])
def test_adapters_that_rebuild_weights(patcher, may, adapter):
    assert may(with_lora(patcher, adapter)) == "adapters without a low-rank form rebuild weights at every use"
    assert may() is None


class Pages:
    """In place of a model's memory under DynamicVRAM: pages of 4 bytes, each with a serial number while it is there."""

    base_addr = 4096

    def __init__(self, *serials: int | None):
        self.serials, self.n_pins, self.offset = list(serials), 0, 4 * len(serials)

    def fault(self, address: int, size: int):
        start = (address - self.base_addr) // 4
        found = self.serials[start : start + size // 4]
        if None in found:
            return None
        self.n_pins += 1
        return (ctypes.c_uint32 * len(found))(*found)

    def unpin(self, address: int, size: int) -> None:
        self.n_pins -= 1
        assert self.n_pins >= 0

    def slot(self, page: int) -> tuple:
        return self, self.base_addr + 4 * page, 4


def test_weights_whose_pages_have_other_contents(patcher, may):
    layers, pages = list(patcher.model.diffusion_model.double_blocks[0].modules()), Pages(5, 6)
    for page, layer in enumerate(layer for layer in layers if hasattr(layer, "side_path")):
        layer._v = pages.slot(page % 2)
        layer._v_signature = (ctypes.c_uint32 * 1)(5 + page % 2)
    assert may() is None
    pages.serials[1] = 7
    assert may() == "weights stream"
    assert pages.n_pins == 0


@pytest.mark.parametrize("missing", [1, 700])
def test_memory_that_would_be_missing(patcher, may, monkeypatch, missing):
    """What torch holds is for the activations; it is not free for a graph."""
    needed = patcher.model.memory_required([1, 16, 8, 8]) + mm.minimum_inference_memory()
    free = int(needed) - (missing << 20)
    monkeypatch.setattr(graphs.mm, "get_free_memory", lambda device, torch_free_too: (free + (1 << 30), 1 << 30))
    assert may() == f"{missing} MB more would have to be free"
    monkeypatch.setattr(graphs.mm, "get_free_memory", lambda device, torch_free_too: (needed + (1 << 30), 1 << 30))
    assert may() is None


def test_a_host_that_records_graphs_itself(may, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "disable_comfy_compiler", False, raising=False)
    assert may() == "ComfyUI records graphs itself"


def test_a_torch_that_cannot_end_a_recording_that_failed(may, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    assert may() == "torch is older than 2.8"


def test_weights_that_are_elsewhere_without_dynamic_vram(patcher, may):
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    assert may() == "weights stream"


def test_a_weight_that_went_through_the_ring_is_not_asked_for(patcher, may):
    pages = Pages(5)
    layer = patcher.model.diffusion_model.double_blocks[0].img_attn.qkv
    layer._v, layer._v_signature = pages.slot(0), None
    pages.fault = None
    assert may() == "weights stream"


def test_without_dynamic_vram_weights_stay_until_it_is_said(patcher):
    with held_weights(patcher.model) as weights, held_weights(patcher.model) as again:
        assert weights == again


def test_held_weights_under_dynamic_vram():
    """All pages are held, and their numbers tell them from those that take their place."""
    pages = Pages(1, 2, 3)
    model = SimpleNamespace(device=GPU, dynamic_vbars={GPU: pages, torch.device("cuda", 1): None})
    seen = []
    for serial in (2, 2, 9, None, None, 2):
        pages.serials[1] = serial
        with held_weights(model) as weights:
            assert pages.n_pins == (serial is not None)
            seen.append(weights)
        assert pages.n_pins == 0
    first, same, other, nothing, nothing_again, last = seen
    assert first == same == last != other
    assert nothing not in (first, other, nothing_again)
    with pytest.raises(KeyError), held_weights(model):
        raise KeyError
    assert pages.n_pins == 0


class Forgetful(Graphs):
    """In place of ForwardGraphs: counts how often it is to forget."""

    n_forgotten = 0

    def reset(self) -> None:
        self.n_forgotten += 1


@pytest.fixture
def forgotten(patcher):
    """How often since the last call."""
    patcher.partially_load(CPU)
    kept = patcher.model.diffusion_model.gguf_native_graphs = Forgetful()

    def since() -> int:
        found, kept.n_forgotten = kept.n_forgotten, 0
        return found

    return since


def test_a_lora_has_recordings_forgotten(patcher, forgotten):
    for model in (with_lora(patcher), with_lora(patcher, strength=0.5), patcher):
        model.partially_load(CPU)
        assert forgotten()


def test_so_it_does_under_dynamic_vram(path, dynamic_vram_on_cpu):
    patcher = load_diffusion_model(path)
    kept = patcher.model.diffusion_model.gguf_native_graphs = Forgetful()
    for n_loads, model in enumerate((with_lora(patcher), with_lora(patcher, strength=0.5), patcher)):
        model.partially_load(CPU)
        assert kept.n_forgotten > n_loads


@pytest.mark.parametrize(("leave", "arguments"), [("partially_unload", (CPU, 1)), ("detach", ())])
def test_recordings_are_forgotten_before_weights_leave(patcher, forgotten, monkeypatch, leave, arguments):
    order = []
    monkeypatch.setattr(graphs_of(patcher.model.diffusion_model), "reset", lambda: order.append("forgotten"))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, leave, lambda *of: order.append("left") or 1)
    getattr(patcher, leave)(*arguments)
    assert order[:2] == ["forgotten", "left"]


def test_recordings_are_forgotten_after_sampling(patcher, forgotten):
    patcher.cleanup()
    assert forgotten()


def test_a_sampling_ends_with_nothing_recorded(patcher, forgotten):
    sample(patcher, FLUX, 1)
    assert forgotten()
