"""Encoders: how much less error than ggml's, and how fast, on the CPU in one run with ggml itself.

    python benchmarks/quantize.py [TYPE ...]

Errors are root mean squares over that of the values, on Gaussian ones: ggml's default, ggml's with an importance of
ones, ours. Rates are megabytes of float32 values per second, the median of rounds in which all take their turns: ggml
on one thread and on as many as torch has, quantize_as_ggml, quantize, and that in as many processes. Adds to
results/quantize.json.
Needs `gguf_native` importable (pip install -e .), libggml-python, and tests/ for its binding.
"""

import concurrent.futures
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.formats.refine import REFINED
from gguf_native.ops.quantize import quantize, quantize_as_ggml
from gguf_native.quantizer.convert import VALUES_PER_RUN
from gguf_native.quantizer.encoders import encoder

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests" / "ops"))

from ggml_reference import by_ggml, library  # noqa: E402

RESULTS = HERE / "results" / "quantize.json"
ROWS, COLUMNS, ROUNDS = 4096, 4096, 5
ERROR_ROWS = 128
HEADINGS = (
    "type",
    "rms ggml",
    "ones",
    "ours",
    "ours/ggml",
    "MB/s ggml 1",
    "ggml all",
    "as ggml",
    "ours",
    "processes",
    "p./ggml all",
)


def relative_error(packed: torch.Tensor, values: torch.Tensor, name: str) -> float:
    return float(
        (dequantize(packed, name) - values).double().square().mean().sqrt() / values.double().square().mean().sqrt()
    )


def errors(ggml, name: str) -> dict[str, float]:
    values = torch.randn(ERROR_ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    return {
        "ggml": relative_error(by_ggml(ggml, values, name), values, name),
        "ggml_ones": relative_error(by_ggml(ggml, values, name, torch.ones(COLUMNS)), values, name),
        "ours": relative_error(quantize(values, name), values, name),
    }


def rates(ggml, name: str) -> dict[str, float]:
    """Megabytes of values per second of each contender, in turns; with processes, this one has one thread of torch."""
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    parts, runs = values.chunk(threads), values.split(VALUES_PER_RUN["cpu"] // COLUMNS)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        seconds = in_turns(
            {
                "ggml_1_thread": lambda: by_ggml(ggml, values, name),
                "ggml_all_threads": lambda: list(pool.map(lambda part: by_ggml(ggml, part, name), parts)),
                "as_ggml": lambda: quantize_as_ggml(values, name),
                "ours": lambda: quantize(values, name),
            }
        )
    with encoder(threads) as in_processes:
        in_processes(runs[0], name)
        seconds |= in_turns({"ours_processes": lambda: [in_processes(run, name) for run in runs]})
    return {contender: values.numel() * 4e-6 / statistics.median(some) for contender, some in seconds.items()}


def in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds that each took in each round."""
    times = {contender: [] for contender in contenders}
    for _ in range(ROUNDS):
        for contender, run in contenders.items():
            start = time.perf_counter()
            run()
            times[contender].append(time.perf_counter() - start)
    return times


def main() -> None:
    ggml = library()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"types": {}}
    results["threads"], results["torch"] = torch.get_num_threads(), torch.__version__
    print(" ".join(f"{heading:>12}" for heading in HEADINGS))
    for name in sys.argv[1:] or REFINED:
        error, rate = errors(ggml, name), rates(ggml, name)
        results["types"][name] = {"relative_rms_error": error, "megabytes_per_second": rate}
        figures = [*error.values(), error["ours"] / error["ggml"]]
        speeds = [*rate.values(), rate["ours_processes"] / rate["ggml_all_threads"]]
        row = (
            [f"{figure:.4f}" for figure in figures] + [f"{speed:.0f}" for speed in speeds[:-1]] + [f"{speeds[-1]:.2f}"]
        )
        print(" ".join(f"{cell:>12}" for cell in (name, *row)), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
