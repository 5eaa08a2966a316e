"""Types whose groups of values are points of a grid: their weighted error is at most that of ggml, and they are exact
where that is possible."""

import ctypes

import ggml_reference
import pytest
import torch
from ggml_reference import COLUMNS, ROWS, gaussian, generator, heavy_tailed, library
from gguf_native.ops.formats import FORMATS, grid_search

TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
NEEDS_IMPORTANCE = ("IQ2_XXS", "IQ2_XS")
every_type = pytest.mark.parametrize("name", TYPES)

CASES = {
    "gaussian": gaussian,
    "heavy tailed": heavy_tailed,
    "outlier columns": lambda: gaussian() * torch.where(torch.arange(COLUMNS) % 64 == 3, 20, 1),
    "one huge value": lambda: torch.where(torch.arange(COLUMNS) == 77, 6e4, gaussian() * 0.02),
    "positive only": lambda: gaussian().abs(),
    "few distinct values": lambda: (gaussian() * 2).round() / 2,
    "constant rows": lambda: gaussian()[:, :1].expand(ROWS, COLUMNS).contiguous(),
    "mostly zero": lambda: gaussian() * (torch.rand(ROWS, COLUMNS, generator=generator()) < 0.1),
    "small": lambda: gaussian() * 1e-4,
    "large": lambda: gaussian() * 1e4,
}
# Where all magnitudes of a block are equal, many steps are as good but for the gaps in the grid: ours stops at one.
ALLOWANCE = {"constant rows": 1.4}

IMPORTANCE = {
    "ones": lambda: torch.ones(COLUMNS),
    "steep": lambda: torch.rand(COLUMNS, generator=generator()) ** 4,
    "some zero": lambda: torch.rand(COLUMNS, generator=generator()).sub_(0.3).clamp_(min=0),
    "six decades": lambda: 10 ** (torch.rand(COLUMNS, generator=generator()) * 6 - 3),
}


ggml = pytest.fixture(library, scope="module")


def by_ggml(ggml: ctypes.CDLL, values: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
    """float32 [rows, columns] -> what ggml makes of it, decoded."""
    # Without importance ggml ends the process for these types.
    assert importance is not None or name not in NEEDS_IMPORTANCE
    row = FORMATS[name]
    blocks = ggml_reference.by_ggml(ggml, values, name, importance)
    return row.decode(blocks.view(-1, row.block_bytes)).view(values.shape)


def encode(values: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    weights = importance if importance is None else importance.expand(values.shape).reshape(-1, 256)
    return FORMATS[name].encode(values.reshape(-1, 256), weights)


def decoded(values: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    return FORMATS[name].decode(encode(values, name, importance)).view(values.shape)


def error(got: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """The root mean square error, weighted."""
    squares = (got - values).double().square()
    return float((squares if importance is None else squares * importance).mean().sqrt())


@every_type
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", IMPORTANCE)
def test_weighted_error_is_at_most_that_of_ggml(ggml, name, case, kind):
    values, importance = CASES[case](), IMPORTANCE[kind]()
    expected = error(by_ggml(ggml, values, name, importance), values, importance)
    assert error(decoded(values, name, importance), values, importance) <= expected * ALLOWANCE.get(case, 1)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in NEEDS_IMPORTANCE])
@pytest.mark.parametrize("case", CASES)
def test_error_without_importance_is_at_most_that_of_ggml(ggml, name, case):
    values = CASES[case]()
    assert error(decoded(values, name), values) <= error(by_ggml(ggml, values, name, None), values)


@every_type
def test_importance_lowers_the_weighted_error(name):
    values, importance = gaussian(), IMPORTANCE["steep"]()
    assert error(decoded(values, name, importance), values, importance) < 0.95 * error(
        decoded(values, name), values, importance
    )


def representable(name: str) -> torch.Tensor:
    """Values of random blocks with d = 2 ** -6, whose sub-blocks have the scales 9, 10 and 15."""
    row = FORMATS[name]
    blocks = torch.randint(0, 256, (40, row.block_bytes), dtype=torch.uint8, generator=generator())
    blocks[:, :2] = torch.tensor([2.0**-6], dtype=torch.float16).view(torch.uint8)
    scales = torch.tensor([15, 9, 10, 15, 9, 10, 10, 9], dtype=torch.uint8)
    if name.endswith("XXS"):
        words = blocks[:, 2:].view(-1, 8, 8) if name == "IQ2_XXS" else blocks[:, 66:].view(-1, 8, 4)
        words[:, :, -1] = words[:, :, -1] & 15 | scales << 4
    else:
        count = 4 if name == "IQ3_S" else 8
        blocks[:, -count:] = scales[:count] | scales.flip(0)[:count] << 4
    return row.decode(blocks)


@every_type
def test_representable_values_are_kept(name):
    values = representable(name)
    assert error(decoded(values, name), values) < 0.05 * float(values.square().mean().sqrt())
    exact = (decoded(values, name) == values).view(-1, FORMATS[name].group_size).all(1)
    assert exact.float().mean() > 0.55


@every_type
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-12, 1e-30, 1e-40])
def test_blocks_too_small_for_float16_are_zero(name, scale):
    values = gaussian() * scale
    values[5:] = gaussian()[5:]
    blocks = encode(values, name).view(len(values), -1)
    assert not blocks[:5].any()
    assert blocks[5:].any(1).all()


@every_type
@pytest.mark.parametrize("scale", [1e7, 1e20, 3e38])
def test_blocks_too_great_for_float16_stay_finite_and_keep_their_signs(name, scale):
    values = gaussian().div_(5).clamp_(-1, 1) * scale
    got = decoded(values, name)
    assert got.isfinite().all()
    assert (got.sign() == values.sign()).float().mean() > 0.9


@every_type
def test_blocks_without_importance_are_weighted_alike(name):
    importance = torch.ones(COLUMNS)
    importance[256:512] = 0
    assert torch.equal(encode(gaussian(), name, importance), encode(gaussian(), name))


@every_type
def test_greatness_of_importance_does_not_matter(name):
    importance = IMPORTANCE["steep"]()
    assert torch.equal(encode(gaussian(), name, importance), encode(gaussian(), name, importance * 2.0**40))


@every_type
def test_bytes_do_not_depend_on_the_company_of_a_block_or_on_threads(name):
    values, importance = gaussian(), IMPORTANCE["steep"]()
    blocks = encode(values, name, importance)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [encode(row.unsqueeze(0), name, importance) for row in values]
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(rows), blocks)


@every_type
def test_passes_join_without_a_seam(name, monkeypatch):
    blocks = encode(gaussian(), name)
    monkeypatch.setattr(grid_search, "VALUES_PER_PASS", {"cpu": 5 * 256})
    monkeypatch.setattr(grid_search, "DISTANCES_PER_PASS", {"cpu": 7 * 1024})
    assert torch.equal(encode(gaussian(), name), blocks)


@every_type
def test_no_blocks(name):
    assert encode(torch.zeros(0, 256), name).shape == (0, FORMATS[name].block_bytes)


@pytest.mark.parametrize("grid", TYPES)
def test_points_found_are_the_nearest(grid):
    points = grid_search.codebook(grid, torch.device("cpu")).double()
    targets = torch.rand(points.shape[1], 3, 50, generator=generator()) * points.max()
    weights = torch.rand(targets.shape, generator=generator()) ** 4
    difference = targets.double().unsqueeze(-1) - points.t()[:, None, None]
    distances = (difference.square() * weights.unsqueeze(-1)).sum(0)
    found = grid_search.nearest_points(grid, targets, weights)
    best, got = distances.amin(-1), distances.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    # Whole numbers are as fine as 1 in 2000 of the greatest weight, so that close calls may go wrong.
    assert (got <= best * 1.01 + 1e-9).all()
    assert (got == best).float().mean() > 0.97


@pytest.mark.cuda
@every_type
def test_bytes_on_the_gpu_are_those_of_the_cpu(name):
    importance = IMPORTANCE["steep"]()
    expected = encode(gaussian(), name, importance)
    assert torch.equal(encode(gaussian().cuda(), name, importance.cuda()).cpu(), expected)
