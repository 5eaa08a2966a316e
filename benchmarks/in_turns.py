"""What little memory costs where the processor sets the pace: Flux with all memory and with little, in turns.

    python benchmarks/in_turns.py COMFYUI FILE --cap GB [--resolution 512] [--rounds 12] [arguments of flux_run.py]

A processor that others share changes its speed from minute to minute, and the step of a small picture with it. Two
processes keep the same file's model loaded, one with all memory and one with GB of it, and sample in turns, the other
waiting: each ratio is of two samplings that follow each other. The memory is held during the turns of the second alone.
Prints a line for each round and adds to results/in_turns.json, by file, memory and resolution.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "in_turns.json"
# Of each process, before its times count.
WARM_UP = 3


def child() -> None:
    """For each line of the input a sampling; prints the seconds of its median step."""
    import flux_run
    import torch

    torch.set_grad_enabled(False)
    (resolution,), (compute,), ballast = flux_run.options.resolution, flux_run.options.compute, flux_run.ballast
    with torch.inference_mode():
        model = flux_run.load(compute)
        for n_done, _ in enumerate(sys.stdin):
            if n_done and ballast:
                ballast = ballast.again()
            _, _, step = flux_run.sample(model, resolution)
            if ballast:
                ballast.kill()
            print(f"STEP {step}", flush=True)
    # Not through the interpreter's end: the host's threads would keep it.
    os._exit(0)


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def sample(process: subprocess.Popen) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("STEP "):
            return float(line.split()[1])
    raise SystemExit("a sampling failed; see above")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("comfyui")
    parser.add_argument("file", type=Path)
    parser.add_argument("--cap", type=float, required=True)
    parser.add_argument("--resolution", default="512")
    parser.add_argument("--rounds", type=int, default=12)
    return parser.parse_known_args()


def main() -> None:
    options, others = parse()
    common = [options.comfyui, str(options.file), "--compute", "exact", "--resolution", options.resolution, *others]
    resident = start(common)
    for _ in range(WARM_UP):
        sample(resident)
    # Now, for what is held is all but the first one's.
    little = start([*common, "--cap", str(options.cap)])
    for _ in range(WARM_UP):
        sample(little)
    pairs = []
    for _ in range(options.rounds):
        pairs.append((sample(resident), sample(little)))
        print(f"{pairs[-1][0]:.4f} {pairs[-1][1]:.4f} {pairs[-1][1] / pairs[-1][0]:.3f}", flush=True)
    for process in (resident, little):
        process.stdin.close()
        process.wait()
    row = {
        "ratio": round(statistics.median(with_little / with_all for with_all, with_little in pairs), 3),
        "ratio_of_quickest": round(min(second for _, second in pairs) / min(first for first, _ in pairs), 3),
        "steps": [[round(step, 4) for step in pair] for pair in pairs],
    }
    print("RESULT " + json.dumps(row), flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{options.file.stem} {options.cap:g} GB {options.resolution}"] = row
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        del sys.argv[1]
        child()
    else:
        main()
