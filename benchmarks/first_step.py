"""Where the time of a first step goes: functions of a new process that take longest, under Python's profiler.

    python benchmarks/first_step.py COMFYUI FILE [--resolution 1024] [arguments of flux_run.py]

Run it twice: the first time may read the file from the disk and compile kernels. The profiler makes all of it longer;
memory.py's row `cold` has the time without. Launches of a GPU do not wait for it, so what waits is shown as itself.
"""

import cProfile
import os
import pstats
import sys
import time

# Starts ComfyUI as its arguments say.
import flux_run
import torch

N_SHOWN = 40


def main() -> None:
    torch.set_grad_enabled(False)
    profile = cProfile.Profile()
    with torch.inference_mode():
        flux_run.options.steps = 2
        start = time.perf_counter()
        with profile:
            model = flux_run.load(flux_run.options.compute[-1])
            loaded = time.perf_counter()
            _, first, step = flux_run.sample(model, flux_run.options.resolution[0])
    print(f"load {loaded - start:.3f} s, first step {first:.3f}, second {step:.3f}, all with the profiler")
    for order in ("tottime", "cumtime"):
        pstats.Stats(profile, stream=sys.stdout).strip_dirs().sort_stats(order).print_stats(N_SHOWN)


if __name__ == "__main__":
    main()
    if flux_run.ballast:
        flux_run.ballast.kill()
    sys.stdout.flush()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
