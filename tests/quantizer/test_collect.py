"""What a running model's matrices see: counted rightly, added up over runs, and of use to the quantiser."""

import pytest
import torch
from gguf_native.quantizer.collect import Seen, add_to_file, check_file, watching
from gguf_native.quantizer.errors import ImportanceError
from gguf_native.quantizer.importance import read_importance

NAME = "0.weight"


class Two(torch.nn.Sequential):
    def __init__(self, columns: int = 6):
        super().__init__(torch.nn.Linear(columns, 4), torch.nn.GELU(), torch.nn.Linear(4, 3))


def seen_by(model: torch.nn.Module, *inputs: torch.Tensor) -> Seen:
    seen = Seen()
    with watching(model, seen), torch.inference_mode():
        for x in inputs:
            model(x)
    return seen


def batch(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_means_of_squares_over_runs_and_files(tmp_path):
    model, path = Two(), tmp_path / "seen.gguf"
    inputs = [batch(2, 5, 6), batch(3, 6, seed=1), batch(6, seed=2)]
    assert add_to_file(path, seen_by(model, *inputs[:2]), "one") == 2
    assert add_to_file(path, seen_by(model, inputs[2]), "two") == 2
    rows = torch.cat([x.reshape(-1, 6) for x in inputs])
    found = read_importance(path)
    torch.testing.assert_close(found[NAME], rows.square().mean(0), rtol=1e-5, atol=0)
    hidden = model[1](model[0](rows))
    torch.testing.assert_close(found["2.weight"], hidden.square().mean(0).detach(), rtol=1e-5, atol=0)


def test_16_bit_inputs_are_summed_in_float32():
    x = torch.full((40_000, 6), 3.0, dtype=torch.bfloat16)
    assert seen_by(Two().bfloat16(), x).sums[NAME].tolist() == pytest.approx([360_000] * 6, rel=1e-4)


def test_nothing_is_watched_afterwards():
    model = Two()
    seen = seen_by(model, batch(2, 6))
    model(batch(2, 6))
    assert seen.counts[NAME] == 2


def test_a_failing_run_leaves_no_hooks():
    model, seen = Two(), Seen()
    with pytest.raises(RuntimeError), watching(model, seen):
        model(batch(2, 7))
    assert not model[0]._forward_pre_hooks


def test_a_file_of_another_model_is_refused_and_stays(tmp_path):
    path = tmp_path / "seen.gguf"
    add_to_file(path, seen_by(Two(), batch(2, 6)), "one")
    before = path.read_bytes()
    with pytest.raises(ImportanceError, match=r"seen\.gguf.*6 columns.*'0\.weight'.*8"):
        add_to_file(path, seen_by(Two(8), batch(2, 8)), "two")
    assert path.read_bytes() == before


def test_a_file_of_another_model_is_refused_before_the_run(tmp_path):
    path = tmp_path / "seen.gguf"
    check_file(path, Two(8))
    add_to_file(path, seen_by(Two(), batch(2, 6)), "one")
    check_file(path, Two())
    with pytest.raises(ImportanceError, match=r"seen\.gguf.*6 columns"):
        check_file(path, Two(8))


def test_inputs_that_are_not_finite_are_named(tmp_path):
    with pytest.raises(ImportanceError, match=r"'0\.weight' were NaN or infinite"):
        add_to_file(tmp_path / "seen.gguf", seen_by(Two(), batch(2, 6) / 0), "one")
    assert not list(tmp_path.iterdir())


def test_a_model_that_never_ran_is_no_file(tmp_path):
    with pytest.raises(ImportanceError, match="no linear layer ran"):
        add_to_file(tmp_path / "seen.gguf", Seen(), "one")
