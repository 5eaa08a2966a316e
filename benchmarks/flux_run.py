"""One timed Flux run inside the real ComfyUI engine, in a process of its own; prints one JSON line after RESULT.

    python benchmarks/flux_run.py COMFYUI FILE [--pack] [--resolution 1024] [--steps 8] [--cap GB] [--loras N]
                                  [--rank 16] [--compile] [--save LATENT] [arguments for ComfyUI]

FILE goes through ComfyUI's own loader, or with --pack through this pack's. --cap leaves only so much VRAM free: another
process holds the rest. The noise and the prompt are fixed, so that latents of two runs can be compared.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time

HOLD_MEMORY = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
pieces = int(free - float(sys.argv[1]) * 2**30 - 0.55 * 2**30) >> 28
held = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(pieces)]
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui")
    parser.add_argument("file")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cap", type=float)
    parser.add_argument("--loras", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save")
    return parser.parse_known_args()


options, host_arguments = parse()
for name in ("file", "save"):
    if getattr(options, name):
        setattr(options, name, os.path.abspath(getattr(options, name)))
ballast = None
if options.cap:
    pipe = subprocess.PIPE
    ballast = subprocess.Popen([sys.executable, "-c", HOLD_MEMORY, str(options.cap)], stdin=pipe, stdout=pipe)
    ballast.stdout.readline()

# As ComfyUI's main.py starts, without its server.
sys.argv = ["main.py", *host_arguments]
sys.path.append(options.comfyui)
os.chdir(options.comfyui)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy_aimdo.control  # noqa: E402
from comfy.cli_args import args, enables_dynamic_vram  # noqa: E402

if enables_dynamic_vram():
    comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
import comfy.memory_management  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402

if (
    (args.enable_dynamic_vram or enables_dynamic_vram())
    and mm.is_nvidia()
    and comfy_aimdo.control.init_devices((device.index, 0) for device in mm.get_all_torch_devices())
):
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402


def loras(model, count: int, rank: int):
    """`count` random LoRAs on all attention and MLP matrices of the blocks."""
    wanted = ("attn.qkv", "attn.proj", "mlp", "linear1", "linear2")
    layers = [
        (name, module)
        for name, module in model.model.diffusion_model.named_modules()
        if "_blocks" in name and any(part in name for part in wanted) and hasattr(module, "in_features")
    ]
    for number in range(count):
        generator, tensors = torch.Generator().manual_seed(number), {}
        for name, layer in layers:
            for part, shape in (("down", (rank, layer.in_features)), ("up", (layer.out_features, rank))):
                values = torch.randn(shape, generator=generator).bfloat16() * 0.01
                tensors[f"diffusion_model.{name}.lora_{part}.weight"] = values
        model, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    return model


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone(disable_dynamic=True)
    guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(model=model, backend="inductor", options=guards)
    return model


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sample(model) -> tuple[torch.Tensor, float, float]:
    """The latent, seconds until the first step is done, and the median of the others."""
    side, stamps = options.resolution // 8, []

    def normal(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def stamp(*_) -> None:
        synchronize()
        stamps.append(time.perf_counter())

    pooled = {"pooled_output": normal(1, 768, seed=3) * 0.1, "guidance": 3.5}
    prompt = [[normal(1, 512, 4096, seed=2) * 0.1, pooled]]
    noise, start = normal(1, 16, side, side, seed=1), time.perf_counter()
    latent = comfy.sample.sample(
        model,
        noise,
        options.steps,
        1.0,
        "euler",
        "simple",
        prompt,
        prompt,
        torch.zeros_like(noise),
        callback=stamp,
        seed=1,
    )
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    return latent, stamps[0] - start, statistics.median(steps)


def main() -> dict[str, object]:
    torch.set_grad_enabled(False)
    # As the server runs nodes; torch.compile wants plain tensors.
    with torch.inference_mode(not options.compile):
        start = time.perf_counter()
        if options.pack:
            from gguf_native.loader.diffusion_model import load_diffusion_model

            model = load_diffusion_model(options.file)
        else:
            model = comfy.sd.load_diffusion_model(options.file)
        load = time.perf_counter() - start
        model = loras(model, options.loras, options.rank)
        if options.compile:
            model = compiled(model)
        _, cold, _ = sample(model)
        latent, warm, step = sample(model)
    if options.save:
        torch.save(latent.cpu(), options.save)
    gpu = torch.cuda.is_available()
    return {
        "patcher": type(model).__name__,
        "load": round(load, 2),
        "cold_first_step": round(cold, 3),
        "warm_first_step": round(warm, 3),
        "step": round(step, 4),
        "finite": bool(latent.isfinite().all()),
        "torch_peak_gb": round(torch.cuda.max_memory_reserved() / 2**30, 2) if gpu else None,
        "rss_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main()), flush=True)
    if ballast:
        ballast.kill()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
