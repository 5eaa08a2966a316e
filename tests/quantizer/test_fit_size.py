"""A type for each matrix within a size: the allocation is near the best there is, and beats the fixed recipes."""

import importlib
import itertools
import json
import random

import pytest
import torch
from gguf_native.loader import open_gguf
from gguf_native.ops import dequantize
from gguf_native.quantizer import convert
from gguf_native.quantizer.allocation import Option, allocate, lower_hull
from gguf_native.quantizer.errors import NotFiniteError, TargetError
from gguf_native.quantizer.fit_size import Bits, Size
from gguf_native.quantizer.importance import write_importance
from gguf_native.quantizer.source import SourceTensor, runs
from gguf_native.quantizer.sources import open_source
from safetensors.torch import save_file

FIT_SIZE = importlib.import_module("gguf_native.quantizer.fit_size")
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Of a spread that differs by column, as real weights have it."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(columns, generator=generator) ** (seed % 4) * 0.05
    return torch.randn(rows, columns, generator=generator) * spread


def flux() -> dict[str, torch.Tensor]:
    """Matrices of Flux's names in three double and four single blocks, and one that is kept."""
    seeds = itertools.count()
    double = {"img_attn.qkv": (384, 256), "img_mlp.2": (256, 512), "img_attn.proj": (256, 256)}
    single = {"linear1": (512, 256), "linear2": (256, 512)}
    tensors = {"img_in.weight": matrix(256, 64, 0)}
    for series, count, layers in (("double_blocks", 3, double), ("single_blocks", 4, single)):
        for block, (layer, shape) in itertools.product(range(count), layers.items()):
            tensors[f"{series}.{block}.{layer}.weight"] = matrix(*shape, next(seeds))
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "flux.safetensors"
    save_file(flux(), path)
    return path


def values_of(path) -> dict[str, tuple[str, torch.Tensor]]:
    with open_gguf(path) as file:
        return {
            name: (info.type, dequantize(file.read(name), info.type, info.shape)) for name, info in file.tensors.items()
        }


def total_error(path) -> float:
    """Sum over the matrices of their relative squared errors."""
    originals, total = flux(), 0.0
    for name, (type_name, values) in values_of(path).items():
        if type_name in TYPES:
            original = originals[name].double()
            total += float((values.double() - original).square().sum() / original.square().sum())
    return total


@pytest.mark.parametrize("recipe", ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"])
def test_the_same_bytes_hold_less_error_than_a_recipe(source, tmp_path, recipe):
    (fixed,) = convert(source, tmp_path / "fixed.gguf", recipe)
    (fitted,) = convert(source, tmp_path / "fitted.gguf", Size(fixed.stat().st_size + 600))
    assert fitted.stat().st_size <= fixed.stat().st_size + 600
    assert total_error(fitted) < 0.97 * total_error(fixed)


def test_the_account_in_the_file_is_true(source, tmp_path):
    (fitted,) = convert(source, tmp_path / "fitted.gguf", Bits(5.0))
    with open_gguf(fitted) as file:
        recipe = json.loads(file.metadata["gguf_native.recipe"])
        types = [info.type for info in file.tensors.values()]
    n_values = sum(tensor.numel() for tensor in flux().values())
    assert recipe["size"] == int(n_values * 5.0 / 8) >= fitted.stat().st_size > 0.93 * recipe["size"]
    assert recipe["error"] == pytest.approx(total_error(fitted), rel=1e-4)
    assert recipe["tensors"] == {name: types.count(name) for name in set(types)}
    assert values_of(fitted)["img_in.weight"][0] in ("F32", "BF16", "F16")


def test_the_same_input_gives_the_same_file(source, tmp_path):
    (first,) = convert(source, tmp_path / "first.gguf", Bits(4.5))
    (second,) = convert(source, tmp_path / "second.gguf", Bits(4.5))
    assert first.read_bytes() == second.read_bytes()


def test_too_small_a_size_names_the_smallest(source, tmp_path):
    with pytest.raises(TargetError, match="is too small") as caught:
        convert(source, tmp_path / "fitted.gguf", Size(50_000))
    assert "Q2_K" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_finite_is_named(tmp_path):
    tensors = flux()
    tensors["single_blocks.2.linear1.weight"][3, 17] = float("nan")
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(NotFiniteError, match=r"'single_blocks\.2\.linear1\.weight' has nan at index \[3, 17\]"):
        convert(tmp_path / "damaged.safetensors", tmp_path / "out.gguf", Bits(5))
    assert not list(tmp_path.glob("out*"))


def test_importance_of_nothing_counts_all_columns_alike(source, tmp_path):
    name = "double_blocks.0.img_attn.qkv.weight"
    write_importance(tmp_path / "zero.gguf", {name: torch.zeros(256)}, {name: 1}, "test")
    (plain,) = convert(source, tmp_path / "plain.gguf", Bits(5))
    (weighted,) = convert(source, tmp_path / "weighted.gguf", Bits(5), importance=tmp_path / "zero.gguf")
    assert values_of(weighted)[name][0] == values_of(plain)[name][0]


@pytest.mark.parametrize("values_per_run", [1, 5000, 1 << 22])
def test_samples_are_every_so_many_rows_of_each_length(monkeypatch, values_per_run):
    monkeypatch.setattr(FIT_SIZE, "VALUES_PER_RUN", values_per_run)
    monkeypatch.setattr(FIT_SIZE, "VALUES_MEASURED", 6000)
    values = matrix(256, 96, 0)
    tensor = SourceTensor(torch.float32, (256, 96), lambda start, stop: values.flatten()[start:stop])
    # K-quants store it in rows of 256, which begin with its own rows every 768 values; Q8_0 in its own.
    planned = FIT_SIZE.options_of({"blocks.0.weight": tensor, "blocks.1.weight": tensor}, "some")["blocks.0.weight"]
    contents = iter([run.read() for run in FIT_SIZE.runs_of(planned)])
    found = FIT_SIZE.sample(planned, contents, "model")
    assert found.keys() == {768, 96}
    assert all(torch.equal(rows, values.view(-1, columns)[::5]) for columns, rows in found.items())


def test_tensors_without_a_choice_are_not_read_to_measure(source, monkeypatch):
    read = []
    monkeypatch.setattr(FIT_SIZE, "runs", lambda tensor, *rest: read.append(tensor.shape) or runs(tensor, *rest))
    monkeypatch.setattr(FIT_SIZE, "product_error", lambda *arguments: 1.0)
    done = []
    FIT_SIZE.plan_for_size(open_source(source), "flux", 1 << 30, {}, "cpu", done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in flux().values())
    assert (256, 512) in read and (256, 64) not in read


def test_hulls_leave_out_what_does_not_pay():
    small, dearer, useless, large = (
        Option("a", 10, 1.0),
        Option("b", 20, 0.9),
        Option("c", 25, 0.95),
        Option("d", 30, 0.1),
    )
    assert lower_hull([large, useless, dearer, small]) == [small, large]


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_near_the_best_of_all_combinations(seed):
    rng = random.Random(seed)
    choices = {}
    for name in "abcde":
        size, error = rng.randint(50, 400), rng.uniform(0.1, 4)
        sizes_and_errors = ((2.6, 0.3), (3.4, 0.15), (4.5, 0.07), (5.5, 0.036), (6.6, 0.018))
        choices[name] = [Option(str(bits), int(size * bits), error * part) for bits, part in sizes_and_errors]
    smallest, largest = (sum(options[end].nbytes for options in choices.values()) for end in (0, -1))
    budget = rng.randint(smallest, largest)
    found = allocate(choices, budget)
    assert sum(choice.nbytes for choice in found.values()) <= budget
    fitting = (
        sum(choice.error for choice in combination)
        for combination in itertools.product(*choices.values())
        if sum(choice.nbytes for choice in combination) <= budget
    )
    best = min(fitting)
    # The relaxation's gap is one step of one matrix.
    steps = [options[i].error - options[i + 1].error for options in choices.values() for i in range(4)]
    assert best <= sum(choice.error for choice in found.values()) <= best + max(steps)
