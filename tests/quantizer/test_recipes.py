"""Which type each tensor gets: file types, ranks, kept tensors, and rows that are not whole blocks."""

import random

import gguf
import pytest
import torch
from gguf_native.loader.architectures import ARCHITECTURES, architecture_of
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer.errors import RecipeError, SourceError
from gguf_native.quantizer.plan import plan_tensors
from gguf_native.quantizer.recipes import BLOCKS_OF_32, FILE_TYPES, file_type
from gguf_native.quantizer.sensitivity import SENSITIVITY
from gguf_native.quantizer.source import SourceTensor

SIZES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "BF16"]
DOUBLE, SINGLE, HIDDEN = 19, 38, 512


def source(*shape: int, dtype: torch.dtype = torch.bfloat16) -> SourceTensor:
    return SourceTensor(dtype, shape, lambda start, stop: torch.zeros(stop - start, dtype=dtype))


def flux() -> dict[str, SourceTensor]:
    """As many blocks as Flux has, a sixth as wide."""
    tensors = {
        "img_in.weight": source(HIDDEN, 64),
        "img_in.bias": source(HIDDEN),
        "txt_in.weight": source(HIDDEN, 4096),
    }
    for block in range(DOUBLE):
        for stream in ("img", "txt"):
            at = f"double_blocks.{block}.{stream}"
            tensors[f"{at}_mod.lin.weight"] = source(6 * HIDDEN, HIDDEN)
            tensors[f"{at}_attn.qkv.weight"] = source(3 * HIDDEN, HIDDEN)
            tensors[f"{at}_attn.proj.weight"] = source(HIDDEN, HIDDEN)
            tensors[f"{at}_attn.norm.query_norm.scale"] = source(128)
            tensors[f"{at}_mlp.0.weight"] = source(4 * HIDDEN, HIDDEN)
            tensors[f"{at}_mlp.2.weight"] = source(HIDDEN, 4 * HIDDEN)
    for block in range(SINGLE):
        at = f"single_blocks.{block}."
        tensors[f"{at}linear1.weight"] = source(7 * HIDDEN, HIDDEN)
        tensors[f"{at}linear2.weight"] = source(HIDDEN, 5 * HIDDEN)
        tensors[f"{at}modulation.lin.weight"] = source(3 * HIDDEN, HIDDEN)
    return tensors | {"final_layer.linear.weight": source(64, HIDDEN)}


def types(tensors: dict[str, SourceTensor], architecture: str, name: str) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in plan_tensors(tensors, architecture, file_type(name))}


def n_bytes(tensors: dict[str, SourceTensor], architecture: str, name: str) -> int:
    return sum(tensor.nbytes for tensor in plan_tensors(tensors, architecture, file_type(name)))


@pytest.mark.parametrize("name", FILE_TYPES)
def test_numbers_are_those_of_llama_cpp(name):
    known = {entry.name: entry.value for entry in gguf.LlamaFileType}
    spellings = (f"MOSTLY_{name}", f"ALL_{name}", f"MOSTLY_{name}_MOE")
    assert FILE_TYPES[name].number in [known[spelling] for spelling in spellings if spelling in known]


def test_every_file_type_mixes_types_that_can_be_written():
    for row in FILE_TYPES.values():
        for type_name in row.types:
            assert hasattr(FORMATS[type_name], "encode")
            if FORMATS[type_name].block_size == 256:
                assert FORMATS[BLOCKS_OF_32[type_name]].block_size == 32


def test_an_unknown_file_type_lists_those_that_are_known():
    with pytest.raises(RecipeError, match=r"'Q4_K'.*Q4_K_M"):
        file_type("Q4_K")


def test_every_architecture_has_its_sensitivity():
    assert {row.name for row in ARCHITECTURES} == SENSITIVITY.keys()


def test_letters_and_digits_order_the_sizes():
    sizes = [n_bytes(flux(), "flux", name) for name in SIZES]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", ["Q3_K_M", "Q3_K_L", "Q4_K_M", "Q5_K_M"])
def test_flux_spends_its_bytes_on_early_double_blocks_and_late_single_ones(name):
    base, some, most = FILE_TYPES[name].types
    chosen = types(flux(), "flux", name)
    assert chosen["double_blocks.0.img_attn.qkv.weight"] == most
    assert chosen["double_blocks.1.txt_mlp.2.weight"] == most
    assert chosen["double_blocks.18.img_attn.qkv.weight"] == some
    assert chosen["single_blocks.30.linear1.weight"] == chosen["single_blocks.30.linear2.weight"] == some
    assert chosen["single_blocks.37.linear2.weight"] == some
    assert chosen["single_blocks.10.linear1.weight"] == chosen["double_blocks.0.img_mlp.0.weight"] == base
    # Of 57 blocks in all, those from 46 to 54 matter most among the single ones, which are counted from 19.
    assert [block for block in range(SINGLE) if chosen[f"single_blocks.{block}.linear1.weight"] == some] == [
        block - DOUBLE for block in range(46, 55)
    ]
    kept = [name for name, type_name in chosen.items() if type_name == "BF16"]
    assert kept == ["img_in.weight", "txt_in.weight", "final_layer.linear.weight"]


def test_types_do_not_depend_on_the_order_of_tensors():
    tensors = flux()
    shuffled = list(tensors)
    random.Random(0).shuffle(shuffled)
    assert types({name: tensors[name] for name in shuffled}, "flux", "Q4_K_M") == types(tensors, "flux", "Q4_K_M")


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((512,), torch.bfloat16, ("F32", (512,))),
        ((4, 256), torch.bfloat16, ("F32", (4, 256))),
        ((), torch.float16, ("F32", (1,))),
        ((512, 512), torch.float16, ("Q4_K", (512, 512))),
        # 320 is no multiple of 256, 8 x 320 is.
        ((8, 320), torch.float16, ("Q4_K", (10, 256))),
        ((64, 4, 3, 3), torch.float16, ("Q4_K", (9, 256))),
        ((64, 16, 1, 4, 4), torch.float16, ("Q4_K", (64, 256))),
        ((5, 352), torch.float16, ("Q5_0", (5, 352))),
        ((11, 1001), torch.float16, ("F16", (11, 1001))),
        ((11, 1001), torch.float32, ("F32", (11, 1001))),
        ((1049, 1001), torch.float32, ("BF16", (1049, 1001))),
        ((0,), torch.float32, ("F32", (1,))),
        ((16, 256), torch.int32, ("I32", (16, 256))),
    ],
    ids=str,
)
def test_what_becomes_of_shapes(shape, dtype, expected):
    (tensor,) = plan_tensors({"blocks.0.weight": source(*shape, dtype=dtype)}, "wan", file_type("Q4_K_S"))
    assert (tensor.type, tensor.shape) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
def test_marks_are_left_out(dtype):
    assert plan_tensors({"is_known": source(4, dtype=dtype)}, "wan", file_type("Q8_0")) == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.weight", torch.uint8),
        ("a.weight", torch.bool),
        ("a.weight", torch.qint8),
        ("a.weight", torch.complex64),
        ("a.weight", torch.uint16),
        ("frequencies", torch.complex64),
    ],
    ids=str,
)
def test_what_gguf_has_no_type_for_is_named(name, dtype):
    with pytest.raises(SourceError, match=rf"'{name}' has dtype {dtype}.*original model"):
        plan_tensors({name: SourceTensor(dtype, (4, 4), None)}, "wan", file_type("Q8_0"))


def test_six_dimensions_are_refused():
    tensors = {"a.weight": source(2, 3, 1, 2, 3, 512)}
    with pytest.raises(SourceError, match=r"'a\.weight' has 6 dimensions, \[2, 3, 1, 2, 3, 512\]"):
        plan_tensors(tensors, "wan", file_type("Q8_0"))


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("wan", "blocks.0.modulation", "F32"),
        ("wan", "patch_embedding.weight", "BF16"),
        ("ltxv", "transformer_blocks.1.scale_shift_table", "F32"),
        ("hidream", "double_stream_blocks.0.block.ff_i.gate.weight", "F32"),
        ("lumina2", "cap_pad_token", "F32"),
        ("sd3", "pos_embed", "BF16"),
        ("sdxl", "input_blocks.0.0.weight", "BF16"),
        ("sdxl", "input_blocks.10.0.weight", "Q8_0"),
        ("vae", "decoder.conv_in.weight", "BF16"),
        ("vae", "decoder.mid.block_1.conv2.weight", "Q8_0"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "BF16"),
        ("something new", "blocks.3.attention.weight", "Q8_0"),
        ("something new", "embed.weight", "BF16"),
    ],
)
def test_what_is_kept(architecture, name, expected):
    assert types({name: source(512, 512)}, architecture, "Q8_0")[name] == expected


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: f"{row.name} {row.needs[0]}")
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_architectures_are_known_by_their_tensors(row, prefix):
    assert architecture_of([prefix + name for name in row.needs]) == (row, prefix)
