"""What a source of the converter reads, and that any run of a tensor is what it is in the whole."""

import torch
from gguf_native.quantizer.source import SourceTensor
from gguf_native.quantizer.sources import open_source

NAME = "double_blocks.0.img_attn.proj.weight"
LAYER = NAME.removesuffix(".weight")


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def values(path) -> dict[str, torch.Tensor]:
    """All that a source reads; what a tensor says of itself is what reading gives."""
    found = {}
    for name, tensor in open_source(path).tensors.items():
        found[name] = tensor.read()
        assert (found[name].dtype, tuple(found[name].shape)) == (tensor.dtype, tensor.shape)
        assert_runs_join(tensor, found[name].flatten())
    return found


def assert_runs_join(tensor: SourceTensor, whole: torch.Tensor) -> None:
    """Any run of a tensor's values is what it is in the whole: within a row or block, over several, to the end."""
    for cuts in (1, 3, 7):
        step = max(1, len(whole) // cuts - 1)
        for start in range(0, len(whole), step):
            some = tensor.values(start, min(start + step, len(whole)))
            assert some.dtype == whole.dtype
            assert torch.equal(some, whole[start : start + step])


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name
