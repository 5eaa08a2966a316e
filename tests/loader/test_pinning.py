"""Parts of files pinned within what the host allows itself: all or none, and others spared for them."""

import logging

import pytest

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.cli_args
import comfy.model_management as mm
from gguf_native.loader import pinning
from gguf_native.loader.pinning import pin_parts
from pinned_machine import GPU, PINNED_BEFORE, Part, pinning_machine


@pytest.fixture(autouse=True)
def system(host, monkeypatch):
    yield from pinning_machine(monkeypatch)


@pytest.fixture
def files(system) -> list[Part]:
    return [Part(500, system.done), Part(70, system.done)]


def test_the_host_counts_what_is_pinned_once(system, files):
    assert pin_parts(files[:1], GPU)
    assert pin_parts(files, GPU)
    assert system.asked == [500, 500, 70, 70]
    assert system.done == [("pin", 500, GPU), ("pin", 70, GPU)]
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 570
    # By the next load nothing is left to do, whatever room there is by then.
    system.room.budget = False
    assert pin_parts(files, GPU)
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE + 570


def test_what_is_pinned_already_goes_where_the_rest_finds_no_room(system, files):
    assert pin_parts(files[:1], GPU)
    system.room.budget = False
    assert not pin_parts(files, GPU)
    assert not files[0].is_asked_for and mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE


@pytest.mark.parametrize("enough", [True, False])
def test_where_there_is_no_room_what_can_be_spared_is_unpinned(system, files, monkeypatch, enough):
    spare = Part(30, system.done)
    spare.pin(GPU)
    system.done.clear()
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda nbytes: enough and not spare.is_asked_for)
    assert pin_parts(files, GPU, spare=[spare]) == enough
    assert system.done == [("unpin", 30), ("pin", 500, GPU), ("pin", 70, GPU)][: 3 if enough else 1]
    # Where there is room it stays.
    spare.pin(GPU)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda nbytes: True)
    for part in files:
        part.unpin()
    assert pin_parts(files, GPU, spare=[spare]) and spare.is_asked_for


def refused(system, files, caplog) -> list[str]:
    """What is said twice over where files are not pinned."""
    with caplog.at_level(logging.INFO, "gguf_native"):
        assert not pin_parts(files, GPU)
        assert not pin_parts(files, GPU)
    assert system.done == []
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    return caplog.messages


@pytest.mark.parametrize("limit", ["budget", "registerable"])
def test_without_room_it_is_left_to_the_host_and_said_once(system, files, caplog, limit):
    setattr(system.room, limit, False)
    (message,) = refused(system, files, caplog)
    assert message.startswith(
        "GGUF Native: a model's or a LoRA's file does not fit into RAM beside what is there, so it"
    )


@pytest.mark.parametrize("option", ["disable_pinned_memory", "fast_disk"])
def test_the_hosts_options_keep_files_from_being_pinned(system, files, caplog, monkeypatch, option):
    monkeypatch.setattr(comfy.cli_args.args, option, True)
    assert refused(system, files, caplog) == []
    # Nobody's memory was taken for it either.
    assert system.asked == []


def test_systems_that_pin_no_files(system, files, caplog, monkeypatch):
    monkeypatch.setattr(pinning, "SYSTEM_CAN", False)
    (message,) = refused(system, files, caplog)
    assert message.startswith("GGUF Native: this system does not let the GPU read a file's pages where they are")
    assert system.asked == []


def test_what_the_driver_refuses_is_not_asked_again_nor_counted(system, files, caplog):
    assert pin_parts(files, GPU)
    # The answer comes later.
    files[1].is_refused = True
    with caplog.at_level(logging.INFO, "gguf_native"):
        assert not pin_parts(files, GPU)
        assert not pin_parts(files, GPU)
    # The other half alone serves nothing.
    assert system.done[-2:] == [("unpin", 500), ("unpin", 70)]
    assert mm.TOTAL_PINNED_MEMORY == PINNED_BEFORE
    assert system.asked == [570, 570]
    assert len(caplog.messages) == 1
