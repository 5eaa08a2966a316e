"""The arithmetic of `recommend` on figures that a hand can follow, its advice, and the command on this machine."""

import json
import math

import pytest
from gguf_native.__main__ import main
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer import recommend
from gguf_native.quantizer.known_models import MODELS, KnownModel, Weight
from gguf_native.quantizer.measure import Figures, TypeFigures, available_ram, find_device, type_error

GIB = recommend.GIB
# 40 blocks of 2.5e8 weights in all, and 1000 small values; a step of 2 x 5e12 operations.
BLOCKS = Weight("blocks.{}.a.weight", (2500, 2560), 40)
TOY = KnownModel("toy", "Toy", "64x64", BLOCKS.values + 1000, 5e12, 2, 64 * 64, 1.0, (BLOCKS,))
# A GPU of 10 TFLOP/s on a bus of 0.2 GB/s that decodes a billion weights in a second.
FIGURES = Figures(0.2e9, 1e13, {name: TypeFigures(0.07, 1e9) for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")})
FIGURES.types["BF16"] = TypeFigures(0.0017, 1e9)


def test_sizes_follow_from_the_mixture():
    values = recommend.mixture(TOY, "Q6_K")
    assert values == {"Q6_K": BLOCKS.values, "BF16": 1000}
    assert recommend.file_bytes(values) == BLOCKS.values / 256 * 210 + 2000


def test_what_the_forward_needs_is_not_for_weights():
    assert recommend.working_bytes(TOY) == 1.2 * GIB
    wan = MODELS["wan"]
    assert recommend.working_bytes(wan) == pytest.approx((131040 * 2 * 0.9 * 0.01 + 409.6) * 2**20)


@pytest.mark.parametrize(
    ("compute", "decode", "stream", "added"),
    [(1.0, 0.2, 0.0, 0.2), (1.0, 0.2, 1.0, 0.2), (1.0, 0.2, 1.5, 0.5), (0.0, 0.0, 2.0, 2.0)],
)
def test_streaming_costs_what_is_not_hidden(compute, decode, stream, added):
    assert recommend.added_seconds(compute, decode, stream) == pytest.approx(added)


def test_a_choice_by_hand():
    choice = recommend.choose(TOY, "Q6_K", FIGURES, 1.25 * GIB)
    n_bytes = BLOCKS.values / 256 * 210 + 2000
    resident = 0.05 * GIB
    assert choice.file_bytes == n_bytes
    assert choice.resident_bytes == pytest.approx(resident)
    assert choice.streamed_bytes == choice.ram_bytes == pytest.approx(n_bytes - resident)
    assert choice.stream_seconds == pytest.approx((n_bytes - resident) / 0.2e9)
    assert choice.decode_seconds == pytest.approx(BLOCKS.values / 1e9)
    # A step of 1 s hides the streaming of less.
    assert choice.stream_seconds < 1
    assert choice.slowdown == choice.added_seconds == pytest.approx(0.256)


def test_without_a_card_all_is_in_main_memory():
    choice = recommend.choose(TOY, "Q8_0", FIGURES, None)
    assert choice.resident_bytes == choice.ram_bytes == choice.file_bytes
    assert choice.streamed_bytes == choice.stream_seconds == 0


def test_errors_add_up_by_their_squares():
    error = recommend.weight_error({"Q4_K": 3, "BF16": 1}, {"Q4_K": 0.08, "BF16": 0.0})
    assert error == pytest.approx(0.08 * math.sqrt(3 / 4))


def choice(file_type, slowdown, error, ram_bytes=0.0, n_bytes=1e9):
    return recommend.Choice(file_type, n_bytes, 4.0, n_bytes, 0.0, ram_bytes, 0.0, 0.0, slowdown, slowdown, error)


@pytest.mark.parametrize(
    ("choices", "ram", "taken"),
    [
        ([choice("Q4_K_S", 0.05, 0.07), choice("Q6_K", 0.09, 0.02), choice("Q8_0", 0.3, 0.005)], None, "Q6_K"),
        ([choice("Q2_K", 0.2, 0.3), choice("Q4_K_S", 0.3, 0.07), choice("Q8_0", 0.9, 0.005)], None, "Q4_K_S"),
        ([choice("Q4_K_S", 0.05, 0.07, 3e9), choice("Q8_0", 0.05, 0.005, 9e9)], 4e9, "Q4_K_S"),
        ([choice("Q4_K_S", 0.05, 0.07, 5e9, 5e9), choice("Q8_0", 0.05, 0.005, 9e9, 9e9)], 1e9, "Q4_K_S"),
        ([choice("Q2_K", 0.08, 0.23), choice("Q4_K_S", 0.12, 0.068)], None, "Q4_K_S"),
        ([choice("Q8_0", 0.05, 0.005), choice("BF16", 0.0, 0.0017)], None, "Q8_0"),
    ],
    ids=[
        "best of the cheap",
        "fastest good one",
        "fits the memory",
        "smallest where none fits",
        "not for nothing",
        "not 16 bits",
    ],
)
def test_which_one_is_taken(choices, ram, taken):
    chosen, why = recommend.best(choices, ram)
    assert chosen.file_type == taken
    assert why.endswith(".")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_plausible_files(name):
    model = MODELS[name]
    assert 0.97 < sum(weight.values for weight in model.weights) / model.values <= 1
    bits = [recommend.file_bytes(recommend.mixture(model, kind)) * 8 / model.values for kind in recommend.OFFERED]
    # BF16, with the few tensors that stay F32.
    assert bits[-1] == pytest.approx(16, rel=0.02)
    assert bits == sorted(bits)
    assert all(a > FORMATS["Q2_K"].block_bytes * 8 / 256 for a in bits)


def test_the_command_measures_this_machine(capsys):
    assert main(["recommend", "--model", "sdxl", "--vram", "6GB", "--ram", "64GB", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    by_type = {choice["file_type"]: choice for choice in advice["choices"]}
    assert list(by_type) == list(recommend.OFFERED)
    assert advice["recommended"] in by_type
    assert ("no GPU found" in advice["setting"]) is not find_device().is_gpu
    assert by_type["Q4_K_S"]["decode_seconds"] > 0
    # A card of 1 GB holds none of it, and no GPU here says how fast the bus of that one is.
    assert main(["recommend", "--model", "sdxl", "--vram", "1GB", "--ram", "64GB", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert all(choice["stream_seconds"] > 0 for choice in advice["choices"])
    assert ("PCIe 3.0" in advice["setting"]) is not find_device().is_gpu
    taken = next(choice for choice in advice["choices"] if choice["file_type"] == advice["recommended"])
    assert taken["error"] <= recommend.GOOD_ERROR
    assert by_type["Q8_0"]["error"] == pytest.approx(0.005, rel=0.1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q2_K", "IQ4_XS"])
def test_measured_errors_are_those_that_compute_goes_by(host, name):
    from gguf_native.ops.compute import FORMAT_ERROR

    assert type_error(name) == pytest.approx(FORMAT_ERROR[name], rel=0.03)


def test_free_memory_is_told_or_not_known():
    assert available_ram() is None or available_ram() > 1 << 26
