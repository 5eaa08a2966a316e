"""Files that the converter writes: read by our reader and by gguf, values near the source, nothing half-written."""

import importlib
import json
import logging

import gguf
import numpy as np
import pytest
import torch
from gguf_native.loader import open_gguf
from gguf_native.ops import dequantize
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer import convert
from gguf_native.quantizer.errors import NotFiniteError, RecipeError, SourceError, TargetError
from gguf_native.quantizer.fit_size import Bits
from gguf_native.quantizer.gguf_source import value_types
from gguf_native.quantizer.importance import StoredSums, write_importance
from gguf_native.quantizer.recipes import FILE_TYPES
from gguf_native.quantizer.writer import shard_names, write_gguf
from safetensors.torch import load_file

# The module: the package has the function under its name.
CONVERT = importlib.import_module("gguf_native.quantizer.convert")
SHAPE_KEY = "comfy.gguf.orig_shape."
# Root mean square error over that of the values, on Gaussian ones, with a little room.
BOUNDS = {
    "F32": 0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.01,
    "Q6_K": 0.02,
    "Q5_K": 0.04,
    "Q5_1": 0.045,
    "Q5_0": 0.05,
    "Q4_K": 0.08,
    "Q4_1": 0.09,
    "Q4_0": 0.1,
    "IQ4_NL": 0.085,
    "IQ4_XS": 0.085,
    "MXFP4": 0.13,
    "Q3_K": 0.17,
    "IQ3_S": 0.18,
    "IQ3_XXS": 0.25,
    "Q2_K": 0.32,
    "IQ2_S": 0.4,
    # On ternary values.
    "TQ1_0": 1e-3,
    "TQ2_0": 1e-3,
}
MODELS = ["tiny_sd3", "tiny_wan", "tiny_sd15", "tiny_clip_l", "tiny_t5", "tiny_umt5", "tiny_flux_vae", "tiny_wan_vae"]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def flux(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The least that is known as Flux."""
    return {"double_blocks.0.img_attn.proj.weight": matrix(256, 512)} | more


def read_all(path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> (type, values in their own shape), by our reader."""
    with open_gguf(path) as file:
        return {
            name: (
                info.type,
                dequantize(file.read(name), info.type, tuple(file.metadata.get(SHAPE_KEY + name, info.shape))),
            )
            for name, info in file.tensors.items()
        }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def assert_near_the_source(path, tensors) -> None:
    for name, (type_name, values) in read_all(path).items():
        expected = tensors[name].reshape(values.shape)
        assert relative_error(values, expected.float()) <= BOUNDS[type_name], name


def ternary(values: torch.Tensor) -> torch.Tensor:
    """The signs of the larger half of the values, scaled."""
    return values.sign() * (values.abs() > values.abs().float().median()) * 0.02


@pytest.mark.parametrize("name", FILE_TYPES)
def test_every_file_type(samples, save, tmp_path, name):
    source, out = samples.sample("tiny_flux_256"), tmp_path / f"flux-{name}.gguf"
    if name.startswith("TQ"):
        source = save({key: ternary(tensor) for key, tensor in load_file(source).items()})
    assert convert(source, out, name) == [out]
    tensors = load_file(source)
    assert read_all(out).keys() == tensors.keys()
    assert_near_the_source(out, tensors)
    assert FILE_TYPES[name].types[0] in {info.type for info in open_gguf(out).tensors.values()}


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model(samples, tmp_path, model, type_name):
    source, out = samples.sample(model), tmp_path / "model.gguf"
    convert(source, out, type_name)
    tensors = load_file(source)
    assert read_all(out).keys() == tensors.keys() - {"spiece_model"}
    assert_near_the_source(out, tensors)
    read_by_gguf = gguf.GGUFReader(out)
    assert {tensor.name for tensor in read_by_gguf.tensors} == read_all(out).keys()
    assert out.stat().st_size < source.stat().st_size


def test_gguf_decodes_the_same_values(samples, tmp_path):
    out = tmp_path / "model.gguf"
    convert(samples.sample("tiny_sd15"), out, "Q4_K_M")
    ours = read_all(out)
    for tensor in gguf.GGUFReader(out).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        type_name, expected = ours[tensor.name]
        assert tensor.tensor_type.name == type_name
        assert torch.equal(values.reshape(expected.shape), expected)


def test_metadata(save, tmp_path):
    convert(save(flux(), metadata={"config": '{"a": 1}'}), tmp_path / "out.gguf", "Q5_K_M")
    with open_gguf(tmp_path / "out.gguf") as file:
        assert dict(file.metadata) == {
            "general.architecture": "flux",
            "general.name": "model",
            "general.file_type": 17,
            "general.quantization_version": 2,
            "gguf_native.recipe": file.metadata["gguf_native.recipe"],
            "config": '{"a": 1}',
        }
        assert json.loads(file.metadata["gguf_native.recipe"]) == {
            "version": 1,
            "type": "Q5_K_M",
            "tensors": {"Q5_K": 1},
        }


def test_five_dimensions_stay_and_flattened_shapes_are_kept_in_metadata(samples, tmp_path):
    out = tmp_path / "wan.gguf"
    convert(samples.sample("tiny_wan"), out, "Q8_0")
    with open_gguf(out) as file:
        assert len(file.tensors["patch_embedding.weight"].shape) == 5
    convert(samples.sample("tiny_wan_vae"), out, "Q4_K_M", force=True)
    with open_gguf(out) as file:
        shapes = {key: value for key, value in file.metadata.items() if key.startswith(SHAPE_KEY)}
        assert any(len(shape) == 5 for shape in shapes.values())
        for key in shapes:
            assert file.tensors[key.removeprefix(SHAPE_KEY)].shape[-1] == 256


SCALED = {
    "double_blocks.0.img_attn.proj.weight": matrix(256, 512).mul(50).to(torch.float8_e4m3fn),
    "double_blocks.0.img_attn.proj.weight_scale": matrix(256, 1, seed=1),
    # Rows of 63 values, stored in rows of 256.
    "double_blocks.0.conv.weight": matrix(256, 7, 3, 3).mul(50).to(torch.float8_e4m3fn),
    "double_blocks.0.conv.weight_scale": matrix(256, seed=2),
}


@pytest.mark.parametrize("source", ["plain", "scaled", "Q4_K_S", "transposed"])
def test_runs_of_rows_join_without_a_seam(save, tmp_path, monkeypatch, source):
    path = save(SCALED if source == "scaled" else flux())
    if source == "Q4_K_S":
        path = convert(path, tmp_path / "source.gguf", source)[0]
    if source == "transposed":
        path = tmp_path / "source.pt"
        torch.save({name: tensor.t() for name, tensor in flux().items()}, path)
    convert(path, tmp_path / "whole.gguf", "Q4_K_M")
    monkeypatch.setattr(CONVERT, "VALUES_PER_RUN", {"cpu": 3 * 512})
    convert(path, tmp_path / "runs.gguf", "Q4_K_M")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "runs.gguf").read_bytes()


@pytest.mark.parametrize(
    ("scale", "index"), [((torch.arange(256) == 77).float()[:, None], [77, 0]), (torch.ones(256, 1), [130, 5])]
)
def test_a_scaled_value_that_is_not_finite_is_named(save, tmp_path, monkeypatch, scale, index):
    """An infinite scale, or NaN among fp8: found in a run far from the first."""
    monkeypatch.setattr(CONVERT, "VALUES_PER_RUN", {"cpu": 1024})
    weight = torch.ones(256, 512)
    if index[1]:
        weight[tuple(index)] = float("nan")
    scale = torch.where(scale > 0, 1, 0.5) if index[1] else torch.where(scale > 0, float("inf"), 1)
    name = "double_blocks.0.img_attn.proj"
    path = save({f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale": scale})
    with pytest.raises(NotFiniteError, match=rf"{name}.weight' has (inf|nan) at index \[{index[0]}, {index[1]}\]"):
        convert(path, tmp_path / "out.gguf", "Q4_K_M")


def test_shards(samples, tmp_path):
    source = samples.sample("tiny_flux_256")
    convert(source, tmp_path / "whole.gguf", "Q4_K_M")
    paths = convert(source, tmp_path / "out.gguf", "Q4_K_M", split_max_bytes=2_000_000)
    assert paths == shard_names(tmp_path / "out.gguf", len(paths)) and len(paths) > 1
    assert all(path.stat().st_size < 2_100_000 for path in paths)
    whole, sharded = read_all(tmp_path / "whole.gguf"), read_all(paths[0])
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name][1], sharded[name][1]) for name in whole)
    fields = gguf.GGUFReader(paths[1]).fields
    assert [fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")] == [
        1,
        len(paths),
        len(whole),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["whole.gguf", *(path.name for path in paths)])


def test_a_tensor_larger_than_a_shard_is_an_error(save, tmp_path):
    with pytest.raises(TargetError, match=r"proj\.weight.*73,728.*50,000"):
        convert(save(flux()), tmp_path / "out.gguf", "Q4_K_M", split_max_bytes=50_000)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(save, tmp_path, bad, dtype, monkeypatch):
    monkeypatch.setattr(CONVERT, "VALUES_PER_RUN", {"cpu": 512})
    broken = matrix(4, 8, 512).to(dtype)
    broken[2, 3, 77] = bad
    path = save(flux(**{"double_blocks.0.img_mlp.0.weight": broken}))
    with pytest.raises(NotFiniteError, match=rf"model.safetensors.*img_mlp.0.weight.*{bad} at index \[2, 3, 77\]"):
        convert(path, tmp_path / "out.gguf", "Q4_K_M")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_value_too_large_for_f16_is_named(save, tmp_path):
    large = matrix(16, 512)
    large[7, 1] = -7e4
    path = save(flux(**{"double_blocks.0.img_mlp.0.weight": large}))
    with pytest.raises(NotFiniteError, match=r"-70000.* at index \[7, 1\].*BF16"):
        convert(path, tmp_path / "out.gguf", "F16")
    convert(path, tmp_path / "out.gguf", "BF16")


def test_the_input_is_never_written_over(samples, tmp_path):
    path = tmp_path / "model.gguf"
    convert(samples.sample("tiny_flux_256"), path, "Q8_0")
    (tmp_path / "link.gguf").symlink_to(path)
    for target in (path, tmp_path / "link.gguf"):
        with pytest.raises(TargetError, match="is an input itself"):
            convert(path, target, "Q4_K_M", force=True)


def test_a_shard_of_the_input_is_never_written_over(samples, tmp_path):
    paths = convert(samples.sample("tiny_flux_256"), tmp_path / "a.gguf", "Q8_0", split_max_bytes=2_000_000)
    with pytest.raises(TargetError, match=r"a-00001-of-\d+\.gguf: is an input itself"):
        convert(paths[0], tmp_path / "a.gguf", "Q8_0", split_max_bytes=2_000_000, force=True)


def test_what_is_there_is_replaced_only_by_force(save, tmp_path):
    path, out = save(flux()), tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(TargetError, match=r"out\.gguf: exists already.*--force"):
        convert(path, out, "Q4_K_M")
    assert out.read_bytes() == b"precious"
    convert(path, out, "Q4_K_M", force=True)
    assert read_all(out).keys() == flux().keys()


@pytest.mark.parametrize(("target", "message"), [("no/out.gguf", "no such folder"), ("out.bin", r"must end in \.gguf")])
def test_targets_that_cannot_be(save, tmp_path, target, message):
    with pytest.raises(TargetError, match=message):
        convert(save(flux()), tmp_path / target, "Q4_K_M")


def test_a_full_disk_is_said_before_anything_is_written(save, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(TargetError, match=r"takes 0\.0 GB.*free"):
        convert(save(flux()), tmp_path / "out.gguf", "Q4_K_M")


def test_an_interruption_leaves_nothing(save, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(save(flux()), tmp_path / "out.gguf", "Q4_K_M", progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_progress_counts_the_bytes_of_the_source(samples, tmp_path):
    seen = []
    source = samples.sample("tiny_flux_256")
    convert(source, tmp_path / "out.gguf", "Q4_K_M", progress=lambda *counts: seen.append(counts))
    total = sum(tensor.nbytes for tensor in load_file(source).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_unknown_model_needs_a_name(save, tmp_path):
    path = save({"brand.new.0.weight": matrix(64, 512), "embed.weight": matrix(64, 512)})
    with pytest.raises(RecipeError, match=r"brand\.new\.0\.weight.*--architecture"):
        convert(path, tmp_path / "out.gguf", "Q4_K_M")
    convert(path, tmp_path / "out.gguf", "Q4_K_M", architecture="new")
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.metadata["general.architecture"] == "new"
        assert {info.type for info in file.tensors.values()} == {"Q4_K", "F32"}


def test_layouts_whose_matrices_are_joined_while_loading_are_refused(save, tmp_path):
    names = (
        "x_embedder.weight",
        "transformer_blocks.0.attn.norm_added_k.weight",
        "transformer_blocks.0.attn.to_q.weight",
    )
    with pytest.raises(RecipeError, match=r"diffusers \(flux\).*original layout"):
        convert(save({name: matrix(4, 512) for name in names}), tmp_path / "out.gguf", "Q4_K_M")


def test_a_gguf_file_is_converted_again_with_a_warning(samples, tmp_path, caplog):
    source = samples.sample("tiny_umt5")
    convert(source, tmp_path / "first.gguf", "Q8_0")
    with caplog.at_level(logging.WARNING, "gguf_native"):
        convert(tmp_path / "first.gguf", tmp_path / "second.gguf", "Q4_K_S")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "first.gguf is quantised already (Q8_0): its loss and that of the new type add up" in said
    with open_gguf(tmp_path / "first.gguf") as first, open_gguf(tmp_path / "second.gguf") as second:
        carried = [key for key in first.metadata if key.startswith("tokenizer.")]
        assert len(carried) > 5
        for key in carried:
            assert second.metadata[key] == first.metadata[key], key
        assert second.metadata["general.file_type"] == 14
    tensors = load_file(source)
    for name, (type_name, values) in read_all(tmp_path / "second.gguf").items():
        assert relative_error(values, tensors[name].reshape(values.shape).float()) <= BOUNDS[type_name] + 0.01


CARRIED = {
    "general.name": ("STRING", "A name of its own"),
    "general.author": ("STRING", "Somebody"),
    "general.license": ("STRING", "apache-2.0"),
    "general.url": ("STRING", "https://example.com"),
    "general.tags": ("[STRING]", ["one", "two"]),
    "a.uint8": ("UINT8", 255),
    "a.int8": ("INT8", -128),
    "a.uint16": ("UINT16", 65535),
    "a.int16": ("INT16", -1),
    "a.uint32": ("UINT32", 7),
    "a.int32": ("INT32", -7),
    "a.uint64": ("UINT64", (1 << 64) - 1),
    "a.int64": ("INT64", 7),
    "a.float32": ("FLOAT32", 0.5),
    "a.float64": ("FLOAT64", 1e300),
    "a.third": ("FLOAT64", 1 / 3),
    "a.bool": ("BOOL", True),
    "a.none": ("[STRING]", []),
    "a.counts": ("[UINT64]", [1, (1 << 64) - 1]),
    "a.thirds": ("[FLOAT64]", [1 / 3, 1.0]),
}
NOT_CARRIED = {
    "general.architecture": ("STRING", "another"),
    "general.file_type": ("UINT32", 7),
    "general.quantization_version": ("UINT32", 1),
    "general.quantized_by": ("STRING", "Somebody else"),
}


def test_metadata_of_a_gguf_source_are_kept_in_their_types(tmp_path):
    tensors = [StoredSums(name, tensor) for name, tensor in flux().items()]
    write_gguf([tmp_path / "source.gguf"], CARRIED | NOT_CARRIED, [tensors], lambda tensor: [tensor.values])
    convert(tmp_path / "source.gguf", tmp_path / "out.gguf", "Q4_K_M")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    for key, (kind, value) in CARRIED.items():
        assert fields[key].contents() == value, key
        assert value == [] or fields[key].types[-1].name == kind.strip("[]"), key
    assert value_types(tmp_path / "out.gguf").items() >= {key: kind for key, (kind, _) in CARRIED.items()}.items()
    assert fields["general.architecture"].contents() == "flux"
    assert fields["general.file_type"].contents() == 15
    assert fields["general.quantization_version"].contents() == 2
    assert "general.quantized_by" not in fields


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64], ids=str)
def test_a_weight_that_cannot_be_stored_ends_the_conversion(tmp_path, dtype):
    torch.save(flux(**{"double_blocks.0.img_mlp.0.weight": torch.ones(4, 256, dtype=dtype)}), tmp_path / "model.pt")
    with pytest.raises(SourceError, match=rf"img_mlp\.0\.weight' has dtype {dtype}"):
        convert(tmp_path / "model.pt", tmp_path / "out.gguf", "Q4_K_M")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_quantised_torch_tensors_is_refused(tmp_path):
    packed = torch.quantize_per_tensor(matrix(4, 256), 0.01, 0, torch.qint8)
    torch.save(flux(**{"double_blocks.0.img_mlp.0.weight": packed}), tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"img_mlp\.0\.weight' has dtype torch\.qint8"):
        convert(tmp_path / "model.pt", tmp_path / "out.gguf", "Q4_K_M")


def test_parameters_that_want_gradients_are_converted(tmp_path):
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in flux().items()}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out.gguf", "F32")
    assert_near_the_source(tmp_path / "out.gguf", flux())


@pytest.mark.parametrize(
    ("shape", "size"),
    # Rows of 320 are stored in rows of 256, which begin at another column each time.
    [((256, 512), "Q3_K_S"), ((640, 320), "Q3_K_S"), ((640, 320), Bits(5))],
    ids=["whole blocks", "no whole blocks", "no whole blocks, to a size"],
)
def test_importance_lowers_the_weighted_error(save, tmp_path, shape, size):
    name, values = "double_blocks.0.img_attn.proj.weight", matrix(*shape)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) ** 4
    write_importance(tmp_path / "importance.gguf", {name: importance * 10}, {name: 10}, "a test")
    path = save({name: values})
    errors = []
    for given in (None, tmp_path / "importance.gguf"):
        convert(path, tmp_path / "out.gguf", size, importance=given, force=True)
        difference = read_all(tmp_path / "out.gguf")[name][1].view(shape) - values
        errors.append(float((difference.square() * importance).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_formats_have_bounds():
    assert BOUNDS.keys() <= FORMATS.keys()
