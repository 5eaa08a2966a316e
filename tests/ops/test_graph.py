"""Forwards recorded and replayed: what tells two calls apart, when a recording is made, and what turns it off."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")

from gguf_native.ops import graph
from gguf_native.ops.graph import MOST_VALUES, ForwardGraphs, NotPlainError, description, rebuilt, tensors_of
from gguf_native.ops.matmul import Workspace

ENOUGH = torch.linspace(1, 0, graph.LEAST_REPLAYS + 3)


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


def on_gpu(*values: float) -> torch.Tensor:
    return torch.tensor(values).as_subclass(OnGPU)


def described(*values: object) -> list:
    return [description(value, []) for value in values]


def test_tensors_on_the_gpu_are_inputs_whatever_their_values():
    inputs = []
    x, y = on_gpu(1, 2), on_gpu(3, 4)
    key = description(((x,), {"context": y, "control": {"input": [y, None, x]}}), inputs)
    assert [id(tensor) for tensor in inputs] == [id(x), id(y), id(y), id(x)]
    other = description(((y,), {"context": x, "control": {"input": [x, None, y]}}), [])
    assert hash(key) == hash(other) and key == other


@pytest.mark.parametrize(
    "other",
    [on_gpu(1), on_gpu(1, 2).double(), on_gpu(1, 2).reshape(1, 2), torch.tensor([1.0, 2.0]), None, [on_gpu(1, 2)]],
    ids=["length", "dtype", "shape", "in RAM", "none", "in a list"],
)
def test_another_kind_of_tensor_is_another_call(other):
    one, two = described({"x": on_gpu(1, 2)}, {"x": other})
    assert one != two


def test_small_tensors_in_ram_count_by_value():
    ones, same, others, whole = described(
        torch.ones(3), torch.ones(3), torch.tensor([1.0, 1.0, 2.0]), torch.ones(3).int()
    )
    assert ones == same
    assert ones != others
    assert ones != whole
    described(torch.zeros(MOST_VALUES))
    with pytest.raises(NotPlainError, match="of type Tensor takes part in each step"):
        described(torch.zeros(MOST_VALUES + 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (3.5, 4.0),
        ("a", "b"),
        (None, False),
        ([1, 2], [1, 3]),
        ([1, 2], [1]),
        ({"a": 1}, {"b": 1}),
        (torch.float16, torch.bfloat16),
    ],
)
def test_plain_values_tell_calls_apart(one, other):
    first, again, second = described({"options": one}, {"options": one}, {"options": other})
    assert hash(first) == hash(again) and first == again
    assert first != second


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda x: x, "function"),
        (object(), "object"),
        ({"patches_replace": {"dit": {("double_block", 0): print}}}, "builtin_function_or_method"),
        ([torch.nn.Identity()], "Identity"),
        ({1, 2}, "set"),
    ],
    ids=["function", "object", "patch", "module", "set"],
)
def test_what_may_do_anything_is_refused_by_its_name(value, name):
    with pytest.raises(NotPlainError, match=f"something of type {name} takes part in each step"):
        described(value)


def test_rebuilt_has_the_new_tensors_in_the_places_of_the_old():
    inputs, in_ram = [], torch.ones(2)
    value = ([on_gpu(1)], {"options": {"sigmas": on_gpu(2), "kept": in_ram, "shape": torch.Size([4])}, "more": (3,)})
    description(value, inputs)
    new = [tensor + 10 for tensor in inputs]
    args, kwargs = rebuilt(value, iter(new))
    assert args[0] is new[0]
    assert kwargs["options"]["sigmas"] is new[1]
    assert kwargs["options"]["kept"] is in_ram
    assert (kwargs["options"]["shape"], kwargs["more"]) == (torch.Size([4]), (3,))
    # What a forward writes into its options does not reach those of another.
    kwargs["options"]["block"] = 7
    assert "block" not in value[1]["options"]


def test_outputs_may_be_nested():
    one, two = torch.ones(1), torch.zeros(2)
    assert [tensor.tolist() for tensor in tensors_of((one, [two, one]))] == [[1], [0, 0], [1]]
    assert tensors_of({"sample": one, "more": None}) == [one]


class Clock:
    """A processor that launches for `launching` ms in a forward, and a GPU that then has worked for `working` ms."""

    def __init__(self, launching: float, working: float):
        self.launching, self.working, self.now, self.gpu = launching, working, 0.0, 0.0

    def perf_counter(self) -> float:
        self.now += 0.01
        return self.now / 1000

    def launch(self, launching: float) -> None:
        self.gpu = max(self.gpu, self.now) + self.working
        self.now += launching
        self.gpu = max(self.gpu, self.now)

    def synchronize(self) -> None:
        self.now = max(self.now, self.gpu)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.now, self.gpu))
        event.query = lambda: self.now >= event.at
        event.elapsed_time = lambda later: later.at - event.at
        return event


class Recorder(TorchDispatchMode):
    """Notes what is computed, and leaves no traces; as on a GPU, nobody may look at a value meanwhile."""

    def __init__(self, steps: list):
        super().__init__()
        self.steps, self.before = steps, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more about that")
        if function._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, out))
        return out


class Graph:
    """In place of torch.cuda.CUDAGraph: computes the same again, into the same memory."""

    clock: Clock
    n_replays = 0

    def __init__(self):
        self.steps = []

    def replay(self) -> None:
        Graph.n_replays += 1
        self.clock.launch(0.1)
        for function, args, kwargs, out in self.steps:
            again = function(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                out.copy_(again)


class Model:
    """A forward, how often it ran, and what its graphs are told by the host."""

    def __init__(self):
        self.weight, self.n_runs, self.reason, self.place = torch.arange(4.0), 0, None, "here"
        self.workspace, self.is_capturing = Workspace(), False
        self.graphs = ForwardGraphs(self.workspace, lambda x, options: self.reason, self.held)

    @contextmanager
    def held(self):
        yield self.place

    def run(self, x, guidance=None, transformer_options=None, control=None):
        self.n_runs += 1
        if not self.is_capturing:
            Graph.clock.launch(Graph.clock.launching)
        return self.compute(x, transformer_options, control)

    def compute(self, x, options, control=None):
        out = x * self.weight + options["sigmas"].sin()
        return out if control is None else out + control["input"][0]

    def step(self, number: int, x: torch.Tensor | None = None, sigmas: torch.Tensor = ENOUGH, control=None, **others):
        """The output of one step, which must be that of the forward."""
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number)) if x is None else x
        options = {"cond_or_uncond": [0], "sample_sigmas": sigmas, "sigmas": on_gpu(number)}
        kwargs = {"transformer_options": options | others.pop("patches", {}), "control": control} | others
        expected = self.compute(x.clone(), options, control)
        out = self.graphs.forward(self.run, (x.as_subclass(OnGPU),), kwargs, options)
        assert torch.equal(out, expected)
        return out

    def steps(self, n: int, **others) -> list[int]:
        """How often the forward ran in each step."""
        ran = []
        for number in range(n):
            before = self.n_runs
            self.step(number, **others)
            ran.append(self.n_runs - before)
        return ran


# A forward that runs and is then recorded, and replays from then on.
RECORDED = [1, 2, 0, 0, 0]
NEVER = [1, 1, 1, 1, 1]


@pytest.fixture
def model(monkeypatch) -> Model:
    """A forward that launches for 84 ms what takes 47, as Flux at 512x512; there is no GPU, the arithmetic is real."""
    made, Graph.n_replays, Graph.clock = Model(), 0, Clock(84, 47)

    @contextmanager
    def capture():
        made.is_capturing, graph_ = True, Graph()
        try:
            with Recorder(graph_.steps) as recorder:
                yield graph_
        finally:
            made.is_capturing = False
        for tensor, before in reversed(recorder.before):
            tensor.copy_(before)

    monkeypatch.setattr(graph, "time", SimpleNamespace(perf_counter=lambda: Graph.clock.perf_counter()))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Graph.clock.event(enable_timing))
    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 20, 8 << 20))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Graph.clock.synchronize())
    return made


@pytest.fixture
def said(caplog):
    """What was logged since the last call."""
    caplog.set_level(logging.INFO, "gguf_native")

    def messages() -> list[str]:
        found = [message.removeprefix("GGUF Native: enable_cuda_graph: ") for message in caplog.messages]
        caplog.clear()
        return found

    return messages


def test_the_first_runs_the_second_records_later_ones_are_replayed(model, said):
    assert model.steps(5) == RECORDED
    # The first replay is compared with the forward.
    assert Graph.n_replays == 4
    assert said() == ["a forward takes 47 ms in place of 84, for 0 MB."]


def test_an_output_is_the_callers_own(model):
    outputs = [model.step(number) for number in range(6)]
    kept = [output.clone() for output in outputs]
    model.step(9)
    assert all(map(torch.equal, outputs, kept))


def test_a_forward_that_changes_what_it_is_given(model):
    compute = model.compute
    model.compute = lambda x, *others: compute(x.mul_(2), *others)
    assert model.steps(5) == RECORDED


def test_a_recording_has_working_memory_of_its_own(model):
    compute, seen = model.compute, []
    model.workspace.buffers["weight"] = torch.ones(1)

    def noted(*arguments):
        if model.is_capturing:
            seen.append(dict(model.workspace.buffers))
        return compute(*arguments)

    model.compute = noted
    assert model.steps(5) == RECORDED
    assert seen == [{}]
    assert list(model.workspace.buffers) == ["weight"]


@pytest.mark.parametrize(
    ("n_noise_levels", "expected"), [(graph.LEAST_REPLAYS + 3, RECORDED), (graph.LEAST_REPLAYS + 2, NEVER)]
)
def test_few_steps_are_not_worth_it(model, said, n_noise_levels, expected):
    assert model.steps(5, sigmas=torch.linspace(1, 0, n_noise_levels)) == expected
    assert len(said()) == (expected == RECORDED)


@pytest.mark.parametrize(
    ("launching", "working", "message"),
    [
        (84, 84 * 1.3, "off at this size: the GPU, not the processor, sets the pace."),
        (84, 83, "off at this size: 83 ms in place of 84 do not pay."),
    ],
)
def test_off_where_it_gains_nothing(model, said, launching, working, message):
    Graph.clock = Clock(launching, working)
    assert model.steps(5)[2:] == NEVER[2:]
    assert said() == [message]
    # Neither in the next sampling.
    model.graphs.reset()
    assert model.steps(5) == NEVER
    # Another size may gain.
    Graph.clock = Clock(84, 47)
    assert model.steps(5, x=torch.ones(1, 4)) == RECORDED


@pytest.mark.parametrize("reason", ["weights stream", "another node works around each forward (theirs)"])
def test_off_for_this_sampling_for_a_reason_of_the_host(model, said, reason):
    model.reason = reason
    assert model.steps(5) == NEVER
    model.graphs.reset()
    assert model.steps(5) == NEVER
    # Once for a model.
    assert said() == [f"off: {reason}."]
    model.reason = None
    model.graphs.reset()
    assert model.steps(5) == RECORDED


def test_off_where_something_that_may_do_anything_takes_part(model, said):
    assert model.steps(5, patches={"attn1_patch": [print]}) == NEVER
    assert said() == ["off: something of type builtin_function_or_method takes part in each step."]
    assert model.steps(5) == RECORDED


def test_off_where_the_forward_looks_at_a_value(model, said):
    compute = model.compute
    model.compute = lambda x, *others: compute(x * x.sum().item(), *others)
    assert model.steps(5) == [1, 2, 1, 1, 1]
    why = "CUDA error: operation not permitted when stream is capturing"
    assert said() == [f"off: this model's forward cannot be recorded ({why})."]
    assert not model.workspace.buffers
    model.graphs.reset()
    assert model.steps(5) == NEVER


def test_off_where_replaying_gives_other_values(model, said):
    """A forward that depends on something that is not among its arguments."""
    compute = model.compute
    model.compute = lambda x, *others: compute(x + model.is_capturing, *others)
    assert model.steps(5) == [1, 2, 1, 1, 1]
    assert said() == ["off: replaying did not give the forward's very values."]


def test_each_kind_of_call_has_its_own_recording(model):
    kinds = [
        {},
        {"x": torch.ones(2, 1, 4)},
        {"x": torch.ones(4, 4)},
        {"guidance": torch.tensor([3.5])},
        {"guidance": torch.tensor([4.0])},
        {"control": {"input": [on_gpu(1, 2, 3, 4)]}},
        {"sigmas": torch.linspace(1, 0, 40)},
    ]
    assert [model.steps(5, **kind) for kind in kinds] == [RECORDED] * len(kinds)
    # None of them has pushed another out.
    assert [model.steps(2, **kind) for kind in kinds] == [[0, 0]] * len(kinds)
    assert len(model.graphs.recordings) == len(kinds)


def test_control_that_changes_is_an_input(model):
    for number in range(6):
        model.step(number, control={"input": [on_gpu(number, 1, 2, 3)]})
    assert Graph.n_replays == 5


@pytest.mark.parametrize("place", ["elsewhere", None])
def test_weights_that_have_moved_are_found_and_recorded_anew(model, said, place):
    model.steps(4)
    model.weight, model.place = model.weight + 1, place
    said()
    assert model.steps(1) == [1]
    assert said() == ["off for now: weights have left the GPU."]
    assert model.graphs.recordings == {}
    model.place = "elsewhere"
    assert model.steps(3) == [2, 0, 0]


def test_given_up_it_is_not_recorded_again(model, said):
    assert model.steps(5) == RECORDED
    assert model.graphs.give_up()
    assert said()[-1] == "off: another forward needs the memory."
    assert model.graphs.recordings == {}
    assert model.steps(5) == NEVER
    assert not model.graphs.give_up()


def test_reset_waits_for_the_last_replay_and_forgets(model, monkeypatch):
    model.steps(5)
    waits = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(model.graphs.recordings)))
        model.graphs.reset()
        assert waits == [1]
        # There is nothing to wait for.
        model.graphs.reset()
        assert waits == [1]
    assert model.steps(5) == RECORDED


class Blocks(torch.nn.Module):
    """Many small launches, as a model at a small picture."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(100))

    def forward(self, x, transformer_options):
        for layer in self.layers:
            x = x + layer(x).sin() * transformer_options["sigmas"]
        return x


class Looking(Blocks):
    def forward(self, x, transformer_options):
        return super().forward(x * x.sum().sign().item(), transformer_options)


@contextmanager
def always_there():
    yield True


@pytest.fixture
def on_device(monkeypatch):
    """Five steps of a model on the GPU, each compared with its plain forward; gives what its graphs hold then."""
    # Whether it pays is not the question here.
    monkeypatch.setattr(graph, "SHARE_OF_LAG", 1000)
    monkeypatch.setattr(graph, "WORTHWHILE", 1000)

    def steps(blocks: Blocks) -> ForwardGraphs:
        blocks.cuda()
        graphs = ForwardGraphs(Workspace(), lambda x, options: None, always_there)
        with torch.inference_mode():
            for _ in range(5):
                x = torch.randn(2, 64, device="cuda")
                options = {"cond_or_uncond": [0], "sample_sigmas": ENOUGH.cuda(), "sigmas": torch.rand(1).cuda()}
                expected = blocks(x, options)
                assert torch.equal(graphs.forward(blocks, (x,), {"transformer_options": options}, options), expected)
        return graphs

    return steps


@pytest.mark.cuda
def test_on_a_gpu_replays_give_the_bits_of_the_forward(on_device, said):
    graphs = on_device(Blocks())
    assert len(graphs.recordings) == 1
    (message,) = said()
    assert message.startswith("a forward takes ")
    graphs.reset()
    assert graphs.recordings == {}


@pytest.mark.cuda
def test_on_a_gpu_a_forward_that_looks_at_a_value_is_not_recorded(on_device, said):
    graphs = on_device(Looking())
    assert graphs.recordings == {}
    (message,) = said()
    assert message.startswith("off: this model's forward cannot be recorded (")
    # The GPU is none the worse for it.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.ones(2, device="cuda").sum().item() == 2
    # And the next one that can be recorded is.
    assert len(on_device(Blocks()).recordings) == 1
