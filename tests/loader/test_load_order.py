"""Which weights stay on the GPU where not all of them fit: those that come first in the host's list."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

from comfy.model_management import module_size
from comfy.model_patcher import ModelPatcher
from gguf_native.loader.diffusion_model import load_diffusion_model
from gguf_native.loader.load_order import van_der_corput
from gguf_native.loader.packed_layers import has_packed_weight

FLUX = "tiny_flux_256"


def test_a_van_der_corput_sequence():
    assert van_der_corput(8) == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
    assert [van_der_corput(n) for n in (0, 1, 3)] == [[], [0], [0, 1 / 2, 1 / 4]]


@pytest.mark.parametrize("n", [7, 64, 314, 1000])
def test_any_beginning_of_what_is_sorted_by_it_is_spread_evenly(n):
    places = sorted(range(n), key=van_der_corput(n).__getitem__)
    assert sorted(places) == list(range(n))
    for n_first in range(1, n + 1):
        # Within each eighth of the places lies an eighth of them, three more or less.
        for eighth in range(8):
            start, end = eighth * n // 8, (eighth + 1) * n // 8
            n_there = sum(start <= place < end for place in places[:n_first])
            assert abs(n_there - n_first * (end - start) / n) <= 3


def test_dynamic_vram_keeps_small_packed_weights_and_large_ones_all_over_the_model(samples, dynamic_vram_on_cpu):
    path = str(samples.gguf(FLUX, "Q4_K"))
    with torch.inference_mode():
        patcher = load_diffusion_model(path)
        loading = patcher._load_list(for_dynamic=True)
        in_order = [module for *_, module, _ in loading if has_packed_weight(module)]
        loading.sort()
    large = [module for is_large, *_, module, _ in loading if is_large]
    packed = [module for module in large if has_packed_weight(module)]
    # What the host keeps as it likes comes before.
    assert large[-len(packed) :] == packed
    assert len(packed) > 16
    n_bytes = {module: module_size(module) for module in packed}
    mean = sum(n_bytes.values()) / len(packed)
    small = [module for module in packed if n_bytes[module] <= mean]
    assert len(small) >= 8 and len(packed) - len(small) >= 8
    assert packed[: len(small)] == small
    for some in (small, packed[len(small) :]):
        in_forward = [module for module in in_order if module in some]
        places = sorted(in_forward.index(module) for module in some[: len(some) // 2])
        assert all(later - earlier <= 3 for earlier, later in pairwise(places))
        assert places[0] < 3 and places[-1] >= len(some) - 3


def test_without_dynamic_vram_the_host_chooses(samples):
    with torch.inference_mode():
        patcher = load_diffusion_model(str(samples.gguf(FLUX, "Q4_K")))
        keys = [entry[:-2] for entry in patcher._load_list()]
        assert keys == [entry[:-2] for entry in ModelPatcher._load_list(patcher)]
