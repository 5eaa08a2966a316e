"""Timed Flux runs inside the real ComfyUI engine, in one process; prints one JSON line each after RESULT.

    python benchmarks/flux_run.py COMFYUI FILE [--compute native exact fp8 ...] [--resolution 1024 512 ...] [--steps 7]
                                  [--cap GB] [--loras N] [--rank 16] [--compile] [--latents FOLDER]
                                  [arguments for ComfyUI]

"native" is ComfyUI's own run of the bfloat16 weights that the GGUF file decodes to; the others are this pack's ways to
compute. --cap leaves only so much VRAM free: another process holds the rest. Noise and prompt are fixed: the error is
that of the latent against the native one, of this process or of an earlier one that left it in FOLDER.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

from ballast import hold_all_but
from random_lora import is_changed, lora_file


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui")
    parser.add_argument("file")
    parser.add_argument("--compute", nargs="+", default=["native", "exact"])
    parser.add_argument("--resolution", type=int, nargs="+", default=[1024])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--cap", type=float)
    parser.add_argument("--loras", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--latents")
    return parser.parse_known_args()


options, host_arguments = parse()
for name in ("comfyui", "file", "latents"):
    if getattr(options, name):
        setattr(options, name, os.path.abspath(getattr(options, name)))
ballast = hold_all_but(options.cap) if options.cap else None

# As ComfyUI's main.py starts, without its server.
sys.argv = ["main.py", *host_arguments]
# All models of a run stay, if its environment says nothing else.
os.environ.setdefault("GGUF_NATIVE_MEMORY_MODE", "conservative")
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
    # What the server sets by default; otherwise each request for memory is printed.
    comfy_aimdo.control.set_log_info()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.ldm.modules.diffusionmodules.model import Decoder  # noqa: E402
from gguf_native.loader import open_gguf  # noqa: E402
from gguf_native.loader.diffusion_model import load_diffusion_model  # noqa: E402
from gguf_native.loader.lora import apply_lora  # noqa: E402
from gguf_native.ops import dequantize  # noqa: E402
from gguf_native.ops.dequantize import has_kernel  # noqa: E402
from gguf_native.ops.formats import FORMATS  # noqa: E402

# Tokens, their width, and that of the pooled text.
SDXL_TEXT = 77, 2048, 1280

# What the pack does while the server starts.
has_kernel(FORMATS["Q8_0"], mm.get_torch_device())


def loras(model, count: int, rank: int, strength: float = 1.0, first: int = 0):
    """`count` random LoRAs, from files beside the model's as the pack's node takes them; others for another `first`."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.model.diffusion_model.named_modules()
        if is_changed(name) and hasattr(module, "in_features")
    }
    file = Path(options.file)
    for number in range(first, first + count):
        path = lora_file(file.with_name(f"{file.stem}-lora-{rank}-{number}.safetensors"), number, rank, shapes)
        model, _ = apply_lora(model, None, str(path), strength, 0.0)
    return model


def flux_decoder() -> Decoder:
    """ComfyUI's own decoder of Flux's VAE, at its real size."""
    return Decoder(
        z_channels=16,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_resolutions=[],
    )


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone(disable_dynamic=True)
    guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(model=model, backend="inductor", options=guards)
    return model


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sample(model, resolution: int, batch: int = 1) -> tuple[torch.Tensor, float, float]:
    """The latent, seconds until the first step is done, and the median of the others."""
    side, stamps, unet = resolution // 8, [], model.model.diffusion_model
    # As wide as the model wants them: 4096 and 768 in Flux.1-dev; SDXL's is not written in the model.
    params = getattr(unet, "params", None)
    texts, wide, pooled_wide = (512, params.context_in_dim, params.vec_in_dim) if params else SDXL_TEXT

    def normal(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def stamp(*_) -> None:
        synchronize()
        stamps.append(time.perf_counter())

    pooled = {"pooled_output": normal(1, pooled_wide, seed=3) * 0.1, "guidance": 3.5}
    prompt = [[normal(1, texts, wide, seed=2) * 0.1, pooled]]
    noise, start = normal(batch, model.model.latent_format.latent_channels, side, side, seed=1), time.perf_counter()
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


def load(compute: str):
    return load_native(options.file) if compute == "native" else load_diffusion_model(options.file, compute=compute)


def load_native(path: str, disable_dynamic: bool = False):
    model = comfy.sd.load_diffusion_model_state_dict(decoded(path), disable_dynamic=disable_dynamic)
    # With which the host makes a clone for torch.compile.
    model.cached_patcher_init = (load_native, (path,))
    return model


def decoded(path: str) -> dict[str, torch.Tensor]:
    """The file's tensors as bfloat16 in RAM; how exactly they decode is the business of the tests."""
    device = mm.get_torch_device()
    with open_gguf(path) as file:
        return {
            name: dequantize(file.read(name).to(device), info.type, info.shape, torch.bfloat16).cpu()
            for name, info in file.tensors.items()
        }


def measure(model, compute: str, resolution: int) -> dict[str, object]:
    torch.cuda.reset_peak_memory_stats()
    latent, first, step = sample(model, resolution)
    return {
        "first_step": round(first, 3),
        "step": round(step, 4),
        "finite": bool(latent.isfinite().all()),
        "error": error(latent.cpu().double(), compute, resolution),
        # Under DynamicVRAM without the weights, which are not torch's.
        "torch_peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 3),
    }


def error(latent: torch.Tensor, compute: str, resolution: int) -> float | None:
    """Relative to the native latent of the same resolution, LoRAs and weights; None if there is none."""
    name = f"{os.path.basename(options.file)}-{resolution}-{options.loras}-{options.rank}-{options.steps}.pt"
    path = os.path.join(options.latents or "/nowhere", name)
    if compute == "native":
        natives[name] = latent
        if options.latents:
            torch.save(latent, path)
    elif name not in natives and os.path.exists(path):
        natives[name] = torch.load(path)
    native = natives.get(name)
    return None if native is None else float((latent - native).norm() / native.norm())


natives: dict[str, torch.Tensor] = {}


def load_all() -> dict[str, tuple]:
    """compute -> (model, seconds of loading)."""
    models = {}
    for compute in options.compute:
        start = time.perf_counter()
        model = load(compute)
        seconds = time.perf_counter() - start
        model = loras(model, options.loras, options.rank)
        models[compute] = compiled(model) if options.compile else model, seconds
    return models


def main() -> None:
    torch.set_grad_enabled(False)
    # As the server runs nodes; torch.compile wants plain tensors.
    with torch.inference_mode(not options.compile):
        models = load_all()
        for resolution in options.resolution:
            # In turns, because a machine's speed drifts.
            rounds = [{name: measure(model, name, resolution) for name, (model, _) in models.items()} for _ in range(3)]
            for compute, (model, seconds) in models.items():
                cold, *warm = [measured[compute] for measured in rounds]
                row = {
                    "compute": compute,
                    "resolution": resolution,
                    "patcher": type(model).__name__,
                    "load": round(seconds, 2),
                    "cold_first_step": cold["first_step"],
                    "warm_first_step": min(measured["first_step"] for measured in warm),
                    "step": statistics.median(measured["step"] for measured in warm),
                    "steps": [measured["step"] for measured in warm],
                    "finite": all(measured["finite"] for measured in warm),
                    "error": warm[-1]["error"],
                    "torch_peak_gb": warm[-1]["torch_peak_gb"],
                    "rss_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                }
                print("RESULT " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
    if ballast:
        ballast.kill()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
