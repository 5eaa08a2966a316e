"""Every GGUF type decodes to the same bits as the gguf package."""

import gguf
import numpy as np
import pytest
import samples
import torch
from gguf_native.ops.formats import FORMAT_BY_NUMBER, FORMATS
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The gguf package sizes these types but does not decode them.
NUMPY_DTYPES = {"F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}

every_format = pytest.mark.parametrize("name", FORMATS)


def reference(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """float32 values of uint8 [n, block_bytes] by the gguf package."""
    data = blocks.contiguous().numpy()
    with np.errstate(all="ignore"):
        if name in NUMPY_DTYPES:
            return torch.from_numpy(data.view(NUMPY_DTYPES[name]).astype(np.float32))
        return torch.from_numpy(np.array(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit patterns; of a NaN only the place counts, since processors differ in the payload they pass on."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    torch.testing.assert_close(got[numbers].view(bits), expected[numbers].view(bits), rtol=0, atol=0)


def test_table_matches_the_gguf_package():
    sizes = {int(number): size for number, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: row.__name__ for name, row in FORMATS.items()} == {name: name for name in FORMATS}
    assert len(FORMAT_BY_NUMBER) == len(FORMATS)
    for name, row in FORMATS.items():
        assert row.number == gguf.GGMLQuantizationType[name]
        assert (row.block_size, row.block_bytes) == sizes[row.number]


def test_every_type_the_gguf_package_decodes_is_here():
    assert {number.name for number in gguf.quants._type_traits} <= set(FORMATS)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 67])
def test_random_blocks(name, dtype, n):
    blocks = samples.random_blocks(name, n, seed=n)
    expected = reference(blocks, name) if n else torch.empty(0, FORMATS[name].block_size)
    assert expected.isfinite().all()
    assert_same_bits(FORMATS[name].decode(blocks, dtype), expected.to(dtype))


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_blocks(name, dtype):
    blocks = samples.adversarial_blocks(name)
    assert_same_bits(FORMATS[name].decode(blocks, dtype), reference(blocks, name).to(dtype))


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("IQ")])
def test_every_grid_point(name):
    blocks = torch.cat([samples.random_blocks(name, 1024, seed) for seed in range(4)])
    assert_same_bits(FORMATS[name].decode(blocks), reference(blocks, name))


def at_odd_offset(blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat([blocks.new_zeros(1), blocks.flatten()])[1:].view(blocks.shape)


def in_odd_memory(blocks: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\0" + blocks.numpy().tobytes()), dtype=torch.uint8, offset=1).view(blocks.shape)


def among_other_bytes(blocks: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(blocks, (3, 2))[:, 3:-2]


def every_other_row(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.repeat_interleave(2, 0)[::2]


def transposed(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.t().contiguous().t()


def every_third_byte(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.repeat_interleave(3, 1)[:, ::3]


@every_format
@pytest.mark.parametrize(
    "place", [at_odd_offset, in_odd_memory, among_other_bytes, every_other_row, transposed, every_third_byte]
)
@pytest.mark.parametrize("n", [1, 5])
def test_any_place_in_memory(name, place, n):
    blocks = samples.random_blocks(name, n)
    placed = place(blocks)
    assert torch.equal(placed, blocks)
    assert_same_bits(FORMATS[name].decode(placed), FORMATS[name].decode(blocks))


@every_format
def test_input_is_left_alone(name):
    blocks = samples.adversarial_blocks(name)
    before = blocks.clone()
    FORMATS[name].decode(blocks)
    assert torch.equal(blocks, before)


@every_format
def test_inference_mode_and_after_it(name):
    blocks = samples.random_blocks(name, 3)
    with torch.inference_mode():
        inside = FORMATS[name].decode(blocks)
    assert_same_bits(inside.clone(), FORMATS[name].decode(blocks))


class Launches(TorchDispatchMode):
    """Names of the operations that do work: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view and "empty" not in function.name():
            self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@every_format
def test_no_tensor_is_built_from_host_data_after_the_first_use(name):
    blocks = samples.random_blocks(name, 3)
    FORMATS[name].decode(blocks)
    with Launches() as launches:
        FORMATS[name].decode(blocks)
    assert launches.names
    assert not {"lift_fresh", "lift_fresh_copy", "arange", "scalar_tensor"} & set(launches.names)


@pytest.mark.parametrize(("name", "most"), [("Q8_0", 2), ("Q4_0", 5), ("Q4_K", 11), ("Q5_K", 14), ("Q6_K", 9)])
def test_number_of_launches(name, most):
    blocks = samples.random_blocks(name, 4)
    FORMATS[name].decode(blocks)
    with Launches() as launches:
        FORMATS[name].decode(blocks, torch.bfloat16)
    assert len(launches.names) <= most, launches.names


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_decodes_the_same_bits_and_can_be_captured(name, dtype):
    blocks = samples.adversarial_blocks(name)
    expected = reference(blocks, name).to(dtype)
    blocks = blocks.cuda()
    assert_same_bits(FORMATS[name].decode(blocks, dtype).cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = FORMATS[name].decode(blocks, dtype)
    out.zero_()
    graph.replay()
    assert_same_bits(out.cpu(), expected)
