"""A forward that runs out of GPU memory, which an exception at the right place stands for here."""

import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from sampling import sample

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.model_management as mm
import comfy_aimdo.model_vbar
import comfy_aimdo.vram_buffer
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from gguf_native.loader import out_of_memory
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.file_streaming import without_prefetch
from gguf_native.loader.graphs import replaying
from gguf_native.loader.model_patcher import adopt
from gguf_native.loader.out_of_memory import (
    Retrying,
    give_up_decoded,
    give_up_others,
    give_up_recordings,
    retry_forwards,
)
from gguf_native.loader.residency import ATTACHMENT, DIFFUSION

FLUX = "tiny_flux_256"
STEPS = 3


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


class Ring:
    """In place of a streamer with its ring, of which nothing is asked on a CPU."""

    def __init__(self):
        self.sent, self.is_there = {}, True

    def give_up(self) -> bool:
        had_one, self.is_there = self.is_there, False
        return had_one

    def reset(self) -> None:
        """After a sampling: the next one makes a ring again."""
        self.is_there = True


class Flux:
    """A model whose forwards need so much that the ring has no room; n_begun counts them."""

    def __init__(self, path: str):
        self.patcher = load_diffusion_model(path)
        self.patcher.load_device = torch.device("cuda", 0)
        retry_forwards(self.patcher)
        self.patcher.load_device = torch.device("cpu")
        self.ring, self.n_begun, self.needs = Ring(), 0, math.inf
        diffusion_model = self.patcher.model.diffusion_model
        self.layer = diffusion_model.double_blocks[0].img_attn.qkv
        self.layer.streamer = self.ring
        diffusion_model.double_blocks[0].register_forward_pre_hook(self.begin)
        diffusion_model.single_blocks[0].register_forward_pre_hook(self.fill)

    def begin(self, *_) -> None:
        self.n_begun += 1

    def fill(self, *_) -> None:
        if self.ring.is_there or self.needs == math.inf:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 432.00 MiB.")


@pytest.fixture
def path(samples) -> str:
    return str(samples.gguf(FLUX, "Q4_K"))


@pytest.fixture
def flux(path) -> Iterator[Flux]:
    made = Flux(path)
    yield made
    # The host has it loaded until it wants the memory.
    made.layer.streamer = None


def test_it_runs_again_without_the_ring_and_later_ones_begin_without_it(flux, path, caplog):
    out_of_memory.log_retry.cache_clear()
    expected = sample(load_diffusion_model(path), FLUX, STEPS)
    flux.needs = 0
    with caplog.at_level("INFO", "gguf_native"):
        assert torch.equal(sample(flux.patcher, FLUX, STEPS), expected)
        assert flux.n_begun == STEPS + 1
        assert torch.equal(sample(flux.patcher.clone(), FLUX, STEPS), expected)
    assert flux.n_begun == 2 * STEPS + 1
    assert [message.split(".")[0] for message in caplog.messages if "It runs again" in message] == [
        "GGUF Native: the GPU's memory was too little for a forward"
    ]


def test_with_nothing_to_give_up_or_not_enough_it_is_an_error(flux):
    with pytest.raises(torch.OutOfMemoryError):
        sample(flux.patcher, FLUX, STEPS)
    assert flux.n_begun == 2
    with pytest.raises(torch.OutOfMemoryError):
        sample(flux.patcher, FLUX, STEPS)
    assert flux.n_begun == 3


class Owner(torch.nn.Module):
    """What is asked of a diffusion model; its forward has room for fewer inputs while others and the ring are there."""

    def __init__(self):
        super().__init__()
        self.wrapper, self.tried, self.has_others, self.has_ring = Retrying(), [], False, True
        self.error: Exception = torch.OutOfMemoryError()

    def forward(self, x):
        return WrapperExecutor.new_class_executor(self.plain, self, [self.wrapper]).execute(x)

    def plain(self, x):
        self.tried.append(x.numel())
        if x.numel() > 20 - 8 * self.has_others - 8 * self.has_ring:
            raise self.error
        return x + 1


@pytest.fixture
def owner(monkeypatch) -> Owner:
    def give_up(what: str):
        def given_up(model) -> bool:
            had, _ = getattr(model, what), setattr(model, what, False)
            return had

        return given_up

    monkeypatch.setattr(out_of_memory, "give_up_others", give_up("has_others"))
    monkeypatch.setattr(out_of_memory, "give_up_ring", give_up("has_ring"))
    monkeypatch.setattr(out_of_memory, "give_up_decoded", lambda model: False)
    monkeypatch.setattr(out_of_memory, "give_up_recordings", lambda model: False)
    return Owner()


def test_only_what_has_to_goes_and_only_large_forwards_go_without_the_ring(owner):
    for n_values, others, tries, keeps_ring in (
        (4, True, 1, True),
        (12, True, 2, True),
        (14, True, 3, False),
        (14, False, 1, False),
        (16, False, 1, False),
        (12, True, 2, True),
        (13, False, 2, False),
        (13, False, 1, False),
    ):
        owner.tried, owner.has_others, owner.has_ring = [], others, True
        assert torch.equal(owner(torch.zeros(n_values)), torch.ones(n_values))
        assert (owner.tried, owner.has_ring) == ([n_values] * tries, keeps_ring)
    with pytest.raises(torch.OutOfMemoryError):
        owner(torch.zeros(21))


def test_decoded_weights_go_first_and_the_ring_last(owner, monkeypatch):
    given_up = []
    in_order = ["give_up_decoded", "give_up_others", "give_up_recordings", "give_up_ring"]
    for what in in_order:
        monkeypatch.setattr(out_of_memory, what, lambda model, what=what: given_up.append(what) or True)
    with pytest.raises(torch.OutOfMemoryError):
        owner(torch.zeros(21))
    assert given_up == in_order


@pytest.mark.parametrize(
    "text, source",
    [
        ("VRAM grow failed", comfy_aimdo.vram_buffer.VRAMBuffer.get),
        ("Fault failed", comfy_aimdo.model_vbar.ModelVBAR.fault),
    ],
)
def test_the_errors_of_dynamic_vram_are_such_too(owner, text, source):
    """Of the buffer that a weight without room goes through, and of pages: the host's own question knows neither."""
    assert f'RuntimeError(f"{text}: ' in inspect.getsource(source)
    error = RuntimeError(f"{text}: 2")
    assert not mm.is_oom(error)
    owner.error, owner.has_others = error, True
    assert torch.equal(owner(torch.zeros(8)), torch.ones(8)) and owner.tried == [8, 8]


def test_another_error_is_not_tried_again(owner, monkeypatch):
    monkeypatch.setattr(owner, "plain", lambda x: owner.tried.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        owner(torch.zeros(3))
    assert owner.tried == [1] and owner.has_ring


def test_decoded_weights_go_with_the_recordings_that_read_them(path):
    model = load_diffusion_model(path).model.diffusion_model
    done, had = [], 0
    assert not give_up_decoded(model)
    model.gguf_native_graphs = SimpleNamespace(reset=lambda: done.append("graphs"))
    cache = SimpleNamespace(keep_no_more=lambda: done.append("cache") or had)
    model.double_blocks[0].img_attn.qkv.workspace.cache = cache
    assert not give_up_decoded(model) and done == ["cache"]
    had = 5
    assert give_up_decoded(model) and done == ["cache", "cache", "graphs"]


def test_recordings_go(path):
    model = load_diffusion_model(path).model.diffusion_model
    assert not give_up_recordings(model)
    for had_any in (False, True):
        model.gguf_native_graphs = SimpleNamespace(give_up=lambda had_any=had_any: had_any)
        assert give_up_recordings(model) == had_any


def test_idle_models_go_and_the_one_at_work_stays(path, monkeypatch):
    """The tests run on the CPU, whose models stay: there is nothing to gain."""
    idle, at_work = load_diffusion_model(path), load_diffusion_model(path)
    mm.load_models_gpu([idle])
    mm.load_models_gpu([at_work])
    at_work.model.current_patcher = at_work
    held = [loaded.model for loaded in mm.current_loaded_models]
    assert not give_up_others(at_work.model.diffusion_model)
    assert [loaded.model for loaded in mm.current_loaded_models] == held
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    for loaded in mm.current_loaded_models:
        loaded.currently_used = False
    assert give_up_others(at_work.model.diffusion_model)
    held = [loaded.model for loaded in mm.current_loaded_models]
    assert at_work in held and idle not in held
    # Whose forward it is stays, whatever the host says of it.
    at_work.model.current_patcher = None
    assert not give_up_others(at_work.model.diffusion_model)


def test_it_is_around_the_graphs_and_only_on_a_gpu(path):
    patcher = load_diffusion_model(path)
    assert not patcher.get_wrappers(WrappersMP.DIFFUSION_MODEL, ATTACHMENT)
    patcher.load_device = torch.device("cuda", 0)
    adopt(patcher, DIFFUSION)
    patcher.load_device = torch.device("cpu")
    first, *others = patcher.clone().get_wrappers(WrappersMP.DIFFUSION_MODEL, ATTACHMENT)
    assert isinstance(first, Retrying) and others == [without_prefetch, replaying]


class Taking(torch.nn.Module):
    """A forward that takes what a ControlNet gives out of its lists, as the host's UNets do, and fails after that."""

    def __init__(self, wrapper):
        super().__init__()
        self.wrapper, self.n_tries = wrapper, 0

    def forward(self, x, control, options):
        wrapped = WrapperExecutor.new_class_executor(self.plain, self, [self.wrapper])
        return wrapped.execute(x, control, transformer_options=options)

    def plain(self, x, control, transformer_options):
        self.n_tries += 1
        out = x + control["middle"].pop()
        if self.n_tries == 1:
            raise torch.OutOfMemoryError
        return out


def test_what_a_controlnet_gives_is_there_again(monkeypatch):
    n_emptied = []
    monkeypatch.setattr(out_of_memory, "give_up_others", lambda model: True)
    monkeypatch.setattr(mm, "soft_empty_cache", lambda: n_emptied.append(1))
    taking, control = Taking(Retrying()), {"middle": [torch.ones(3)]}
    out = taking(torch.zeros(3), control, {"cond_or_uncond": [0]})
    assert (out.tolist(), taking.n_tries, len(n_emptied)) == ([1, 1, 1], 2, 1)


def test_what_other_nodes_do_around_a_forward_is_not_done_twice():
    taking, options = Taking(Retrying()), {"cond_or_uncond": [0]}
    options["wrappers"] = {WrappersMP.DIFFUSION_MODEL: {ATTACHMENT: [taking.wrapper], "easycache": [print]}}
    with pytest.raises(torch.OutOfMemoryError):
        taking(torch.zeros(3), {"middle": [torch.ones(3)]}, options)
    assert taking.n_tries == 1


def test_torch_compile_sees_the_forward_alone(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(out_of_memory, "tensors_of", lambda args: 1 / 0)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapper = Retrying()

        def forward(self, x):
            return WrapperExecutor.new_class_executor(lambda x: x + 1, self, [self.wrapper]).execute(x)

    with torch.inference_mode(False), torch.no_grad():
        out = torch.compile(Plain(), backend="eager", fullgraph=True)(torch.ones(3))
    assert torch.equal(out, torch.full((3,), 2.0))
