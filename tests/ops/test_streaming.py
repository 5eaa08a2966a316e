"""Weights out of pinned files: each is there, whole, when a layer uses it."""

import logging
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")
pytest.importorskip("comfy_aimdo", reason="comfy-aimdo is not installed: there is no DynamicVRAM")

from gguf_native.ops import streaming
from gguf_native.ops.ring import ALIGNMENT
from streaming_machine import KB, Layer, layers_of, machine_maker


@pytest.fixture
def machine(monkeypatch):
    return machine_maker(monkeypatch)


def test_the_first_forward_sends_each_weight_when_it_is_used_the_second_ahead(machine):
    run = machine(layers_of(*[60] * 8))
    for number, layer in enumerate(run.layers):
        assert run.use(layer)
        assert run.names() == [number]
        assert not run.streamer.sent
    run.use(run.layers[0])
    # 60 rows take 8 KB of the 32: three beside the one in use.
    assert run.names() == [0, 1, 2, 3]
    assert [run.layers.index(layer) for layer in run.streamer.sent] == [1, 2, 3]
    # More when a quarter is left, and then all that there is room for.
    run.use(run.layers[1])
    assert run.names() == []
    run.use(run.layers[2])
    assert run.names() == [4, 5]
    run.forward(run.layers[3:])
    # Beyond the end of a forward lies the start of the next.
    assert run.names() == [6, 7, 0, 1]
    for _ in range(4):
        assert run.forward() == []
    assert run.names() == [2, 3, 4, 5, 6, 7, 0, 1] * 4


def test_a_bias_comes_once_and_nobody_waits_for_it(machine, monkeypatch):
    run, plain, asked = machine(layers_of(60, 60, 60, 60)), torch.Tensor.to, []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *of, **how: asked.append((self, how)) or plain(self, *of, **how)
    )
    for _ in range(2):
        run.forward()
        run.forward()
        run.streamer.reset()
    biases = [run.layers[number].bias for number in (1, 3, 1, 3)]
    assert [(bias is of, how) for bias, (of, how) in zip(biases, asked, strict=True)] == [
        (True, {"non_blocking": True})
    ] * 4
    assert [stream for _, stream in run.lent] == [run.compute] * 4
    for bias, (sent, _) in zip(biases, run.lent, strict=True):
        assert torch.equal(sent, bias.bfloat16())


@pytest.mark.parametrize("method, keeps", [("copy_", True), ("to", False)], ids=["kept", "streams"])
def test_what_has_no_room_holds_nothing(machine, monkeypatch, method, keeps):
    """The forward runs again: a part of DynamicVRAM that stays pinned would stay so until the model goes."""
    run = machine(layers_of(60, 60, 60, 60))
    run.forward()
    run.streamer.reset()
    for layer in run.layers:
        layer._v.fits = keeps

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    # The first has no bias: what has no room is the second, sent ahead.
    for layer in run.layers[1::-1]:
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(torch.Tensor, method, full)
            run.streamer.borrow(layer)
        assert [each._v.n_pins for each in run.layers] == [0] * 4
        assert all(place.done is not None for place in run.streamer.ring.taken)
    assert run.forward() == []


def test_each_forward_has_the_places_of_the_last_one(machine):
    """So that what was prepared for an address serves again: views, and launches of the kernels."""
    run = machine(layers_of(60, 60, 60, 60, 60))
    run.forward()
    weights = [run.streamer.sources[layer].weight for layer in run.layers]
    assert [run.streamer.sources[layer].start // KB for layer in run.layers] == [0, 8, 16, 24, 0]
    for _ in range(4):
        run.forward()
    assert all(run.streamer.sources[layer].weight is weight for layer, weight in zip(run.layers, weights, strict=True))
    run.streamer.reset()
    assert not run.streamer.sources


def test_layers_that_are_used_no_more_do_not_stop_the_sending_ahead(machine):
    """As much as is sent ahead at most was sent for blocks that another node leaves out since the last load."""
    run = machine(layers_of(*[60] * 14))
    run.forward()
    run.streamer.reset()
    for layer in run.layers[1:5]:
        layer._v.fits = True
    path = [run.layers[0], *run.layers[5:]]
    for _ in range(2):
        assert run.forward(path) == []
    run.names()
    run.use(path[0])
    assert run.streamer.sent
    assert [layer._v.n_pins for layer in run.layers[1:5]] == [0] * 4


def test_given_up_until_the_next_sampling(machine):
    run = machine(layers_of(60, 60, 60))
    run.forward()
    run.use(run.layers[0])
    assert run.streamer.give_up()
    assert run.streamer.buffer is None and not run.streamer.sent
    assert run.forward() == run.layers
    assert not run.streamer.give_up()
    run.streamer.reset()
    run.readers.clear()
    assert run.forward() == []


def test_it_is_told_in_each_sampling_that_weights_stream(machine):
    run = machine(layers_of(60, 60, 60))
    for layer in run.layers:
        layer._v.fits = True
    run.forward()
    assert run.n_begun == 0
    run.layers[2]._v.take_away()
    for n_samplings in (1, 2):
        run.forward()
        run.forward()
        assert run.n_begun == n_samplings
        run.streamer.reset()


def test_no_more_is_sent_ahead_than_the_next_layers_need(machine):
    """A ring that is large because one weight is."""
    run = machine(layers_of(480, *[60] * 8))
    small = run.layers[1:]
    for _ in range(2):
        assert run.forward(small) == []
    most = []
    for layer in small:
        run.use(layer)
        most.append(len(run.streamer.sent))
    # Four of 8160 bytes are a little less than 32 KB; sending begins when less than half of it is ahead.
    assert set(most) <= {2, 3, 4, 5} and max(most) == 5


def test_the_ring_has_room_for_what_is_sent_ahead_and_for_the_largest_twice(machine):
    assert machine(layers_of(60)).streamer.ring_bytes == 32 * KB
    run = machine(layers_of(200, 10, 200))
    assert run.streamer.ring_bytes == 2 * 200 * 136
    for _ in range(4):
        assert run.forward() == []


def test_another_path_than_the_last_one_gets_its_weights_too(machine):
    """What was sent ahead fills the ring and is not wanted."""
    run = machine(layers_of(*[60] * 12))
    for path in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 8, 9, 10, 11], [11, 3, 9, 1], [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4]):
        assert run.forward([run.layers[number] for number in path]) == []
        assert run.forward([run.layers[number] for number in path]) == []


def test_what_may_stay_is_sent_once_and_laid_out_as_the_host_does(machine):
    run = machine(layers_of(60, 60, 60))
    for layer in run.layers:
        layer._v.fits = True
    run.forward()
    assert run.names() == [0, 1, 2]
    run.forward()
    run.forward()
    assert run.names() == []
    layer = run.layers[1]
    start = -(-layer.nbytes // ALIGNMENT) * ALIGNMENT
    assert torch.equal(layer._v.memory[start : start + 120].view(torch.bfloat16), layer.bias.bfloat16())
    assert run.streamer.buffer is None
    assert [layer._v.n_pins for layer in run.layers] == [0, 0, 0]


def test_what_has_found_room_is_passed_over_from_then_on(machine):
    run = machine(layers_of(*[60] * 6))
    run.forward()
    for number in (2, 3):
        run.layers[number]._v.fits = True
    # Who has been refused does not ask again before the next load, from which on there may be room.
    run.names()
    run.forward()
    assert {2, 3} < set(run.names())
    assert run.layers[2]._v_signature is None
    run.streamer.reset()
    run.forward()
    run.names()
    for _ in range(3):
        run.forward()
    assert not {2, 3} & set(run.names())
    assert run.streamer.after[run.layers[1]] is run.layers[4]
    assert [layer._v.n_pins for layer in run.layers] == [0] * 6
    run.layers[2]._v.take_away()
    for _ in range(2):
        assert run.forward() == []
    assert 2 in run.names()
    # By this others know that it streams.
    assert run.layers[2]._v_signature is None
    assert run.streamer.after[run.layers[1]] is run.layers[2]


def test_who_finds_a_kept_weight_after_a_drop_waits_for_its_copy(machine):
    """By then the signature says that it is there, and nobody borrows it from the streamer any more."""
    run = machine(layers_of(60, 60, 60))
    for _ in range(2):
        for layer in run.layers:
            layer._v.take_away()
            layer._v.fits = True
        run.use(run.layers[0])
        if not run.streamer.sent:
            run.forward(run.layers[1:])
    assert run.streamer.sent[run.layers[1]].place is None
    assert run.streamer.buffer is None
    run.streamer.reset()
    assert run.layers[1]._v.n_pins == 0
    run.use(run.layers[1])


def test_a_layer_that_a_load_has_taken_away_is_not_sent_ahead(machine):
    """A LoRA patches its bias, which the host does, or has enlarged it, so that it has no slot any more."""
    run = machine(layers_of(60, 60, 60, 60))
    run.forward()
    run.streamer.reset()
    run.layers[1].streamer = None
    del run.layers[1]._v
    run.names()
    for _ in range(2):
        assert run.forward([run.layers[number] for number in (0, 2, 3)]) == []
    assert set(run.names()) == {0, 2, 3}


def test_what_is_larger_than_the_ring_is_left_to_the_host(machine):
    """A layer that was not among the paged ones when the ring's size was chosen."""
    run = machine(layers_of(60, 60, 60, 60))
    run.layers.insert(2, Layer(9, 300))
    run.layers[2].streamer = run.streamer
    for _ in range(3):
        assert run.forward() == [run.layers[2]]


def test_reset_gives_everything_back_and_the_next_forward_needs_nothing_of_it(machine):
    run = machine(layers_of(60, 60, 60, 60))
    run.forward()
    run.streamer.reset()
    run.layers[2]._v.fits = True
    run.use(run.layers[0])
    held = list(run.streamer.sent.values())
    assert {sent.place is None for sent in held} == {True, False}
    run.streamer.reset()
    assert not run.streamer.sent and not run.streamer.ring.taken and not run.streamer.sources
    assert run.streamer.buffer is None
    assert [layer._v.n_pins for layer in run.layers] == [0] * 4
    # Who gets the memory next computes after the copies into it.
    assert all(sent.ready.moment in run.compute.known for sent in held)
    run.readers.clear()
    assert run.forward() == run.forward() == []


@pytest.mark.parametrize("asked_for", [False, True])
def test_without_pinned_pages_the_host_brings_the_weights(machine, caplog, asked_for):
    """It is said where the system refused, not where nobody asked."""
    streaming.log_unpinned.cache_clear()
    unpinned = []
    parts = [
        SimpleNamespace(is_pinned=lambda: True, is_asked_for=True, unpin=lambda: unpinned.append("one")),
        SimpleNamespace(is_pinned=lambda: False, is_asked_for=asked_for, unpin=lambda: unpinned.append("other")),
    ]
    run = machine(layers_of(60, 60), parts)
    with caplog.at_level(logging.INFO, "gguf_native"):
        assert run.forward() == run.forward() == run.layers
    assert [message.split(",")[0] for message in caplog.messages] == [
        "GGUF Native: this system does not let the GPU read a file's pages where they are"
    ] * asked_for
    # Half a file's pages serve nothing.
    assert unpinned == ["one", "other"] * asked_for
    # After the next load it is asked again.
    parts[1].is_pinned = lambda: True
    run.streamer.reset()
    assert run.forward() == []


@pytest.mark.parametrize("seed", range(20))
def test_any_forwards_with_memory_that_comes_and_goes(machine, seed):
    choose = random.Random(seed)
    run = machine(layers_of(*(choose.randrange(1, 120) for _ in range(choose.randrange(2, 30)))))
    for _ in range(30):
        for layer in choose.sample(run.layers, len(run.layers) // 4):
            if layer._v.n_pins == 0:
                layer._v.take_away()
                layer._v.fits = choose.random() < 0.5
        path = [layer for layer in run.layers if choose.random() < 0.9]
        assert run.forward(path) == []
        if choose.random() < 0.2:
            run.streamer.reset()
            run.readers.clear()
    run.streamer.reset()
    assert all(layer._v.n_pins == 0 for layer in run.layers)


def test_without_room_for_the_ring_it_is_left_to_the_host_and_said_once(machine, monkeypatch, caplog):
    streaming.log_no_ring.cache_clear()
    run = machine(layers_of(60, 60))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "gguf_native"):
        patch.setattr(torch, "empty", full)
        assert run.forward() == run.forward() == run.layers
    # Who has memory for weights that do not stream was told.
    assert run.n_begun == 1
    assert [message.split(" for the")[0] for message in caplog.messages] == ["GGUF Native: there is no room"]
    # Another sampling tries again.
    run.streamer.reset()
    assert run.forward() == []
    # What is on its way to stay when the ring finds no room: nobody reads it before it is there.
    run.streamer.reset()
    run.layers[1]._v.fits = True
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        run.layers.append(Layer(5, 60))
        run.layers[2].streamer = run.streamer
        run.streamer.after = {run.layers[0]: run.layers[1], run.layers[1]: run.layers[2]}
        run.layers[0]._v.fits = True
        assert run.forward() == [run.layers[2]]
    assert [layer._v.n_pins for layer in run.layers] == [0, 0, 0]
