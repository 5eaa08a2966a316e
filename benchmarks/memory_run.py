"""One process of memory.py: Flux in the real ComfyUI engine, its times and the memory that each stage takes.

    python benchmarks/memory_run.py COMFYUI FILE [--decode] [--change-loras] [arguments of flux_run.py]

Stages: loading, a first sampling, two more of which the times are taken (eight of small pictures), with --decode a
picture by a VAE of Flux's size. Several --compute are run in turns. --change-loras times the first step after the LoRAs
got another strength, and after others took their place, three times each.
Prints one JSON line for each compute and resolution after RESULT. VRAM is that of the whole device since the start,
without the CUDA context, and null without a GPU.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import threading
import time

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--decode", action="store_true")
parser.add_argument("--change-loras", action="store_true")
stages, sys.argv[1:] = parser.parse_known_args()

# Starts ComfyUI as its arguments say.
import flux_run  # noqa: E402

options = flux_run.options
import comfy.sd  # noqa: E402
import torch  # noqa: E402

GB = 2**30
ROUNDS = 3
# The processor sets the pace of small pictures, and its times vary.
LARGE, ROUNDS_OF_SMALL = 1024, 9
SECONDS_BETWEEN_LOOKS = 0.01
# Far enough for the factors to be scaled anew.
OTHER_STRENGTH = 0.5


class LeastFree:
    """The GPU memory that was taken at most within the block, in `gb`: asked every ten milliseconds."""

    def __init__(self, free_at_start: int | None):
        self.free_at_start = self.least = free_at_start
        self.ended = threading.Event()

    def __enter__(self) -> "LeastFree":
        self.thread = threading.Thread(target=self._look)
        if self.free_at_start is not None:
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.free_at_start is not None:
            self.thread.join()

    def _look(self) -> None:
        is_last = False
        while not is_last:
            is_last = self.ended.wait(SECONDS_BETWEEN_LOOKS)
            self.least = min(self.least, free())

    @property
    def gb(self) -> float | None:
        return None if self.least is None else round((self.free_at_start - self.least) / GB, 2)


def free() -> int | None:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def rss_peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def flux_vae() -> comfy.sd.VAE:
    """ComfyUI's own, not packed, with random weights."""
    with torch.device("meta"):
        shapes = {f"decoder.{name}": tensor.shape for name, tensor in flux_run.flux_decoder().state_dict().items()}
    return comfy.sd.VAE(sd={name: torch.randn(shape).half() * 0.02 for name, shape in shapes.items()})


def changed(model, other, resolution: int) -> float:
    """Seconds that the first step takes longer after a change between two models: medians, for they vary by as much."""
    flux_run.sample(model, resolution)
    after_change, usual = [], []
    for one in (other, model, other):
        for firsts in (after_change, usual):
            _, first, _ = flux_run.sample(one, resolution)
            firsts.append(first)
    return round(statistics.median(after_change) - statistics.median(usual), 3)


def main() -> None:
    torch.set_grad_enabled(False)
    free_at_start = free()
    rss_at_start = rss_peak()
    with torch.inference_mode():
        bases, models, loading = {}, {}, {}
        for compute in options.compute:
            start = time.perf_counter()
            with LeastFree(free_at_start) as taken:
                bases[compute] = flux_run.load(compute)
            loading[compute] = round(time.perf_counter() - start, 2), taken.gb
            models[compute] = flux_run.loras(bases[compute], options.loras, options.rank)
        for resolution in options.resolution:
            measure(bases, models, loading, resolution, free_at_start, rss_at_start)


def measure(
    bases: dict, models: dict, loading: dict, resolution: int, free_at_start: int | None, rss_at_start: float
) -> None:
    """Print a row for each compute."""
    first, sampling, warm = {}, {}, {compute: [] for compute in models}
    for compute, model in models.items():
        with LeastFree(free_at_start) as taken:
            latent, first[compute], _ = flux_run.sample(model, resolution)
        sampling[compute] = taken.gb
    for _ in range((ROUNDS if resolution >= LARGE else ROUNDS_OF_SMALL) - 1):
        for compute, model in models.items():
            warm[compute].append(flux_run.sample(model, resolution))
    strength, swap = {}, {}
    for compute, model in models.items() if stages.change_loras else ():
        base, count, rank = bases[compute], options.loras, options.rank
        strength[compute] = changed(model, flux_run.loras(base, count, rank, OTHER_STRENGTH), resolution)
        swap[compute] = changed(model, flux_run.loras(base, count, rank, first=count), resolution)
    with LeastFree(free_at_start) as decoding:
        if stages.decode:
            flux_vae().decode(latent)
            flux_run.synchronize()
    for compute, model in models.items():
        seconds, at_loading = loading[compute]
        row = {
            "compute": compute,
            "resolution": resolution,
            "patcher": type(model).__name__,
            "load": seconds,
            "cold_first_step": round(first[compute], 3),
            "warm_first_step": round(min(to_first for _, to_first, _ in warm[compute]), 3),
            "step": round(statistics.median(step for _, _, step in warm[compute]), 4),
            "steps": [round(step, 4) for _, _, step in warm[compute]],
            "finite": all(bool(latent.isfinite().all()) for latent, _, _ in warm[compute]),
            "error": flux_run.error(warm[compute][-1][0].cpu().double(), compute, resolution),
            "after_change_of_strength": strength.get(compute),
            "after_swap_of_loras": swap.get(compute),
            "vram_loading_gb": at_loading,
            "vram_sampling_gb": sampling[compute],
            "vram_decoding_gb": decoding.gb if stages.decode else None,
            "vram_left_gb": None if free_at_start is None else round((free_at_start - free()) / GB, 2),
            "rss_start_gb": rss_at_start,
            "rss_peak_gb": rss_peak(),
        }
        print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
    if flux_run.ballast:
        flux_run.ballast.kill()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
