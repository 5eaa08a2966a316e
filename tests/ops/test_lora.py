"""The side path of one weight: what it adds is what the host would have merged."""

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.lora
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter
from gguf_native.ops.lora import n_loras, side_path

CPU = torch.device("cpu")
KEY, SHAPE = "layer.weight", (24, 16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(
    out: int = 24, into: int = 16, rank: int = 4, alpha: float | None = None, mid=None, dora=None, reshape=None, seed=1
):
    return LoRAAdapter(
        set(), (noise(out, rank, seed=seed), noise(rank, into, seed=seed + 1), alpha, mid, dora, reshape)
    )


def patch(adapter, strength: float = 1.0, strength_model: float = 1.0, offset=None, function=None) -> tuple:
    return strength, adapter, strength_model, offset, function


LOHA = LoHaAdapter(set(), (noise(24, 4), noise(4, 16), None, noise(24, 4), noise(4, 16), None, None, None))
LOW_RANK = {
    "one": [patch(lora())],
    "alpha": [patch(lora(alpha=2.0), 0.5)],
    "two": [patch(lora(), 0.5), patch(lora(rank=8, alpha=4.0), -1.5)],
    "zero": [patch(lora(), 0.0)],
    "rows": [patch(lora(out=8), offset=(0, 8, 8))],
    "columns": [patch(lora(into=6), 2.0, offset=(1, 10, 6))],
    "convolution of one pixel": [
        patch(LoRAAdapter(set(), (noise(24, 4, 1, 1), noise(4, 16, 1, 1), None, None, None, None)))
    ],
}
NOT_LOW_RANK = {
    "loha": [patch(LOHA)],
    "dora": [patch(lora(dora=torch.ones(24, 1)))],
    "scaled weight": [patch(lora(), strength_model=0.5)],
    "function": [patch(lora(), function=lambda delta: 2 * delta)],
    "diff": [patch(("diff", (noise(24, 16),)), 0.5)],
    "set": [patch(("set", (noise(24, 16),)))],
    "rotated": [patch(lora(), 1.0), patch(LOHA, 0.5)],
    "difference of models": [patch(lora()), patch(("model_as_lora", (noise(*SHAPE, seed=9),)), 0.5)],
}


def merged(patches: list, weight: torch.Tensor) -> torch.Tensor:
    return comfy.lora.calculate_weight(patches, weight.clone(), KEY, original_weights={KEY: [(weight,)]})


@pytest.mark.parametrize("patches", LOW_RANK.values(), ids=LOW_RANK.keys())
def test_low_rank_adds_what_would_be_merged(patches):
    weight, x = noise(*SHAPE, seed=3), noise(2, 5, 16, seed=4)
    path = side_path(patches, KEY, SHAPE, CPU, torch.float32)
    assert path.rewrite is None
    assert path.low_rank.down.shape[0] == path.low_rank.up.shape[1] == sum(p[1].weights[1].shape[0] for p in patches)
    y = path.low_rank.add_to(x @ weight.T, x)
    torch.testing.assert_close(y, x @ merged(patches, weight).T, rtol=1e-5, atol=1e-4)
    index = torch.tensor([[0, 23], [7, 7]])
    rows = weight[index] + path.low_rank.rows(index)
    torch.testing.assert_close(rows, merged(patches, weight)[index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("patches", NOT_LOW_RANK.values(), ids=NOT_LOW_RANK.keys())
@pytest.mark.parametrize("on_device", [False, True])
def test_anything_else_rewrites_a_copy_of_the_weight(patches, on_device):
    weight = noise(*SHAPE, seed=3)
    before = weight.clone()
    path = side_path(patches, KEY, SHAPE, CPU, torch.float32, on_device)
    assert path.low_rank is None
    assert torch.equal(path.rewrite(weight), merged(patches, before))
    assert torch.equal(weight, before)


def test_convolution_is_rewritten():
    weight = noise(24, 16, 3, 3, seed=3)
    adapter = LoRAAdapter(set(), (noise(24, 4, 1, 1), noise(4, 16, 3, 3), None, None, None, None))
    path = side_path([patch(adapter)], KEY, tuple(weight.shape), CPU, torch.float32)
    assert torch.equal(path.rewrite(weight), merged([patch(adapter)], weight))


def test_matrix_is_widened():
    weight, wide = noise(24, 16, seed=3), lora(into=32, reshape=[24, 32])
    path = side_path([patch(wide)], KEY, SHAPE, CPU, torch.float32)
    assert path.rewrite(weight).shape == (24, 32)
    assert torch.equal(path.rewrite(weight), merged([patch(wide)], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    path = side_path([patch(lora())], KEY, SHAPE, CPU, dtype)
    assert path.low_rank.up.dtype == path.low_rank.down.dtype == dtype
    x = noise(3, 16).bfloat16()
    assert path.low_rank.add_to(torch.zeros(3, 24, dtype=torch.bfloat16), x).dtype == torch.bfloat16
    assert side_path([patch(LOHA)], KEY, SHAPE, CPU, dtype).rewrite(noise(*SHAPE).half()).dtype == torch.float16


def test_known_by_its_patches_and_device():
    patches = [patch(lora())]
    path = side_path(patches, KEY, SHAPE, CPU, torch.float32)
    assert path.is_of(list(patches), CPU, torch.float32)
    assert not path.is_of(patches, torch.device("meta"), torch.float32)
    assert not path.is_of([patch(patches[0][1])], CPU, torch.float32)
    # The host adds to the very list that it handed over.
    patches.append(patch(lora()))
    assert not path.is_of(patches, CPU, torch.float32)


def test_what_a_change_of_one_lora_leaves_is_not_sent_again(sent):
    first, second, third = lora(alpha=2.0), lora(rank=8), lora(out=8, rank=2)
    rows = 0, 4, 8
    before = [patch(first), patch(second), patch(third, offset=rows)]
    cases = [
        # Another strength of one: its `up`.
        ([patch(first), patch(second, 0.5), patch(third, offset=rows)], [second.weights[0]]),
        # One is gone, the others change places.
        ([patch(third, offset=rows), patch(first)], []),
        # The same factors for other rows, or with another alpha.
        ([patch(third, offset=(0, 0, 8))], [third.weights[1], third.weights[0]]),
        ([patch(LoRAAdapter(set(), (*first.weights[:2], 3.0, *first.weights[3:])))], [first.weights[0]]),
        # One is new, and one is there twice.
        ([patch(first), patch(new := lora(seed=9)), patch(first)], [new.weights[1], new.weights[0]]),
    ]
    cases = [(before, *case) for case in cases]
    # The same file twice, and once no more.
    cases.append(([patch(first), patch(second), patch(first, 0.5)], [patch(first), patch(second)], []))
    for patches_before, patches, expected in cases:
        path = side_path(patches_before, KEY, SHAPE, CPU, torch.float32)
        sent.clear()
        changed = side_path(patches, KEY, SHAPE, CPU, torch.float32, before=path)
        assert [id(tensor) for tensor in sent] == [id(tensor) for tensor in expected]
        anew = side_path(patches, KEY, SHAPE, CPU, torch.float32)
        for one, other in zip(changed.low_rank, anew.low_rank, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "patches",
    [
        [patch(lora())],
        [patch(lora(rank=8)), patch(lora())],
        [patch(lora(out=8), offset=(0, 0, 8)), patch(lora(rank=8))],
    ],
    ids=["fewer", "order", "slices"],
)
def test_other_loras_have_their_own_down(patches):
    kept = [patch(lora()), patch(lora(rank=8))]
    before = side_path(kept, KEY, SHAPE, CPU, torch.float32)
    changed = side_path(patches, KEY, SHAPE, CPU, torch.float32, before=before)
    anew = side_path(patches, KEY, SHAPE, CPU, torch.float32)
    for one, other in zip(changed.low_rank, anew.low_rank, strict=True):
        assert torch.equal(one, other)
    for dtype, device in ((torch.bfloat16, CPU), (torch.float32, torch.device("meta"))):
        other = side_path(kept, KEY, SHAPE, device, dtype, before=before)
        assert (other.low_rank.down.dtype, other.low_rank.down.device) == (dtype, device)


def test_factors_of_different_ranks_change_nothing():
    """As in the host, which logs it: such a file is broken."""
    broken = LoRAAdapter(set(), (noise(24, 4), noise(5, 16), None, None, None, None))
    path = side_path([patch(broken)], KEY, SHAPE, CPU, torch.float32)
    weight = noise(*SHAPE)
    assert torch.equal(path.rewrite(weight), weight)


def test_how_many_loras_patches_come_from():
    slices = [patch(lora(out=8), offset=(0, start, 8)) for start in (0, 8, 16)]
    assert n_loras([]) == 0
    assert n_loras([patch(lora()), patch(LOHA)]) == 2
    assert n_loras(slices) == 1
    assert n_loras([*slices, *slices[:1], patch(lora())]) == 3
    # A merge of two models is none.
    assert n_loras([patch(("diff", (noise(24, 16),))), patch([(noise(24, 16), None)])]) == 0
