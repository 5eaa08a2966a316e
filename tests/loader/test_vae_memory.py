"""What decoding takes and how true it stays: a batch one picture at a time, a large picture in strips or in tiles."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

from gguf_native.config import settings
from gguf_native.loader.vae import load_vae
from gguf_native.loader.vae_strips import STRIP_PART
from sampling import normal
from torch.profiler import ProfilerActivity, profile

# In latents: the host's tiles are 128x32, 32x128 and 64x64, and overlap by 16; a side that fits a tile is not cut.
TILES, OVERLAP = (32, 64, 128), 16
# How far the decoder of tiny_flux_taesd sees to each side: test_reach_of_the_small_decoder.
REACH = 19
PIXELS = 8
STEP = 1 / 255

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sliced(monkeypatch):
    """vae_slicing is on."""
    monkeypatch.setenv("GGUF_NATIVE_VAE_SLICING", "true")
    settings.cache_clear()
    yield
    monkeypatch.undo()
    settings.cache_clear()


def peak(run: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at once within `run`, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    changes = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_slices_take_the_memory_of_one_picture(samples, sliced):
    vae = load_vae(str(samples.gguf("tiny_flux_vae", "Q8_0")))
    one, four = normal(1, 16, 16, 16, seed=1), normal(4, 16, 16, 16, seed=1)
    together = peak(lambda: super(type(vae), vae).decode(four))
    alone = peak(lambda: vae.decode(one))
    pictures = 4 * 3 * (16 * PIXELS) ** 2 * 4
    assert together > 3 * alone
    # Twice the pictures: each by itself, and then all in one tensor.
    assert peak(lambda: vae.decode(four)) <= alone + 2 * pictures


def test_strips_take_the_memory_of_three_activations(samples, sliced):
    """The largest ones, and a part of what is free. Plainly attention alone takes 4096 x 4096 weights, twice."""
    vae = load_vae(str(samples.gguf("tiny_flux_vae", "Q8_0")))
    size, free = 64, 2**26
    latent = normal(1, 16, size, size, seed=1)
    pictures = []
    plain = peak(lambda: pictures.append(vae.decode(latent)))
    vae.memory_used_decode = lambda shape, dtype: 1e15
    vae.patcher.get_free_memory = lambda device: free
    in_strips = peak(lambda: pictures.append(vae.decode(latent)))
    assert (pictures[0] - pictures[1]).abs().max() < 1e-5
    largest = 32 * (size * PIXELS) ** 2 * 4
    assert in_strips < 3 * largest + free / STRIP_PART
    assert in_strips < plain / 2


def test_reach_of_the_small_decoder(samples):
    vae = load_vae(str(samples.gguf("tiny_flux_taesd", "Q8_0")))
    latent = normal(1, 16, 4, 64, seed=1)
    other = latent.clone()
    other[..., 32] += 1
    changed = (vae.decode(latent) - vae.decode(other)).abs().amax(dim=(0, 1, 3)).nonzero().flatten() // PIXELS
    assert (int(changed.min()), int(changed.max())) == (32 - REACH, 32 + REACH)


def away_from_seams(size: int) -> torch.Tensor:
    """bool [size]: latents along one side that no tile decodes without seeing all that the whole picture shows them."""
    away = torch.ones(size, dtype=torch.bool)
    for tile in (tile for tile in TILES if tile < size):
        for start in range(0, size - OVERLAP, tile - OVERLAP):
            end = start + tile
            away[start : start + REACH if start else 0] = False
            away[end - REACH : end if end < size else 0] = False
    return away


def test_tiles_are_true_away_from_their_seams(samples, sliced):
    """With a decoder that sees near things only; 96 latents are cut into tiles of 32 and of 64."""
    vae = load_vae(str(samples.gguf("tiny_flux_taesd", "Q8_0")))
    latent = normal(1, 16, 8, 96, seed=1)
    whole = vae.decode(latent)
    vae.memory_used_decode = lambda shape, dtype: 1e15
    tiled = vae.decode(latent)
    away = away_from_seams(96).repeat_interleave(PIXELS)
    assert 0 < away.sum() < len(away)
    assert (tiled - whole)[:, :, away].abs().max() < STEP
    assert (tiled - whole)[:, :, ~away].abs().max() > STEP
