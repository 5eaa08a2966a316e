"""Inputs of the converter: safetensors in one file or many, ComfyUI's formats, torch checkpoints; and broken ones."""

import importlib.util
import json
import struct
import zipfile

import pytest
import torch
from gguf_native.quantizer import safetensors_file
from gguf_native.quantizer.errors import SourceError
from gguf_native.quantizer.source import SourceTensor
from gguf_native.quantizer.sources import open_source
from safetensors.torch import save_file

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


@pytest.fixture
def save(tmp_path):
    def save(tensors, name="model.safetensors", metadata=None):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool], ids=str
)
def test_every_dtype_is_read_as_it_is(save, dtype):
    tensors = {
        "a": (matrix(3, 5) * 100).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    assert_same(values(save(tensors)), tensors)


def test_metadata_is_read(save):
    assert open_source(save({"a": matrix(2, 2)}, metadata={"config": "{}"})).metadata == {"config": "{}"}


@pytest.fixture
def shards(save, tmp_path):
    """Two shards, their index, and all tensors."""
    parts = [{"a": matrix(4, 8), "b": matrix(3)}, {"c": matrix(5, 5)}]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save(part, name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts[0] | parts[1]


@pytest.mark.parametrize(
    "name", ["", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
)
def test_shards_are_read_together(shards, tmp_path, name):
    assert_same(values(tmp_path / name), shards)


def test_a_folder_of_shards_needs_no_index(shards, tmp_path):
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(values(tmp_path), shards)


def test_a_missing_shard_is_named(shards, tmp_path):
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for name in ("", "model-00001-of-00002.safetensors"):
        with pytest.raises(SourceError, match=r"1 of 2 shards are missing: model-00002-of-00002"):
            open_source(tmp_path / name)


def test_a_folder_with_two_models_is_not_guessed(save, tmp_path):
    save({"a": matrix(2)}, "one.safetensors")
    save({"a": matrix(2)}, "two.safetensors")
    with pytest.raises(SourceError, match=r"one\.safetensors, two\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[]", "no json"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="is not an index"):
        open_source(tmp_path)


@pytest.mark.parametrize("numbers", ["00001-of-00000", "00003-of-00002", "00000-of-00002"])
def test_shards_whose_numbers_cannot_be_are_refused(shards, save, numbers):
    with pytest.raises(SourceError, match=r"is shard \d of \d by its name"):
        open_source(save({"a": matrix(2)}, f"model-{numbers}.safetensors"))


@pytest.mark.parametrize("name", ["none.safetensors", "folder"])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / name)


def header(entries: dict, data: bytes = bytes(64)) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 40) + b"{}",
        struct.pack("<Q", 8) + b"not json" + bytes(8),
        struct.pack("<Q", 3) + b"[1]" + bytes(8),
        header(entry(), b"cut"),
        header(entry(shape=(5,))),
        header(entry(shape=(-4,), offsets=(16, 0))),
        header(entry(shape=(2.0, 2))),
        header(entry(offsets=(0, 16, 32))),
        header(entry(shape=(1 << 62, 4))),
        header({"a": {"dtype": "F32"}}),
        header({"a": 3}),
        header(entry(dtype="F3")),
        header(entry(dtype=["F32"])),
        header(entry() | {"__metadata__": "text"}),
        header(entry() | {"__metadata__": ["text"]}),
        header({}),
        header({"__metadata__": {"format": "pt"}}),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, raw):
    (tmp_path / "broken.safetensors").write_bytes(raw)
    with pytest.raises(SourceError, match=r"broken\.safetensors"):
        open_source(tmp_path / "broken.safetensors")


def test_a_torch_without_a_dtype_reads_the_others(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    spec = importlib.util.spec_from_file_location(f"{safetensors_file.__name__}_again", safetensors_file.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.DTYPES.keys() == safetensors_file.DTYPES.keys() - {"F8_E8M0"}


def test_fp8_without_a_scale_is_exact_in_bfloat16(save):
    weight = matrix(8, 16).to(torch.float8_e4m3fn)
    (read,) = values(save({NAME: weight})).values()
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.float(), weight.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1)], ids=str)
def test_scaled_fp8_is_decoded_with_its_scale(save, dtype, suffix, shape):
    weight, scale = matrix(8, 16).mul(50).to(dtype), torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    tensors = {
        NAME: weight,
        f"{LAYER}.{suffix}": scale,
        f"{LAYER}.scale_input": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=dtype),
        "norm.scale": matrix(16),
    }
    expected = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    assert_same(values(save(tensors)), {"norm.scale": tensors["norm.scale"], NAME: expected})


def test_stacks_of_experts_have_a_scale_each(save):
    weight, scale = matrix(3, 8, 16).mul(50).to(torch.float8_e4m3fn), torch.tensor([1.0, 0.5, 3.0])
    read = values(save({NAME: weight, f"{LAYER}.weight_scale": scale}))
    assert torch.equal(read[NAME], weight.float() * scale[:, None, None])


# Format -> layout of comfy-kitchen, and what each tensor of its state dict is called beside the weight.
LAYOUTS = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}),
    "int8_tensorwise, rotated": ("TensorWiseINT8Layout", {"convrot": True, "convrot_groupsize": 64}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}),
}


@pytest.mark.parametrize("in_metadata", [False, True])
@pytest.mark.parametrize("format", LAYOUTS)
def test_comfyui_formats_decode_as_comfy_kitchen_decodes_them(save, format, in_metadata):
    layouts = pytest.importorskip("comfy_kitchen.tensor", reason="comfy-kitchen, which comes with ComfyUI, is not here")
    layout_name, options = LAYOUTS[format]
    layout = layouts.get_layout_class(layout_name)
    given = {"is_weight": True, "per_channel": "convrot" in options} if "int8" in format else {}
    # Rows of two tiles of scales and a quarter.
    qdata, params = layout.quantize(matrix(288, 256), **given, **options)
    expected = layout.dequantize(qdata, layout.Params(**{**vars(params), "orig_dtype": torch.float32}))
    tensors = {f"{NAME}{end}": tensor for end, tensor in layout.state_dict_tensors(qdata, params).items()}
    configuration = {"format": format.partition(",")[0], **options}
    metadata = None
    if in_metadata:
        metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: configuration}})}
    else:
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(configuration).encode()), dtype=torch.uint8)
    assert_same(values(save(tensors, metadata=metadata)), {NAME: expected})


def test_a_scale_of_the_input_becomes_one_of_the_columns(save):
    weight, before = matrix(8, 16).mul(50).to(torch.float8_e4m3fn), matrix(16, seed=1) + 1
    tensors = {NAME: weight, f"{LAYER}.weight_scale": torch.tensor(0.5), f"{LAYER}.pre_quant_scale": before}
    assert_same(values(save(tensors)), {NAME: weight.float() * 0.5 * before})


def test_an_unknown_format_is_named(save):
    configuration = torch.tensor(list(b'{"format": "int1"}'), dtype=torch.uint8)
    with pytest.raises(SourceError, match=rf"{NAME}.*'int1'.*nvfp4"):
        open_source(save({NAME: matrix(4, 4), f"{LAYER}.comfy_quant": configuration}))


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_that_is_said_to_be_scaled_needs_its_scale(save, format):
    configuration = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    path = save({NAME: matrix(4, 4).to(torch.float8_e4m3fn), f"{LAYER}.comfy_quant": configuration})
    with pytest.raises(SourceError, match=rf"{NAME}.*'{format}' but no '\.weight_scale'"):
        open_source(path)


@pytest.mark.parametrize("shape", [(2, 4), (4,), (8, 2), (1, 8)], ids=str)
def test_scales_of_smaller_blocks_are_refused(save, shape):
    path = save({NAME: matrix(8, 16).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(shape)})
    with pytest.raises(SourceError, match=rf"{NAME}.* scales of shape"):
        open_source(path)


@pytest.mark.parametrize(
    "neighbour",
    [
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "SCB",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_packed",
        "qweight",
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_formats_of_others_are_refused(save, dtype, neighbour):
    path = save({NAME: matrix(8, 16).to(dtype), f"{LAYER}.{neighbour}": torch.ones(4)})
    with pytest.raises(SourceError, match=rf"{LAYER}\.{neighbour}' belongs to.*original model"):
        open_source(path)


@pytest.mark.parametrize("neighbour", ["weight_scale", "scale_weight", "scale", "scales"])
def test_integers_with_a_scale_and_no_format_are_refused(save, neighbour):
    path = save({NAME: torch.ones(8, 16, dtype=torch.int8), f"{LAYER}.{neighbour}": torch.ones(8)})
    with pytest.raises(SourceError, match=rf"{NAME}' \(torch\.int8\) has '{LAYER}\.{neighbour}' beside it"):
        open_source(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": ["nvfp4"]}', '{"format": "mxfp8", "params": 3}']
)
def test_a_damaged_configuration_is_refused(save, text):
    tensors = {NAME: matrix(8, 16).to(torch.float8_e4m3fn)}
    configuration = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(SourceError, match=rf"model\.safetensors: .*{LAYER}"):
        open_source(save(tensors | {f"{LAYER}.comfy_quant": configuration}))
    with pytest.raises(SourceError, match=r"model\.safetensors: .*(_quantization_metadata|layer 'a')"):
        open_source(save(tensors, metadata={"_quantization_metadata": f'{{"layers": {{"a": {text}}}}}'}))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"layers": 3}', '{"layers": ["a"]}'])
def test_damaged_metadata_of_layers_are_refused(save, text):
    with pytest.raises(SourceError, match=r"model\.safetensors: '_quantization_metadata'"):
        open_source(save({NAME: matrix(8, 16)}, metadata={"_quantization_metadata": text}))


def configured(tensors: dict[str, torch.Tensor], **configuration: object) -> dict[str, torch.Tensor]:
    """Tensors with what ComfyUI writes of their layer's format."""
    raw = torch.tensor(list(json.dumps(configuration).encode()), dtype=torch.uint8)
    return tensors | {f"{LAYER}.comfy_quant": raw}


FP8_WEIGHT = matrix(8, 64).to(torch.float8_e4m3fn)
BYTES = torch.zeros(8, 32, dtype=torch.uint8)
INT8_WEIGHT = torch.ones(8, 64, dtype=torch.int8)
# What a weight of 8 rows of 64 values has beside it in each format.
SCALES = {
    "float8_e4m3fn": (FP8_WEIGHT, {"weight_scale": torch.ones(())}),
    "mxfp8": (FP8_WEIGHT, {"weight_scale": torch.zeros(128, 4, dtype=torch.uint8)}),
    "nvfp4": (
        BYTES,
        {"weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(())},
    ),
    "int8_tensorwise": (INT8_WEIGHT, {"weight_scale": torch.ones(8, 1)}),
    "convrot_w4a4": (INT8_WEIGHT[:, :32], {"weight_scale": torch.ones(8)}),
}


def of_format(format: str, **more: object) -> dict[str, torch.Tensor]:
    weight, scales = SCALES[format]
    named = {f"{LAYER}.{name}": scale for name, scale in scales.items()}
    return configured({NAME: weight.clone()} | named, format=format, convrot_groupsize=64, **more)


@pytest.mark.parametrize("format", SCALES)
def test_scales_as_a_format_has_them_are_taken(save, format):
    assert open_source(save(of_format(format))).tensors[NAME].shape == (8, 64)


@pytest.mark.parametrize(
    ("format", "scale"), [(format, scale) for format, (_, scales) in SCALES.items() for scale in scales]
)
def test_a_missing_scale_is_named(save, format, scale):
    tensors = of_format(format)
    del tensors[f"{LAYER}.{scale}"]
    with pytest.raises(SourceError, match=rf"{NAME}' has the format '{format}' but no '\.{scale}'"):
        open_source(save(tensors))


@pytest.mark.parametrize(
    ("format", "scale", "bad"),
    [
        ("mxfp8", "weight_scale", torch.zeros(8, 2, dtype=torch.uint8)),
        ("mxfp8", "weight_scale", torch.zeros(128, 8, dtype=torch.uint8)),
        ("mxfp8", "weight_scale", torch.zeros(128, 4)),
        ("nvfp4", "weight_scale", torch.zeros(4, 128, dtype=torch.uint8)),
        ("nvfp4", "weight_scale", torch.zeros(128, 4, dtype=torch.bfloat16)),
        ("nvfp4", "weight_scale_2", torch.ones(8)),
        ("nvfp4", "weight_scale_2", torch.ones((), dtype=torch.int32)),
        ("int8_tensorwise", "weight_scale", torch.ones(64)),
        ("int8_tensorwise", "weight_scale", torch.ones(8, 2)),
        ("int8_tensorwise", "weight_scale", torch.ones(8, 64)),
        ("int8_tensorwise", "weight_scale", torch.ones(8, 1, dtype=torch.int8)),
        ("convrot_w4a4", "weight_scale", torch.ones(())),
        ("convrot_w4a4", "weight_scale", torch.ones(64)),
        ("float8_e4m3fn", "weight_scale", torch.ones((), dtype=torch.uint8)),
        ("float8_e4m3fn", "pre_quant_scale", torch.ones(8)),
    ],
)
def test_scales_of_another_shape_or_dtype_are_refused(save, format, scale, bad):
    path = save(of_format(format) | {f"{LAYER}.{scale}": bad})
    got = rf"scales of shape \[{', '.join(map(str, bad.shape))}\] as {bad.dtype}"
    with pytest.raises(SourceError, match=rf"{NAME}' has the format '{format}'.*'\.{scale}' must be .*{got}.*original"):
        open_source(path)


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4"])
def test_a_weight_of_another_dtype_than_its_format_is_refused(save, format):
    with pytest.raises(SourceError, match=rf"'{format}', which is stored as .*; got torch\.bfloat16"):
        open_source(save(of_format(format) | {NAME: matrix(8, 64).bfloat16()}))


@pytest.mark.parametrize(("format", "shape"), [("mxfp8", (8, 40)), ("mxfp8", (2, 8, 64)), ("nvfp4", (8, 12))])
def test_weights_that_are_no_blocks_are_refused(save, format, shape):
    weight = torch.zeros(shape, dtype=torch.uint8).view(SCALES[format][0].dtype)
    with pytest.raises(SourceError, match=rf"'{format}', of which matrices are read with rows of whole \d\d values"):
        open_source(save(of_format(format) | {NAME: weight}))


@pytest.mark.parametrize("group", [0, 8, 3, "64", 64.0, None, 256])
@pytest.mark.parametrize("format", ["int8_tensorwise", "convrot_w4a4"])
def test_a_rotation_that_cannot_be_is_refused(save, format, group):
    tensors = configured(of_format(format), format=format, convrot=True, convrot_groupsize=group)
    with pytest.raises(SourceError, match=rf"{format}.*(power of 4 from 4 on; got|rows of whole 256 values)"):
        open_source(save(tensors))


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_2", "scale_weight", "pre_quant_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_scale_of_a_weight_in_no_format_is_never_left_out(save, dtype, scale):
    path = save({NAME: matrix(8, 16).to(dtype), f"{LAYER}.{scale}": torch.ones(())})
    with pytest.raises(
        SourceError, match=rf"safetensors: '{LAYER}\.{scale}' is a scale.*{dtype}.*comfy_quant.*original"
    ):
        open_source(path)


@pytest.mark.parametrize(
    "scales",
    [
        {"weight_scale_2": torch.ones(())},
        {"pre_quant_scale": torch.ones(16)},
        {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
        {"weight_scale": torch.ones(()), "weight_scale_2": torch.ones(())},
    ],
    ids=str,
)
def test_a_scale_that_fp8_does_not_have_is_never_left_out(save, scales):
    tensors = {NAME: matrix(8, 16).to(torch.float8_e4m3fn)} | {
        f"{LAYER}.{name}": scale for name, scale in scales.items()
    }
    with pytest.raises(SourceError, match=r"is a scale, but the weight beside it is torch\.float8_e4m3fn"):
        open_source(save(tensors))


def test_a_scale_without_a_weight_is_refused(save):
    with pytest.raises(SourceError, match=rf"'{LAYER}\.weight_scale' is a scale, but the weight it belongs to is not"):
        open_source(save({"a.weight": matrix(8, 16), f"{LAYER}.weight_scale": torch.ones(())}))


@pytest.mark.parametrize("scale", ["input_scale", "scale_input"])
def test_scales_of_inputs_leave_a_weight_as_it_is(save, scale):
    weight = matrix(8, 16).bfloat16()
    assert_same(values(save({NAME: weight, f"{LAYER}.{scale}": torch.tensor(0.5)})), {NAME: weight})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_old_scaled_weights_are_what_the_host_makes_of_them(save, host, dtype):
    from comfy.ops import mixed_precision_ops
    from comfy.utils import convert_old_quants

    tensors = {
        NAME: matrix(8, 16).mul(50).to(dtype),
        f"{LAYER}.scale_weight": torch.tensor(0.3),
        f"{LAYER}.scale_input": torch.tensor(0.5),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    read = values(save(tensors))
    state_dict, _ = convert_old_quants(dict(tensors))
    layer = mixed_precision_ops(compute_dtype=torch.float32).Linear(16, 8, bias=False)
    layer.load_state_dict({name.removeprefix(f"{LAYER}."): tensor for name, tensor in state_dict.items()})
    assert_same(read, {NAME: layer.weight.dequantize().detach()})


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "params_ema"])
def test_torch_checkpoints(tmp_path, wrapper):
    tensors = {"a": matrix(4, 8), "b": matrix(3).half(), "strided": matrix(4, 6).t()}
    content = tensors if wrapper is None else {wrapper: tensors, "step": 3}
    torch.save(content, tmp_path / "model.pt")
    assert_same(values(tmp_path / "model.pt"), tensors)


def test_a_large_checkpoint_is_mapped_afresh(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_native.quantizer.torch_file.MAPPED_BYTES", 100)
    tensors = {str(number): matrix(64, seed=number) for number in range(8)}
    torch.save(tensors, tmp_path / "model.ckpt")
    assert_same(values(tmp_path / "model.ckpt"), tensors)


class Payload:
    def __reduce__(self):
        return (exit, ())


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {"a": matrix(2)}, "callbacks": Payload()}, tmp_path / "model.ckpt")
    with pytest.raises(SourceError, match="would run code"):
        open_source(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(SourceError, match=r"model\.pth"):
        open_source(tmp_path / "model.pth")


@pytest.mark.parametrize("tensors", [{0: matrix(4)}, {"a": matrix(4), 1: matrix(4)}, {"a": matrix(4, 4).to_sparse()}])
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"model\.pt: tensor .* must be dense and have a string as its name"):
        open_source(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_whose_pickle_is_cut_off_is_refused(tmp_path):
    torch.save({"state_dict": {"a": matrix(2)}}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    for length in range(len(parts[pickled])):
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as cut:
            for name, content in parts.items():
                cut.writestr(name, content[:length] if name == pickled else content)
        with pytest.raises(SourceError, match=r"model\.pt: is damaged"):
            open_source(tmp_path / "model.pt")


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    torch.save({"step": 3}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match="no tensors"):
        open_source(tmp_path / "model.pt")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"\.safetensors.*\.gguf"):
        open_source(tmp_path / "model.onnx")
