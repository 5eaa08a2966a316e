"""Time and memory to open a GGUF file: ours beside gguf.GGUFReader.

    python benchmarks/open_file.py

Makes its own files, opens each in a fresh process, prints a table and writes results/open_file.json.
"""

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

RESULTS = Path(__file__).parent / "results" / "open_file.json"
RUNS = 5
# name: (tensors, tokens in the vocabulary, merges)
FILES = {
    "diffusion model": (800, 0, 0),
    "text encoder, SentencePiece vocabulary": (800, 260_000, 0),
    "text encoder, BPE vocabulary": (800, 152_000, 151_000),
}


def write_file(path: Path, n_tensors: int, n_tokens: int, n_merges: int) -> None:
    """A Q4_K file with one tiny block row per tensor."""
    writer = gguf.GGUFWriter(path, "flux")
    if n_tokens:
        writer.add_token_list([f"token{n}" for n in range(n_tokens)])
        writer.add_token_scores([float(-n) for n in range(n_tokens)])
        writer.add_token_types([1] * n_tokens)
    if n_merges:
        writer.add_token_merges([f"to ken{n}" for n in range(n_merges)])
    blocks = np.zeros((4, 144), np.uint8)
    for n in range(n_tensors):
        writer.add_tensor(f"double_blocks.{n}.img_attn.qkv.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_with_ours(path: str) -> int:
    """The number of tensors."""
    from gguf_native.loader import open_gguf

    with open_gguf(path) as file:
        return len(file.tensors)


def open_with_gguf_package(path: str) -> int:
    """The number of tensors."""
    return len(gguf.GGUFReader(path).tensors)


READERS = {"ours": open_with_ours, "gguf.GGUFReader": open_with_gguf_package}


def measure(reader: str, path: str) -> dict[str, float]:
    """Milliseconds of the best run and megabytes the process grew by, in this process."""
    tiny = Path(path).with_name("tiny.gguf")
    READERS[reader](str(tiny))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        READERS[reader](path)
        times.append(time.perf_counter() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"ms": round(min(times) * 1e3, 2), "mb": round(grown / 1024, 1)}


def measure_in_fresh_process(reader: str, path: Path) -> dict[str, float]:
    """`measure`, unspoilt by what was opened before."""
    command = [sys.executable, __file__, reader, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare() -> dict[str, dict]:
    """Every file through every reader."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / "tiny.gguf", 1, 0, 0)
        for name, sizes in FILES.items():
            path = Path(folder) / "model.gguf"
            write_file(path, *sizes)
            rows = {reader: measure_in_fresh_process(reader, path) for reader in READERS}
            rows["times faster"] = round(rows["gguf.GGUFReader"]["ms"] / rows["ours"]["ms"], 1)
            results[name] = {"tensors": sizes[0], "tokens": sizes[1], "merges": sizes[2], **rows}
    return results


def main() -> None:
    """Print the table and keep the numbers."""
    results = compare()
    print(f"{'file':40} {'ours ms':>9} {'MB':>7} {'gguf ms':>9} {'MB':>7} {'faster':>8}")
    for name, row in results.items():
        ours, theirs = row["ours"], row["gguf.GGUFReader"]
        print(
            f"{name:40} {ours['ms']:9.1f} {ours['mb']:7.1f} {theirs['ms']:9.1f} {theirs['mb']:7.1f} "
            f"{row['times faster']:7.1f}x"
        )
    machine = {"machine": platform.machine(), "python": platform.python_version(), "runs": RUNS}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**machine, "files": results}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
