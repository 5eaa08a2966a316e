"""Draws docs/flux.svg, kernels.svg and, once they were measured, memory.svg and quality.svg from the results here.

Needs matplotlib.

python benchmarks/plot.py
"""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
# Files that do not change with the day.
matplotlib.rcParams |= {"svg.hashsalt": "gguf_native", "svg.fonttype": "none"}
METADATA = {"Date": None, "Creator": None}
COMPUTES = {"exact": "tab:blue", "fp8": "tab:orange", "auto": "tab:green"}
# Beginnings of file types: K-quants, I-quants, others.
FAMILIES = {r"Q\d_K": "tab:blue", "IQ": "tab:green", "": "tab:orange"}


def flux() -> None:
    """Seconds per step over those of ComfyUI's bfloat16 run with all weights on the GPU."""
    rows = json.loads((RESULTS / "flux.json").read_text())["rows"].values()
    runs = list(dict.fromkeys((row["run"], row["resolution"]) for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(runs) + 1))
    for place, (compute, colour) in enumerate(COMPUTES.items()):
        ratios = {(row["run"], row["resolution"]): row["ratio"] for row in rows if row["compute"] == compute}
        heights = [(i + 0.25 * (place - 1), ratios[run]) for i, run in enumerate(runs) if run in ratios]
        bars = axes.barh([at for at, _ in heights], [ratio for _, ratio in heights], 0.25, color=colour, label=compute)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(runs)), [f"{run}, {size}x{size}" for run, size in runs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / that of ComfyUI's bfloat16 with all weights on the GPU (less is better)")
    axes.legend(loc="lower right", fontsize=8)
    save(figure, "flux.svg")


def kernels() -> None:
    """Fraction of copy bandwidth of the decode kernels."""
    results = json.loads((RESULTS / "kernels.json").read_text())
    fractions = {row["type"]: row["fraction_of_copy"] for row in results["decode"]}
    figure, axes = plt.subplots(figsize=(9, 2.6))
    axes.bar(fractions.keys(), [100 * fraction for fraction in fractions.values()], color="tab:blue")
    axes.set_ylabel("% of copy bandwidth")
    axes.set_ylim(0, 100)
    axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    save(figure, "kernels.svg")


def memory() -> None:
    """Seconds per step over those of the row that each is compared with, and the VRAM that sampling took.

    A row may have got the letter of its machine by hand, where rows of several were put together.
    """
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"].values()
    rows = [row for row in rows if row["table"] != "reference" and row["ratio"] is not None]
    names = [
        f"{row['table']}: {row['row']}, {row['compute']}, {row['resolution']} {row.get('machine', '')}" for row in rows
    ]
    figure, axes = plt.subplots(figsize=(9, 0.2 * len(rows) + 1))
    colours = [COMPUTES.get(row["compute"], "tab:gray") for row in rows]
    bars = axes.barh(range(len(rows)), [row["ratio"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['ratio']:.2f}  ({row['vram_sampling_gb']} GB)" for row in rows], fontsize=6, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    # Room for what stands behind the longest bar.
    axes.set_xlim(0, 1.25 * max(row["ratio"] for row in rows))
    axes.set_xlabel("time of a step / that of its reference (peak VRAM of sampling)")
    save(figure, "memory.svg")


def quality() -> None:
    """What the scorer finds in the pictures, and how far they are from those of bfloat16, from large files to small."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    exact = [row for row in rows if row["compute"] == "exact" and row["type"] not in ("F32", "F16", "BF16")]
    exact.sort(key=lambda row: -row["bytes"])
    colours = [colour_of(row["type"]) for row in exact]
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(9, 0.2 * len(exact) + 1))
    shares = [100 * row["scores"]["all"] for row in exact]
    for axes, values, label in (
        (left, shares, "% of what the captions ask that is right (line: bfloat16)"),
        (right, [row["psnr"] for row in exact], "PSNR against the pictures of bfloat16, dB"),
    ):
        axes.bar_label(axes.barh(range(len(exact)), values, color=colours), fmt="%.1f", fontsize=7, padding=2)
        axes.set_xlabel(label, fontsize=8)
        axes.margins(x=0.12)
    left.axvline(100 * rows[0]["scores"]["all"], color="black", linewidth=0.8)
    left.set_yticks(range(len(exact)), [f"{row['type']}, {row['bytes'] / 1e6:.1f} MB" for row in exact], fontsize=8)
    left.invert_yaxis()
    save(figure, "quality.svg")


def colour_of(file_type: str) -> str:
    """The colour of K-quants, I-quants or others."""
    return next(colour for beginning, colour in FAMILIES.items() if re.match(beginning, file_type))


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / name, metadata=METADATA)


if __name__ == "__main__":
    flux()
    kernels()
    if (RESULTS / "memory.json").is_file():
        memory()
    if (RESULTS / "quality.json").is_file():
        quality()
