"""Inputs of the converter that are quantised already: fp8 with scales, ComfyUI's formats; and damaged ones."""

import json

import pytest
import torch
from gguf_native.quantizer.errors import SourceError
from gguf_native.quantizer.sources import open_source
from source_values import LAYER, NAME, assert_same, matrix, values


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
