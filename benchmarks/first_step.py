"""Where the time of a new process's first step goes, and that of the same step of a later sampling.

    python benchmarks/first_step.py COMFYUI FILE [--profile] [--resolution 1024] [arguments of flux_run.py]

FILE is a Flux. Run it twice: the first time may read the file from the disk and compile kernels. The times are the
processor's, which gives the GPU its work and does not wait for it, but for the last line. --profile prints the
functions of loading and two steps that take longest instead: Python's profiler makes all of it longer.
"""

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections import Counter

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--profile", action="store_true")
chosen, sys.argv[1:] = parser.parse_known_args()

# Starts ComfyUI as its arguments say.
import flux_run  # noqa: E402

options = flux_run.options
import comfy.model_management as mm  # noqa: E402
import torch  # noqa: E402

N_FUNCTIONS, N_PARTS = 40, 12
# Two, for a sampling of one has no step to take the time of.
options.steps = 2


class Clock:
    """Seconds from each mark to the next, under the name of the mark that ends them."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.spent, self.is_running, self.last = Counter(), True, time.perf_counter()

    def mark(self, name: str) -> None:
        if self.is_running:
            now = time.perf_counter()
            self.spent[name] += now - self.last
            self.last = now

    def before(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.mark(name))

    def after(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda *_: self.mark(name))


def watch(stages: Clock, parts: Clock, flux: torch.nn.Module) -> None:
    """Have a model tell `stages` how far it is, and `parts` of the layers of its first block."""
    first, last, load = flux.double_blocks[0], flux.double_blocks[-1], mm.load_models_gpu

    def watched_load(*args, **kwargs) -> None:
        stages.mark("up to the patcher")
        load(*args, **kwargs)
        stages.mark("the patcher")

    mm.load_models_gpu = watched_load
    stages.before(flux, "up to the forward")
    stages.before(first, "embeddings")
    stages.after(first, "first double block")
    stages.after(last, "other double blocks")
    stages.after(flux.single_blocks[0], "first single block")
    stages.after(flux.single_blocks[-1], "other single blocks")
    stages.after(flux, "last layer")
    parts.before(first, "(before the block)")
    for name, layer in first.named_modules():
        if not any(layer.children()):
            parts.before(layer, f"up to {name}")
            parts.after(layer, name)
    parts.after(first, "to its end")


def sampled(stages: Clock, parts: Clock, model, resolution: int) -> tuple[Counter, Counter]:
    """What each has marked in the first step of a sampling."""
    synchronize = flux_run.synchronize

    def end_of_step() -> None:
        synchronize()
        stages.mark("until the GPU is done")
        stages.is_running = parts.is_running = False

    stages.start()
    parts.start()
    flux_run.synchronize = end_of_step
    flux_run.sample(model, resolution)
    flux_run.synchronize = synchronize
    del parts.spent["(before the block)"]
    return stages.spent, parts.spent


def print_times(of_process: Counter, later: Counter, names: list[str]) -> None:
    for name in names:
        print(f"{name:32} {of_process[name]:7.3f} {later[name]:7.3f}")


def time_stages(resolution: int) -> None:
    start = time.perf_counter()
    model = flux_run.load(options.compute[-1])
    loading = Counter({"loading": time.perf_counter() - start})
    stages, parts = Clock(), Clock()
    watch(stages, parts, model.model.diffusion_model)
    (first, of_block), (later, of_block_later) = (sampled(stages, parts, model, resolution) for _ in range(2))
    first += loading
    print(f"{'seconds until the first step is done':32} {first.total():7.3f} {later.total():7.3f}")
    print_times(first, later, ["loading", *later])
    print("of the first double block, what the first time takes longest")
    print_times(of_block, of_block_later, [name for name, _ in (of_block - of_block_later).most_common(N_PARTS)])


def profile(resolution: int) -> None:
    profiler = cProfile.Profile()
    with profiler:
        model = flux_run.load(options.compute[-1])
        flux_run.sample(model, resolution)
    for order in ("tottime", "cumtime"):
        pstats.Stats(profiler, stream=sys.stdout).strip_dirs().sort_stats(order).print_stats(N_FUNCTIONS)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with torch.inference_mode():
        (profile if chosen.profile else time_stages)(options.resolution[0])
    if flux_run.ballast:
        flux_run.ballast.kill()
    sys.stdout.flush()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
