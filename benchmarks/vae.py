"""What decoding a picture by Flux's VAE takes plainly and in strips: seconds, and megabytes beside the weights.

    python benchmarks/vae.py COMFYUI [--size 1024 2048] [arguments for ComfyUI]

The decoder is ComfyUI's own at its real size, in bfloat16, with random weights, which enlarge rounding: the difference
is a part of the largest value. Prints a table, and on a GPU without --size writes results/vae.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("comfyui")
parser.add_argument("--size", type=int, nargs="+", default=[1024, 2048])
options, rest = parser.parse_known_args()
sys.argv[1:] = [options.comfyui, "no model", *rest]

# Starts ComfyUI as its arguments say.
import flux_run  # noqa: E402, I001
import comfy.model_management as mm  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from gguf_native.loader.vae import borrowed  # noqa: E402
from gguf_native.loader.vae_strips import Host, StripDecoder  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "vae.json"
CHANNELS, PIXELS_PER_VALUE = 16, 8
# Bytes that are free for the strips before they begin: all there are, and so few that activations wait in RAM.
FREE = {"strips": 1 << 40, "strips, 512 MB free": 512 << 20}


def decoder(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    made = flux_run.flux_decoder()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
    return made.to(device, torch.bfloat16).eval()


def in_strips(made: torch.nn.Module, latent: torch.Tensor, free_bytes: int) -> torch.Tensor:
    before = torch.cuda.memory_allocated()
    host = Host(
        borrow=borrowed,
        attention=comfy.ops.scaled_dot_product_attention,
        free_bytes=lambda: free_bytes - (torch.cuda.memory_allocated() - before),
        pin=mm.pin_memory,
        unpin=mm.unpin_memory,
        between=lambda: None,
        advance=lambda: None,
    )
    return StripDecoder(made, host, latent).decode()


def measured(decode: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, int]:
    """The picture, seconds, and bytes of the GPU at the peak beside what was there before, of the second run."""
    decode()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flux_run.synchronize()
    start = time.perf_counter()
    picture = decode()
    flux_run.synchronize()
    return picture, time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def main() -> None:
    device, rows = mm.get_torch_device(), []
    with torch.inference_mode():
        made = decoder(device)
        for size in options.size:
            side = size // PIXELS_PER_VALUE
            latent = torch.randn(1, CHANNELS, side, side, device=device, dtype=torch.bfloat16)
            plain, *found = measured(lambda latent=latent: made(latent))
            ways = {"plain": (plain, *found)}
            for way, free_bytes in FREE.items():
                ways[way] = measured(lambda latent=latent, free=free_bytes: in_strips(made, latent, free))
            for way, (picture, seconds, peak) in ways.items():
                difference = float((picture.float() - plain.float()).abs().max() / plain.float().abs().max())
                row = {"size": size, "way": way, "seconds": round(seconds, 3), "peak_mb": peak >> 20}
                rows.append(row | {"difference": round(difference, 4)})
                print(f"{size:5} {way:20} {seconds:7.3f} s {peak >> 20:6} MB, difference {difference:.4f}")
    if device.type == "cuda" and options.size == parser.get_default("size"):
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)
