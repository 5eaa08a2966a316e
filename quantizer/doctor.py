"""`doctor`: what of this machine slows GGUF models down, and the command that would change it; it changes nothing."""

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .measure import bus_bytes_per_second
from .printing import say, say_json, size

if sys.platform != "win32":
    import resource

HELP = "driver, torch, triton, ComfyUI, DynamicVRAM, memory settings and bus: what to change, and the command"

PACK = Path(__file__).resolve().parents[1]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SWAPPINESS = Path("/proc/sys/vm/swappiness")
KERNEL = Path("/proc/sys/kernel/osrelease")
# What ComfyUI asks for: DynamicVRAM needs this torch, comfy-aimdo this CUDA, the pack this ComfyUI.
DYNAMIC_VRAM_TORCH = (2, 8)
AIMDO_CUDA = (12, 8)
LEAST_COMFYUI = (0, 30)
# PCIe 3.0 with 16 lanes carries 12 GB/s; less means fewer lanes or an older slot.
LEAST_BUS = 11e9
LEAST_FREE_VRAM = 0.8
LEAST_FREE_DISK = 20e9
PINNED_TRIAL = 1 << 30
MOST_SWAPPINESS = 20


class Finding(NamedTuple):
    """What was looked at and found. `ok` is None where there is nothing to judge; then or where False, `advice`
    says why or what to do, and `command` does it, '' where no command can."""

    what: str
    value: str
    ok: bool | None = None
    advice: str = ""
    command: str = ""


class Place(NamedTuple):
    """Where to look: the folder of ComfyUI, or None."""

    comfyui: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--comfyui", type=Path, metavar="PATH", help="ComfyUI's folder; default: the one around this pack"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Always 0: what is found is advice."""
    findings = examine(Place(arguments.comfyui or surrounding_comfyui()))
    if arguments.json:
        say_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            say(*lines(finding))
    return 0


def examine(place: Place) -> list[Finding]:
    """The findings of all checks, in their order."""
    return [check(place) for check in CHECKS]


def lines(finding: Finding) -> list[str]:
    """A finding as the terminal shows it."""
    mark = {True: "ok", False: "!!", None: "--"}[finding.ok]
    shown = [f"{mark}  {finding.what}: {finding.value}"]
    shown += [f"      {finding.advice}"] if finding.advice else []
    return shown + ([f"      $ {finding.command}"] if finding.command else [])


def surrounding_comfyui() -> Path | None:
    """ComfyUI's folder, if the pack lies in its custom_nodes or `comfyui_version` is importable."""
    spec = importlib.util.find_spec("comfyui_version")
    if spec and spec.origin:
        return Path(spec.origin).parent
    return PACK.parents[1] if PACK.parent.name == "custom_nodes" else None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 8) of 2.8.0+cu128."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def installed(package: str) -> str | None:
    """The version of a package of this Python, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver(place: Place) -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("driver", "no nvidia-smi: no NVIDIA driver here", None, "An NVIDIA GPU needs its driver.")
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    found = done.stdout.strip().replace("\n", "; ")
    if done.returncode:
        return Finding("driver", done.stdout.strip() or done.stderr.strip(), False, "Install the driver again.")
    return Finding("driver", found, True)


def torch_build(place: Place) -> Finding:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    value = f"{torch.__version__}, built for {built or 'the CPU'}"
    if built is None and shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA driver, but this torch cannot use it: install a CUDA build."
        return Finding("torch", value, False, advice, install_torch("--force-reinstall"))
    if torch.version.cuda and not torch.cuda.is_available():
        return Finding("torch", value, False, "It finds no usable GPU: the driver is too old, or no GPU is visible.")
    if numbers(torch.__version__) < DYNAMIC_VRAM_TORCH:
        return Finding("torch", value, False, "DynamicVRAM needs torch 2.8 or newer.", install_torch("--upgrade"))
    return Finding("torch", value, True if built else None)


def install_torch(how: str) -> str:
    """The command; none on Windows, where the package index has builds for the CPU only."""
    return "" if sys.platform == "win32" else f"{sys.executable} -m pip install {how} torch"


def triton(place: Place) -> Finding:
    version = installed("triton") or installed("triton-windows")
    if version:
        return Finding("triton", version, True)
    if not torch.cuda.is_available():
        return Finding("triton", "not installed", None, "It is of use on a GPU only.")
    package = "triton-windows" if sys.platform == "win32" else "triton"
    advice = "Without it the GPU decodes with plain torch operations, 6 to 20 times as slow."
    return Finding("triton", "not installed", False, advice, f"{sys.executable} -m pip install {package}")


def comfyui(place: Place) -> Finding:
    if place.comfyui is None:
        return Finding("ComfyUI", "not found", None, "Name its folder with --comfyui, or run this from custom_nodes.")
    file = place.comfyui / "comfyui_version.py"
    version = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    if version is None:
        return Finding("ComfyUI", f"{place.comfyui} holds none", False, "Name the folder that holds main.py.")
    if numbers(version[1]) < LEAST_COMFYUI:
        return Finding("ComfyUI", version[1], False, "The pack needs 0.30.", f"git -C {place.comfyui} pull")
    return Finding("ComfyUI", f"{version[1]} in {place.comfyui}", True)


def dynamic_vram(place: Place) -> Finding:
    """By ComfyUI's own rule; what it is started with is not known here."""
    reason = why_no_dynamic_vram()
    if reason:
        advice = "Weights are loaded into RAM up front, and what the GPU does not hold is copied layer by layer."
        return Finding("DynamicVRAM", f"off: {reason}", None if not torch.cuda.is_available() else False, advice)
    value = "on, unless ComfyUI is started with --disable-dynamic-vram, --highvram, --gpu-only, --novram or --cpu"
    return Finding("DynamicVRAM", value, True)


def why_no_dynamic_vram() -> str | None:
    """Why ComfyUI starts without DynamicVRAM, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip:
        return "it is for NVIDIA GPUs, --enable-dynamic-vram tries it elsewhere"
    if is_wsl():
        return "this is WSL, --enable-dynamic-vram tries it all the same"
    if numbers(torch.__version__) < DYNAMIC_VRAM_TORCH:
        return f"torch {torch.__version__} is older than 2.8"
    if numbers(torch.version.cuda) < AIMDO_CUDA:
        return f"torch is built for CUDA {torch.version.cuda}, comfy-aimdo needs 12.8"
    if installed("comfy-aimdo") is None:
        return "comfy-aimdo is not installed in this Python"
    return None


def is_wsl() -> bool:
    return KERNEL.exists() and "microsoft" in KERNEL.read_text().lower()


def huge_pages(place: Place) -> Finding:
    if not HUGE_PAGES.exists():
        return Finding("transparent huge pages", f"no such setting on {platform.system()}")
    text = HUGE_PAGES.read_text().strip()
    chosen = re.search(r"\[(\w+)\]", text)
    value = chosen[1] if chosen else text
    if value == "always":
        return Finding("transparent huge pages", value, True)
    advice = "With `always` large buffers in RAM are mapped with fewer, larger pages; until the next start."
    return Finding("transparent huge pages", value, False, advice, f"echo always | sudo tee {HUGE_PAGES}")


def swappiness(place: Place) -> Finding:
    if not SWAPPINESS.exists():
        return Finding("swappiness", f"no such setting on {platform.system()}")
    value = int(SWAPPINESS.read_text())
    if value <= MOST_SWAPPINESS:
        return Finding("swappiness", str(value), True)
    advice = "A lower one keeps weights that wait in RAM from being swapped out; until the next start."
    return Finding("swappiness", str(value), False, advice, "sudo sysctl vm.swappiness=10")


def pinned_memory(place: Place) -> Finding:
    """Tried, because CUDA need not keep to the system's limit."""
    limit = f"the system's limit is {locked_memory_limit()}"
    if not torch.cuda.is_available():
        return Finding("pinned memory", f"not tried: torch finds no GPU; {limit}")
    try:
        torch.empty(PINNED_TRIAL, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        advice = "Without pinned memory streaming waits for slow copies. Raise the limit before ComfyUI starts:"
        return Finding("pinned memory", f"{error}; {limit}", False, advice, "ulimit -l unlimited")
    return Finding("pinned memory", f"{size(PINNED_TRIAL)} can be pinned; {limit}", True)


def locked_memory_limit() -> str:
    if sys.platform == "win32":
        return "about half of the RAM"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "none" if soft == resource.RLIM_INFINITY else size(soft)


def bus(place: Place) -> Finding:
    if not torch.cuda.is_available():
        return Finding("bus to the GPU", "not measured: torch finds no GPU")
    try:
        rate = bus_bytes_per_second(torch.device("cuda", 0))
    except RuntimeError as error:
        return Finding("bus to the GPU", f"not measured: {error}", False, "Free memory on the GPU and try again.")
    value = f"{rate / 1e9:.1f} GB/s from pinned memory"
    if rate >= LEAST_BUS:
        return Finding("bus to the GPU", value, True)
    advice = "Less than PCIe 3.0 x16: the card is in a slot with fewer lanes, or the link saves power. Compare:"
    query = "nvidia-smi --query-gpu=pcie.link.gen.current,pcie.link.width.current,pcie.link.width.max --format=csv"
    return Finding("bus to the GPU", value, False, advice, query)


def free_vram(place: Place) -> Finding:
    if not torch.cuda.is_available():
        return Finding("free memory on the GPU", "torch finds no GPU")
    free, total = torch.cuda.mem_get_info(0)
    value = f"{size(free)} of {size(total)}"
    if free >= LEAST_FREE_VRAM * total:
        return Finding("free memory on the GPU", value, True)
    return Finding(
        "free memory on the GPU", value, False, "Other programs hold the rest; this lists them.", "nvidia-smi"
    )


def free_disk(place: Place) -> Finding:
    folder = place.comfyui if place.comfyui and place.comfyui.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free
    advice = "" if free >= LEAST_FREE_DISK else "A quantised model takes 5 to 15 GB: make room."
    return Finding("free disk", f"{size(free)} at {folder}", not advice, advice)


CHECKS: tuple[Callable[[Place], Finding], ...] = (
    driver,
    torch_build,
    triton,
    comfyui,
    dynamic_vram,
    huge_pages,
    swappiness,
    pinned_memory,
    bus,
    free_vram,
    free_disk,
)
