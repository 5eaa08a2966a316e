"""What little memory costs: Flux in the real ComfyUI engine with 3 to 8 GB of VRAM, its cache, graphs and LoRAs.

    python benchmarks/memory.py COMFYUI FOLDER [NAME ...] [--list] [--model FILE] [--size PIXELS] [--cpu]

NAME is a row or a table of rows, all without one; `--list` prints them with the seconds that each is expected to take.
FOLDER gets the models, up to 70 GB. A row is compared with another, which is run first, for no two machines are equally
fast. Prints a table, and adds to results/memory.json, from which `plot.py` draws docs/memory.svg.
`--model` takes any Flux instead of the files, `--size` other pictures, `--cpu` ComfyUI on the CPU without caps: a trial
of this script, of which nothing is kept.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "memory.json"
TIMEOUT = 900


class Row(NamedTuple):
    """One process of memory_run.py.

    seconds: what it takes on an H200 if its file is there, estimated; a result has what it took. against: the row whose
    first compute, at the same resolution, its step is divided by; itself where that is the reference.
    """

    table: str
    seconds: int
    against: str
    recipe: str = "Q4_K"
    computes: tuple[str, ...] = ("exact",)
    resolutions: tuple[int, ...] = (1024,)
    arguments: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


def cap(gigabytes: float) -> tuple[str, ...]:
    return "--cap", str(gigabytes)


def lora(count: int, rank: int, *arguments: str) -> tuple[str, ...]:
    return "--loras", str(count), "--rank", str(rank), "--change-loras", *arguments


def graph(state: str) -> tuple[tuple[str, str], ...]:
    return (("ENABLE_CUDA_GRAPH", state),)


# A graph is recorded at the second step, if there are enough to gain by it.
MORE_STEPS = "--steps", "14"
# Exact first; the others are what "best mode" is the best of.
MODES = ("exact", "auto", "fp8")
# File type -> gigabytes that it should run in, 512x512; the last of Q4_K_S while nothing but its picture is left.
SEEDS = {"Q4_K_S": (5.8, 3.0), "Q3_K_L": (5.2,), "Q5_K_M": (6.4,), "Q6_K": (7.1,)}
NATIVE, SMALL = ("native",), (512,)

ROWS: dict[str, Row] = {
    "native 1024": Row("reference", 70, "native 1024", computes=NATIVE),
    "native 512": Row("reference", 60, "native 512", computes=NATIVE, resolutions=SMALL),
    "native 2048": Row("reference", 100, "native 2048", computes=NATIVE, resolutions=(2048,)),
    "resident": Row("streaming", 40, "native 1024", computes=MODES),
    "6 GB": Row("streaming", 50, "native 1024", computes=MODES, arguments=cap(6)),
    "4 GB": Row("streaming", 50, "native 1024", computes=MODES, arguments=cap(4)),
    "3 GB": Row("streaming", 50, "native 1024", computes=MODES, arguments=cap(3)),
    "native 6 GB": Row("streaming", 90, "native 1024", computes=NATIVE, arguments=cap(6)),
    "Q8_0 6 GB": Row("streaming", 50, "native 1024", recipe="Q8_0", arguments=cap(6)),
    "2048 6 GB": Row("streaming", 60, "native 2048", resolutions=(2048,), arguments=cap(6)),
    "legacy 6 GB": Row("streaming", 60, "native 1024", arguments=(*cap(6), "--disable-dynamic-vram")),
    **{
        name: Row("seeds", 30, f"{recipe} resident", recipe, resolutions=SMALL, arguments=("--decode", *arguments))
        for recipe, sizes in SEEDS.items()
        for name, arguments in {
            f"{recipe} resident": (),
            **{f"{recipe} {gigabytes} GB": cap(gigabytes) for gigabytes in sizes},
        }.items()
    },
    **{
        f"cache {megabytes} MB": Row(
            "cache", 35, "cache 0 MB", resolutions=(1024, 512), settings=(("QUANT_CACHE_SIZE", str(megabytes)),)
        )
        for megabytes in (0, 256, 1024, 4096)
    },
    "graph native": Row("graph", 60, "graph native", computes=NATIVE, resolutions=(512, 1024), arguments=MORE_STEPS),
    **{
        f"graph {state}": Row(
            "graph", 35, "graph native", "Q4_K", ("exact", "auto"), (512, 1024), MORE_STEPS, graph(state)
        )
        for state in ("off", "on")
    },
    "SDXL graph native": Row("graph", 40, "SDXL graph native", "SDXL", NATIVE, (512, 1024), MORE_STEPS),
    **{
        f"SDXL graph {state}": Row(
            "graph", 30, "SDXL graph native", "SDXL", ("exact",), (512, 1024), MORE_STEPS, graph(state)
        )
        for state in ("off", "on")
    },
    "no LoRA": Row("LoRA", 30, "no LoRA"),
    # Named before them it gives the other rows with LoRAs their error.
    "native 1 LoRA rank 16": Row("LoRA", 90, "no LoRA", computes=NATIVE, arguments=lora(1, 16)),
    "no LoRA 6 GB": Row("LoRA", 35, "no LoRA 6 GB", arguments=cap(6)),
    **{
        f"{count} LoRA rank {rank}": Row("LoRA", 60, "no LoRA", arguments=lora(count, rank))
        for count in (1, 2)
        for rank in (16, 128)
    },
    **{
        f"{count} LoRA rank {rank} 6 GB": Row("LoRA", 60, "no LoRA 6 GB", arguments=lora(count, rank, *cap(6)))
        for count in (1, 2)
        for rank in (16, 128)
    },
    # Of a new process whose file is in the page cache: what `load` and `first` say of the others too.
    "cold": Row("cold start", 25, "native 1024"),
}

HEADER = (
    f"{'row':22} {'compute':7} {'size':>5} {'step s':>7} {'ratio':>6} {'load':>6} {'first':>6} {'change':>6} "
    f"{'swap':>6} {'loading':>7} {'sampling':>8} {'decoding':>8} {'left':>6} {'RSS GB':>6}"
)


class Trial(NamedTuple):
    """What the command line changes for all rows."""

    model: Path | None
    size: int | None
    cpu: bool


def chosen(names: list[str]) -> list[str]:
    """The rows named, each after the one that it is compared with."""
    known = [*ROWS, *(row.table for row in ROWS.values())]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no row or table is called {', '.join(unknown)}; --list prints them")
    named = [name for name, row in ROWS.items() if not names or name in names or row.table in names]
    return list(dict.fromkeys(each for name in named for each in (ROWS[name].against, name)))


def reference(results: dict[str, dict], row: Row, resolution: int) -> float:
    """Seconds per step that those of `row` are divided by."""
    return results[f"{row.against} {ROWS[row.against].computes[0]} {resolution}"]["step"]


def run(comfyui: str, folder: Path, row: Row, trial: Trial) -> list[dict[str, object]]:
    """What one process of memory_run.py prints."""
    file = trial.model or folder / ("sdxl.gguf" if row.recipe == "SDXL" else f"flux-{row.recipe}.gguf")
    if not file.is_file():
        maker = ["sdxl_file.py", comfyui, folder] if row.recipe == "SDXL" else ["flux_files.py", folder, row.recipe]
        subprocess.run([sys.executable, HERE / maker[0], *maker[1:]], check=True)
    read(file)
    arguments = list(row.arguments)
    if trial.cpu:
        if "--cap" in arguments:
            place = arguments.index("--cap")
            del arguments[place : place + 2]
        arguments += ["--cpu"]
    resolutions = [trial.size] if trial.size else row.resolutions
    shapes = ["--resolution", *map(str, resolutions), "--compute", *row.computes]
    command = [sys.executable, HERE / "memory_run.py", comfyui, file, "--latents", folder, *shapes, *arguments]
    environment = os.environ | {f"GGUF_NATIVE_{key}": value for key, value in row.settings}
    start = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT, env=environment
    )
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) != len(resolutions) * len(row.computes):
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line) | {"process_seconds": round(time.monotonic() - start)} for line in lines]


def read(file: Path) -> None:
    """Have the system keep the file in memory: no row is to measure the disk."""
    room = bytearray(1 << 24)
    with file.open("rb", buffering=0) as source:
        while source.readinto(room):
            pass


def number(value: float | None, form: str) -> str:
    width = form.partition(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def line(name: str, row: dict[str, object]) -> str:
    return (
        f"{name:22} {row['compute']:7} {row['resolution']:5} {row['step']:7.4f} {row['ratio']:6.3f} "
        f"{row['load']:6.2f} {row['cold_first_step']:6.2f} {number(row['after_change_of_strength'], '6.3f')} "
        f"{number(row['after_swap_of_loras'], '6.3f')} "
        f"{number(row['vram_loading_gb'], '7.2f')} {number(row['vram_sampling_gb'], '8.2f')} "
        f"{number(row['vram_decoding_gb'], '8.2f')} {number(row['vram_left_gb'], '6.2f')} {row['rss_peak_gb']:6.2f}"
    )


def print_rows(names: list[str]) -> None:
    for name in names:
        row = ROWS[name]
        print(f"{row.table:10} {name:22} {row.seconds:4} s   against {row.against}")
    recipes = dict.fromkeys(ROWS[name].recipe for name in names)
    total = sum(ROWS[name].seconds for name in names)
    print(f"{len(names)} rows, about {total} s, and about 40 s for each file not there: {', '.join(recipes)}")


def read_results() -> dict[str, dict]:
    """The rows measured on a GPU like this one: those of others are not kept beside them."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    is_of_this = torch.cuda.is_available() and found.get("device") == torch.cuda.get_device_name()
    return found["rows"] if is_of_this else {}


def write(results: dict[str, dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(device | {"rows": results}, indent=1) + "\n")
    unfinished.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui", nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--size", type=int)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_intermixed_args()
    trial = Trial(options.model, options.size, options.cpu)
    is_kept = not any(trial)
    results = read_results() if is_kept else {}
    names = chosen(options.names)
    if options.list or options.folder is None:
        return print_rows(names)
    if is_kept and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here; --cpu with --model and --size is a trial without one")
    print(HEADER)
    for name in names:
        row = ROWS[name]
        for result in run(options.comfyui, options.folder, row, trial):
            results[f"{name} {result['compute']} {result['resolution']}"] = result
            result |= {"row": name, "table": row.table, "against": row.against, "date": str(datetime.date.today())}
            result["ratio"] = round(result["step"] / reference(results, row, result["resolution"]), 3)
            print(line(name, result), flush=True)
        if is_kept:
            write(results)


if __name__ == "__main__":
    main()
