"""Decode kernels on a GPU: the fraction of copy bandwidth each reaches, and how much faster it is than plain torch.

    python benchmarks/kernels.py [--sweep] [TYPE ...]

Every kernel is compared with its eager twin, bit for bit, in the same run. Bytes are blocks read plus values written.
`--sweep` tries launch numbers and prints the best, from which the table in ops/kernels/__init__.py was taken.
Needs an NVIDIA GPU, `gguf_native` importable (pip install -e .) and tests/ for its sample blocks.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels import KERNELS, launch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

from samples import adversarial_blocks, random_blocks  # noqa: E402

RESULTS = HERE / "results" / "kernels.json"
SHAPE = (3072, 12288)
# Enough copies of a tensor that none is in the cache when its turn comes again.
ROTATION = 4
LAUNCHES = [(values, warps) for values in (512, 1024, 2048, 4096, 8192) for warps in (1, 2, 4, 8)]


def microseconds(run: Callable[[int], None], repeats: int = 5) -> float:
    """Median time of run(i), i going round ROTATION: a graph of many calls, so that launching costs nothing."""
    for i in range(ROTATION):
        run(i)
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 5 * ROTATION
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % ROTATION)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of the fastest device-to-device copy of a gigabyte."""
    source = [torch.randint(2**31, (1 << 28,), dtype=torch.int32, device="cuda") for _ in range(ROTATION)]
    target = torch.empty_like(source[0])
    # A copy node of a graph goes to the copy engine, which is slower than a kernel that copies.
    by_copy = microseconds(lambda i: target.copy_(source[i]))
    by_kernel = microseconds(lambda i: torch.add(source[i], 0, out=target))
    return 2 * target.nbytes / min(by_copy, by_kernel) * 1e6


def is_exact(name: str) -> bool:
    """Whether kernel and eager twin agree to the bit in float32, NaNs by place."""
    for blocks in (random_blocks(name, 5001, seed=3), adversarial_blocks(name)):
        expected = FORMATS[name].decode(blocks).cuda()
        actual = torch.full_like(expected, float("nan"))
        launch.decode_into(name, blocks.cuda(), actual)
        same = torch.equal(actual.nan_to_num(1).view(torch.int32), expected.nan_to_num(1).view(torch.int32))
        if not same or not torch.equal(actual.isnan(), expected.isnan()):
            return False
    return True


class Case:
    """One type at SHAPE: blocks to read and outputs to write, several of each."""

    def __init__(self, name: str):
        self.name, block = name, FORMATS[name]
        n_blocks = SHAPE[0] * SHAPE[1] // block.block_size
        some = random_blocks(name, 4096, seed=1).cuda()
        self.blocks = [some.repeat(n_blocks // 4096, 1).roll(i, 0) for i in range(ROTATION)]
        self.out = [torch.empty(n_blocks, block.block_size, dtype=torch.bfloat16, device="cuda") for _ in self.blocks]
        self.nbytes = self.blocks[0].nbytes + self.out[0].nbytes

    def by_kernel(self) -> float:
        return microseconds(lambda i: launch.decode_into(self.name, self.blocks[i], self.out[i]))

    def by_torch(self) -> float:
        return microseconds(lambda i: FORMATS[self.name].decode_into(self.blocks[i], self.out[i]))


def sweep(name: str, bandwidth: float) -> None:
    case, kernel, times = Case(name), KERNELS[name], {}
    for values, warps in LAUNCHES:
        KERNELS[name] = kernel._replace(values_per_program=values, n_warps=warps)
        times[values, warps] = case.by_kernel()
    KERNELS[name] = kernel
    fractions = {launch: case.nbytes / time * 1e6 / bandwidth for launch, time in times.items()}
    best = sorted(fractions, key=fractions.get, reverse=True)[:5]
    shown = (f"{values:5}/{warps} {fractions[values, warps]:4.0%}" for values, warps in best)
    print(f"{name:8} {' | '.join(shown)}", flush=True)


def measure(name: str, bandwidth: float) -> dict[str, object]:
    case = Case(name)
    by_kernel, by_torch = case.by_kernel(), case.by_torch()
    return {
        "type": name,
        "exact": is_exact(name),
        "microseconds": round(by_kernel, 1),
        "fraction_of_copy": round(case.nbytes / by_kernel * 1e6 / bandwidth, 3),
        "torch_over_kernel": round(by_torch / by_kernel, 1),
    }


def main(arguments: list[str]) -> None:
    names = [name for name in arguments if name in KERNELS] or list(KERNELS)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, {SHAPE[0]}x{SHAPE[1]} to bfloat16")
    if "--sweep" in arguments:
        for name in names:
            sweep(name, bandwidth)
        return
    rows = [measure(name, bandwidth) for name in names]
    print(f"{'type':8} exact {'us':>6} {'of copy':>8} {'torch/kernel':>13}")
    for row in rows:
        print(
            f"{row['type']:8} {row['exact']!s:5} {row['microseconds']:6} {row['fraction_of_copy']:8.0%} "
            f"{row['torch_over_kernel']:13}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    device = {"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth, "shape": SHAPE}
    RESULTS.write_text(json.dumps(device | {"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
