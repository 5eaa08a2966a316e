"""Kernels on a GPU: what fraction of copy bandwidth they reach, how exact they are, and what else takes how long.

    python benchmarks/kernels.py [decode] [eight_bits] [few_rows] [errors] [overlap] [--sweep] [TYPE ...]

decode: blocks to bfloat16; bit for bit against the eager twin, timed against it and, if installed, diffusers' decoder.
eight_bits: blocks to float8 and int8 with a scale per row, against the eager twin.
few_rows: the fused product for 1 to 8 rows, against decoding and cuBLAS, with errors against float64.
overlap: whether decoding the next layer on a side stream, during this one's product, would be faster.
errors: what fp8 and int8 add to the exact product's error, for four kinds of inputs.
Bytes are blocks read plus values written. Adds to results/kernels.json, from which `plot.py` draws docs/kernels.svg.
`--sweep` tries launch numbers for decoding and prints the best, from which ops/kernels/__init__.py was taken.
Needs an NVIDIA GPU, `gguf_native` importable (pip install -e .), comfy-kitchen, and tests/ for its sample blocks.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf_native.ops.compute import METHODS, prepare
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.eight_bits import PEAKS
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.kernels import KERNELS, few_rows, launch, scaled
from gguf_native.ops.layout import pack
from gguf_native.ops.quantize import quantize

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))

from samples import adversarial_blocks, random_blocks  # noqa: E402

RESULTS = HERE / "results" / "kernels.json"
# Sides of Flux' matrices: an attention's, an MLP's, a modulation's, and the largest.
SHAPES = ((3072, 12288), (21504, 3072))
MODULATION = (18432, 3072)
ROWS = (1, 2, 4, 8)
# Enough copies of a tensor that none is in the cache when its turn comes again.
ROTATION = 6
LAUNCHES = [(values, warps) for values in (512, 1024, 2048, 4096, 8192) for warps in (1, 2, 4, 8)]
ERROR_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")


def microseconds(run: Callable[[int], object]) -> float:
    """Median time of run(i), i going round ROTATION: a graph of many calls, so that launching costs nothing."""
    for i in range(ROTATION):
        run(i)

    def calls() -> None:
        for i in range(3 * ROTATION):
            run(i % ROTATION)

    return graph_microseconds(calls) / (3 * ROTATION)


def graph_microseconds(run: Callable[[], None]) -> float:
    """Median time of a CUDA graph of run()."""
    run()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        run()
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of the fastest device-to-device copy of a gigabyte."""
    source = [torch.randint(2**31, (1 << 28,), dtype=torch.int32, device="cuda") for _ in range(ROTATION)]
    target = torch.empty_like(source[0])
    # A copy node of a graph goes to the copy engine, which is slower than a kernel that copies.
    by_copy = microseconds(lambda i: target.copy_(source[i]))
    by_kernel = microseconds(lambda i: torch.add(source[i], 0, out=target))
    return 2 * target.nbytes / min(by_copy, by_kernel) * 1e6


def weights(name: str, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Several uint8 [rows, row_bytes] of a type."""
    n_blocks = shape[0] * shape[1] // FORMATS[name].block_size
    some = random_blocks(name, 4096, seed=1).cuda()
    return [some.repeat(-(-n_blocks // 4096), 1)[:n_blocks].roll(i, 0).view(shape[0], -1) for i in range(ROTATION)]


def is_exact(name: str) -> bool:
    """Whether kernel and eager twin agree to the bit in float32, NaNs by place."""
    for blocks in (random_blocks(name, 5001, seed=3), adversarial_blocks(name)):
        expected = FORMATS[name].decode(blocks).cuda()
        actual = torch.full_like(expected, float("nan"))
        launch.decode_into(blocks.cuda(), name, actual)
        same = torch.equal(actual.nan_to_num(1).view(torch.int32), expected.nan_to_num(1).view(torch.int32))
        if not same or not torch.equal(actual.isnan(), expected.isnan()):
            return False
    return True


def diffusers_decoder(name: str) -> Callable | None:
    """diffusers' function of uint8 [n, block_bytes] for a type, or None."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.quantizers.gguf import utils

    decode = utils.dequantize_functions.get(gguf.GGMLQuantizationType[name])
    block = FORMATS[name]
    return decode and (lambda blocks: decode(blocks, block.block_size, block.block_bytes, dtype=torch.bfloat16))


def decode(names: list[str], bandwidth: float) -> list[dict]:
    rows = []
    print(
        f"{'type':8} {'shape':12} exact {'us':>6} {'of copy':>8} {'eager':>6} {'diffusers':>10}  (times the kernel's)"
    )
    for name in names:
        for shape in SHAPES:
            blocks = weights(name, shape)
            flat = [weight.view(-1, FORMATS[name].block_bytes) for weight in blocks]
            out = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in blocks]
            values = [one.view(-1, FORMATS[name].block_size) for one in out]
            ours = microseconds(lambda i: launch.decode_into(blocks[i], name, out[i]))
            eager = microseconds(lambda i: FORMATS[name].decode_into(flat[i], values[i]))
            theirs = by_diffusers(name, flat)
            row = {
                "type": name,
                "shape": shape,
                "exact": is_exact(name),
                "microseconds": round(ours, 1),
                "fraction_of_copy": round((blocks[0].nbytes + out[0].nbytes) / ours * 1e6 / bandwidth, 3),
                "eager_over_kernel": round(eager / ours, 1),
                "diffusers_over_kernel": theirs and round(theirs / ours, 1),
            }
            rows.append(row)
            size = f"{shape[0]}x{shape[1]}"
            print(
                f"{name:8} {size:12} {row['exact']!s:5} {ours:6.1f} {row['fraction_of_copy']:8.0%} "
                f"{row['eager_over_kernel']:6} {row['diffusers_over_kernel']!s:>10}",
                flush=True,
            )
    return rows


def by_diffusers(name: str, blocks: list[torch.Tensor]) -> float | None:
    """Microseconds for one tensor, without a graph: it makes tensors from host data, which no graph can capture."""
    function = diffusers_decoder(name)
    if function is None:
        return None
    times = []
    for i in range(3 * ROTATION):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(blocks[i % ROTATION])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def eight_bits(names: list[str], bandwidth: float) -> list[dict]:
    rows, shape = [], SHAPES[1]
    print(f"{'type':8} {'to':14} exact {'us':>6} {'of copy':>8}")
    for name in names:
        blocks = weights(name, shape)
        peaks = torch.empty(shape[0], device="cuda")
        scaled.row_peaks_into(blocks[0], name, peaks)
        values = dequantize(blocks[0], name)
        for dtype, peak in PEAKS.items():
            factors = peak / peaks
            out = [torch.empty(shape, dtype=dtype, device="cuda") for _ in blocks]
            scaled.decode_scaled_into(blocks[0], name, factors, out[0])
            expected = values * factors[:, None]
            expected = (expected if dtype.is_floating_point else expected.round()).to(dtype)
            exact = torch.equal(out[0].view(torch.uint8), expected.view(torch.uint8))
            exact = exact and torch.equal(peaks, values.abs().amax(1))
            ours = microseconds(lambda i: scaled.decode_scaled_into(blocks[i], name, factors, out[i]))
            fraction = (blocks[0].nbytes + out[0].nbytes) / ours * 1e6 / bandwidth
            row = {"type": name, "to": str(dtype).removeprefix("torch."), "exact": exact}
            rows.append(row | {"microseconds": round(ours, 1), "fraction_of_copy": round(fraction, 3)})
            print(f"{name:8} {row['to']:14} {exact!s:5} {ours:6.1f} {fraction:8.0%}", flush=True)
    return rows


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def fused(names: list[str], bandwidth: float) -> list[dict]:
    rows = []
    print(f"{'type':8} {'rows':>4} {'us':>6} {'of copy':>8} {'decode+cuBLAS':>14} {'error':>8} {'its error':>9}")
    for name in (name for name in names if name in few_rows.FEW_ROWS):
        blocks = weights(name, MODULATION)
        exact = dequantize(blocks[0], name).double()
        dense = torch.empty(MODULATION, dtype=torch.bfloat16, device="cuda")
        for n_rows in ROWS:
            x = torch.randn(n_rows, MODULATION[1], device="cuda").bfloat16()
            expected = x.double() @ exact.T

            def decoded(i: int, x: torch.Tensor = x) -> torch.Tensor:
                launch.decode_into(blocks[i], name, dense)
                return torch.nn.functional.linear(x, dense)

            ours = microseconds(lambda i: few_rows.linear(blocks[i], name, x, None))
            theirs = microseconds(decoded)
            row = {
                "type": name,
                "rows": n_rows,
                "microseconds": round(ours, 1),
                "fraction_of_copy": round(blocks[0].nbytes / ours * 1e6 / bandwidth, 3),
                "decode_and_cublas": round(theirs, 1),
                "error": relative_error(few_rows.linear(blocks[0], name, x, None), expected),
                "cublas_error": relative_error(decoded(0), expected),
            }
            rows.append(row)
            print(
                f"{name:8} {n_rows:4} {ours:6.1f} {row['fraction_of_copy']:8.0%} {theirs:14.1f} {row['error']:8.1e} "
                f"{row['cublas_error']:9.1e}",
                flush=True,
            )
    return rows


def inputs() -> dict[str, torch.Tensor]:
    """Four kinds of inputs, float64 [1024, 3072]."""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = torch.randn(1024, 3072, dtype=torch.float64, device="cuda", generator=generator)
    squares = torch.randn(4, 1024, 3072, dtype=torch.float64, device="cuda", generator=generator).square().mean(0)
    outliers = normal.clone()
    outliers[:, ::100] *= 20
    return {
        "Gaussian": normal,
        "post-GELU": torch.nn.functional.gelu(normal),
        "heavy tails": normal / squares.sqrt(),  # Student's t with 4 degrees of freedom
        "1 % channels x20": outliers,
    }


def errors(names: list[str], _: float) -> list[dict]:
    """Relative errors against float64 products with the decoded weight: of bfloat16, and of each 8-bit method."""
    rows, shape = [], (3072, 3072)
    original = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    print(f"{'type':6} {'its own':>8} {'inputs':18} {'exact':>8} {'fp8':>8} {'int8':>8}")
    for name in (name for name in names if name in ERROR_TYPES):
        blocks = quantize(original, name)
        decoded = dequantize(blocks, name).double()
        own = relative_error(decoded, original.double())
        weight = pack(blocks.flatten(), name, shape, torch.bfloat16)
        for kind, x in inputs().items():
            x = x.bfloat16()
            expected = x.double() @ decoded.T
            found = {"exact": relative_error(torch.nn.functional.linear(x, decoded.bfloat16()), expected)}
            for method in METHODS:
                found[method] = relative_error(prepare(method, weight).linear(x, weight, None, None), expected)
            rows.append({"type": name, "own_error": own, "inputs": kind} | found)
            print(f"{name:6} {own:8.4f} {kind:18} " + " ".join(f"{found[key]:8.4f}" for key in found), flush=True)
    return rows


def overlap(_: list[str], __: float) -> dict[str, float]:
    """Microseconds per layer of a chain of Q4_K layers: products alone, each after its decoding, decoding one ahead."""
    shape, n_rows = (12288, 3072), 4608
    blocks = weights("Q4_K", shape)
    buffers = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    dense = torch.randn(shape, device="cuda").bfloat16()
    x = torch.randn(n_rows, shape[1], device="cuda").bfloat16()
    side = torch.cuda.Stream()

    def products() -> None:
        for _ in blocks:
            torch.nn.functional.linear(x, dense)

    def in_turn() -> None:
        for packed in blocks:
            launch.decode_into(packed, "Q4_K", buffers[0])
            torch.nn.functional.linear(x, buffers[0])

    def one_ahead() -> None:
        main, used = torch.cuda.current_stream(), [None, None]
        side.wait_stream(main)
        for i, packed in enumerate(blocks):
            with torch.cuda.stream(side):
                if used[i % 2]:
                    side.wait_event(used[i % 2])
                launch.decode_into(packed, "Q4_K", buffers[i % 2])
            main.wait_event(side.record_event())
            torch.nn.functional.linear(x, buffers[i % 2])
            used[i % 2] = main.record_event()
        main.wait_stream(side)

    # In turns, because the clock drifts.
    rounds = [
        {run.__name__: graph_microseconds(run) / len(blocks) for run in (products, in_turn, one_ahead)} for _ in "123"
    ]
    found = {name: round(statistics.median(times[name] for times in rounds), 1) for name in rounds[0]}
    print("overlap:", found)
    return found


def sweep(names: list[str], bandwidth: float) -> None:
    for name in names:
        kernel, blocks, fractions = KERNELS[name], weights(name, SHAPES[0]), {}
        out = [torch.empty(SHAPES[0], dtype=torch.bfloat16, device="cuda") for _ in blocks]
        for numbers in LAUNCHES:
            KERNELS[name] = kernel._replace(values_per_program=numbers[0], n_warps=numbers[1])
            launch.BOUND.clear()
            time = microseconds(lambda i: launch.decode_into(blocks[i], name, out[i]))
            fractions[numbers] = (blocks[0].nbytes + out[0].nbytes) / time * 1e6 / bandwidth
        KERNELS[name] = kernel
        best = sorted(fractions, key=fractions.get, reverse=True)[:5]
        print(
            f"{name:8} " + " | ".join(f"{values:5}/{warps} {fractions[values, warps]:4.0%}" for values, warps in best)
        )


SECTIONS = {"decode": decode, "eight_bits": eight_bits, "few_rows": fused, "errors": errors, "overlap": overlap}


def main(arguments: list[str]) -> None:
    names = [name for name in arguments if name in KERNELS] or list(KERNELS)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    if "--sweep" in arguments:
        return sweep(names, bandwidth)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_second": bandwidth}
    for section in [name for name in arguments if name in SECTIONS] or SECTIONS:
        results[section] = SECTIONS[section](names, bandwidth)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1:])
