"""The workspace that the layers of a model decode into: on a GPU where there is one, else on the CPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from samples import random_blocks

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: there are no packed weights")

from gguf_native.ops import matmul
from gguf_native.ops.dequantize import dequantize
from gguf_native.ops.eight_bits import RowScales, quantize_rows_into, row_scales
from gguf_native.ops.formats import FORMATS
from gguf_native.ops.layout import pack
from gguf_native.ops.low_rank import LowRank
from gguf_native.ops.matmul import Workspace, decode_weight, linear, linear_few_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL, LARGE = ("Q4_K", (16, 512)), ("Q8_0", (32, 1024))


def blocks_of(name: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """uint8 [n_rows, row_bytes] on DEVICE."""
    n_blocks = shape[0] * shape[1] // FORMATS[name].block_size
    return random_blocks(name, n_blocks, seed).view(shape[0], -1).to(DEVICE)


def weight_of(name: str, shape: tuple[int, int], seed: int = 0):
    return pack(blocks_of(name, shape, seed).flatten(), name, shape, torch.float32)


def sizes(workspace: Workspace) -> dict[str, int]:
    """Bytes of each buffer, by its use."""
    return {use: buffer.nbytes for (use, _), buffer in workspace.buffers.items()}


def is_right(workspace: Workspace, blocks: torch.Tensor, name: str, shape: tuple, dtype=torch.float32) -> bool:
    """Whether the workspace decodes as `dequantize` does."""
    out = workspace.decode(blocks, name, shape, dtype)
    return out.dtype == dtype and torch.equal(out, dequantize(blocks, name, shape, dtype))


def test_all_layers_share_the_memory_of_the_largest():
    workspace = Workspace()
    blocks = {model: blocks_of(*model) for model in (LARGE, SMALL)}
    addresses = {workspace.decode(blocks[model], *model, torch.float32).data_ptr() for model in (LARGE, SMALL, LARGE)}
    assert len(addresses) == 1
    assert sizes(workspace) == {"weight": 32 * 1024 * 4}


def test_memory_grows_and_only_then_is_new():
    workspace = Workspace()
    small, large = blocks_of(*SMALL), blocks_of(*LARGE)
    assert is_right(workspace, small, *SMALL)
    assert sizes(workspace) == {"weight": 16 * 512 * 4}
    assert is_right(workspace, large, *LARGE)
    assert sizes(workspace) == {"weight": 32 * 1024 * 4}
    (buffer,) = workspace.buffers.values()
    # What was remembered of the small one lies in memory that is gone.
    assert is_right(workspace, small, *SMALL)
    assert is_right(workspace, large, *LARGE)
    assert all(kept is buffer for kept in workspace.buffers.values())


def test_layers_in_turn():
    workspace = Workspace()
    layers = [(blocks_of(*model, seed), *model) for seed, model in enumerate((LARGE, SMALL, SMALL, LARGE))]
    for _ in range(3):
        for layer in layers:
            assert is_right(workspace, *layer)


def test_dtypes_and_factors_in_turn():
    workspace, (name, shape) = Workspace(), SMALL
    blocks = blocks_of(name, shape)
    scales = {dtype: row_scales(FORMATS[name], blocks, dtype) for dtype in (torch.int8, torch.float8_e4m3fn)}
    values = dequantize(blocks, name, shape)
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert is_right(workspace, blocks, name, shape, dtype)
        for dtype, of_rows in scales.items():
            stored = workspace.decode(blocks, name, shape, dtype, of_rows)
            assert stored.dtype == dtype
            assert (stored.float() * of_rows.scales.unsqueeze(1) - values).norm() < 0.05 * values.norm()
        factors, of_rows = scales[torch.int8]
        weaker = workspace.decode(blocks, name, shape, torch.int8, RowScales(factors / 2, of_rows))
        assert weaker.abs().max() == 64


def test_factors_of_another_rank_where_others_lay(monkeypatch):
    """A LoRA whose memory one of another rank has taken: what is done again is not what was done for the first."""

    def decode(blocks, name, change, out):
        again = partial(out.fill_, len(change.down))
        again()
        return again

    monkeypatch.setattr(matmul, "decode", decode)
    workspace, (name, (n_rows, n_columns)) = Workspace(), SMALL
    blocks, down, up = blocks_of(*SMALL), torch.zeros(32, n_columns), torch.zeros(n_rows * 32)
    for rank in (16, 32, 16):
        factors = LowRank(down[:rank], up[: n_rows * rank].view(n_rows, rank))
        assert (workspace.decode(blocks, name, (n_rows, n_columns), torch.float32, factors) == rank).all()
    assert len(workspace.done) == 2


def test_release():
    workspace, blocks = Workspace(), blocks_of(*SMALL)
    for _ in range(2):
        assert is_right(workspace, blocks, *SMALL)
        assert is_right(workspace, blocks, *SMALL)
        workspace.release()
        assert not workspace.buffers
        assert not workspace.done


def test_a_weight_changed_in_place_is_decoded_anew():
    workspace, blocks = Workspace(), blocks_of(*SMALL)
    assert is_right(workspace, blocks, *SMALL)
    blocks.copy_(blocks_of(*SMALL, seed=1))
    assert is_right(workspace, blocks, *SMALL)


def test_inside_and_outside_inference_mode():
    workspace, weight = Workspace(), weight_of(*SMALL)
    x = torch.randn(3, 512, device=DEVICE)
    expected = F.linear(x, dequantize(weight._qdata, *SMALL))
    for inference in (True, False, True):
        workspace.release()
        with torch.inference_mode(inference), torch.no_grad():
            assert torch.equal(linear(x, weight, None, workspace), expected)
        with torch.no_grad():
            out = decode_weight(weight, torch.float32, workspace)
            assert not out.is_inference()
            assert torch.equal(linear(x, weight, None, workspace), expected)


def test_gradients_of_two_layers_are_right():
    """What backward needs is not overwritten by the next layer."""
    weights = [weight_of("Q4_K", (512, 512), seed) for seed in (1, 2)]
    x = torch.randn(3, 512, device=DEVICE, requires_grad=True)
    gradients = []
    for workspace in (None, Workspace()):
        y = linear(linear(x, weights[0], None, workspace), weights[1], None, workspace)
        gradients += torch.autograd.grad(y.sum(), x)
    assert torch.equal(*gradients)


def in_eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1, device=DEVICE)
    quantize_rows_into(x, out, scales)
    return out, scales


def test_inputs_in_turn():
    """Also such as begin at the same address, and such as changed where they are."""
    workspace = Workspace()
    memory = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    parts = [memory, memory[:12], memory[:12].view(24, 256), memory[12:].view(24, 256), memory.half()]
    for _ in range(3):
        memory *= 1.5
        for x in parts:
            for actual, expected in zip(workspace.quantize_rows(x), in_eight_bits(x), strict=True):
                assert actual.dtype == expected.dtype
                assert torch.equal(actual.float(), expected.float())
    assert sizes(workspace) == {"inputs": 24 * 512, "scales of inputs": 24 * 4}


def test_few_rows_that_do_not_lie_one_after_another():
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to test")
    weight = weight_of(*SMALL)
    x = torch.randn(2, 3, 1024, device=DEVICE).half()
    with torch.inference_mode():
        for part in (x[..., :512], x[:, ::2, 512:]):
            assert torch.equal(linear_few_rows(part, weight, None), linear_few_rows(part.contiguous(), weight, None))
