"""Text encoders from GGUF: the encoding equals that of ComfyUI's own loader given the same decoded weights."""

import copy
import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.ops
import comfy.sd
from gguf_native.loader import text_encoder
from gguf_native.loader.errors import (
    AmbiguousTextEncoderError,
    IncompleteTextEncoderError,
    MissingTokenizerError,
    UnknownTextEncoderError,
    UnsupportedTextEncoderError,
    WrongShapeError,
)
from gguf_native.loader.key_maps import TEXT_ENCODERS
from gguf_native.loader.text_encoder import comfyui_tensors, load_text_encoder
from gguf_native.loader.tokenizers import sentencepiece_model
from gguf_native.ops.layout import is_packed
from host import quantise
from host.samples import TINY_CLIP_L, TINY_T5

PROMPT = "a (red:1.3) fox under the moon, oil on canvas"
TINY = {"t5xxl_model_config": TINY_T5, "model_config": TINY_CLIP_L}

CLIP_CPP_NAMES = [
    (r"^text_model\.embeddings\.(token|position)_embedding\.", r"t.\1_embd."),
    (r"^text_model\.final_layer_norm\.", "t.post_ln."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.", r"t.blk.\1.attn_\2."),
    (r"^text_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"t.blk.\1.ln\2."),
]
# clip.cpp's own names for the two matrices of an MLP, and the names that mean what they say.
MLP_NAMES = {"clip.cpp": ("ffn_down", "ffn_up"), "llama.cpp": ("ffn_up", "ffn_down")}


@pytest.fixture(autouse=True)
def inference(host):
    with torch.inference_mode():
        yield


def encoding(clip: comfy.sd.CLIP) -> list[torch.Tensor]:
    [[cond, extra]] = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    return [cond, *(value for value in extra.values() if value is not None)]


def reference(paths, type_name: str, **options) -> list[torch.Tensor]:
    """What ComfyUI encodes with its own loader, weights and arithmetic in float32."""
    clip_type = getattr(comfy.sd.CLIPType, type_name.upper())
    # ComfyUI writes into the configurations that it is given.
    options = copy.deepcopy(options) | {"dtype": torch.float32}
    return encoding(comfy.sd.load_clip([str(path) for path in paths], clip_type=clip_type, model_options=options))


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.float().std() > 0
        assert torch.equal(one, other)


def rewritten(samples, folder, name: str, change, type_name: str = "Q8_0"):
    """The sample's tensors changed by `change` and quantised: (GGUF file, the same values as safetensors in F32)."""
    source, target, decoded = (folder / f"{name}{end}" for end in (".safetensors", ".gguf", "-decoded.safetensors"))
    save_file(change(load_file(samples.sample(name))), source)
    quantise.quantise(source, target, type_name, samples.SAMPLES[name].architecture)
    quantise.decode(target, decoded, torch.float32)
    return target, decoded


@pytest.mark.parametrize(
    ("name", "type_name", "naming", "clip_type"),
    [
        ("t5_base", "Q8_0", "llama.cpp", "stable_audio"),
        ("t5_base", "Q4_K", "comfyui", "stable_audio"),
        ("clip_l", "Q4_1", "comfyui", "stable_diffusion"),
        ("clip_l", "Q5_K", "comfyui", "sd3"),
    ],
)
def test_one_encoder(samples, name, type_name, naming, clip_type):
    clip = load_text_encoder([samples.gguf(name, type_name, naming)], clip_type)
    assert_same(encoding(clip), reference([samples.decoded(name, type_name, torch.float32)], clip_type))


@pytest.mark.parametrize("naming", ["llama.cpp", "comfyui"])
@pytest.mark.parametrize("type_name", ["F16", "Q4_0", "Q6_K", "IQ4_XS"])
def test_two_small_encoders(samples, naming, type_name):
    clip = load_text_encoder(
        [samples.gguf("tiny_t5", type_name, naming), samples.gguf("tiny_clip_l", type_name)], "flux"
    )
    files = [samples.decoded(name, type_name, torch.float32) for name in ("tiny_t5", "tiny_clip_l")]
    assert_same(encoding(clip), reference(files, "flux", **TINY))


@pytest.mark.parametrize("packed", ["tiny_t5", "tiny_clip_l"])
def test_gguf_beside_safetensors(samples, packed):
    names = ("tiny_t5", "tiny_clip_l")
    ours = [samples.gguf(name, "Q4_K") if name == packed else samples.sample(name) for name in names]
    theirs = [
        samples.decoded(name, "Q4_K", torch.float32) if name == packed else samples.sample(name) for name in names
    ]
    assert_same(encoding(load_text_encoder(ours, "flux")), reference(theirs, "flux", **TINY))


def test_safetensors_alone(samples):
    files = [samples.sample("tiny_clip_l"), samples.sample("tiny_t5")]
    assert_same(encoding(load_text_encoder(files, "flux")), reference(files, "flux", **TINY))


@pytest.mark.usefixtures("dynamic_vram_on_cpu")
def test_under_dynamic_vram(samples):
    # Not below eight bits: what then has less than 16 KB, ComfyUI decodes to its own dtype before the first use.
    paths = [samples.gguf("tiny_t5", "Q8_0", "llama.cpp"), samples.gguf("tiny_clip_l", "Q8_0")]
    clip = load_text_encoder(paths, "flux")
    assert clip.is_dynamic()
    files = [samples.decoded(name, "Q8_0", torch.float32) for name in ("tiny_t5", "tiny_clip_l")]
    assert_same(encoding(clip), reference(files, "flux", **TINY))


@pytest.mark.parametrize("clip_type", ["sd3", "chroma", "ltxv", "hidream", "cogvideox", "mochi"])
def test_a_small_t5_takes_the_place_of_xxl(samples, clip_type):
    clip = load_text_encoder([samples.gguf("tiny_t5", "Q8_0", "llama.cpp")], clip_type)
    assert clip.cond_stage_model.t5xxl.transformer.shared.weight.shape == (32128, 256)


def test_a_t5_that_comfyui_cannot_tell_from_others_is_refused(samples, tmp_path):
    def deep(tensors):
        first = {key: tensor for key, tensor in tensors.items() if key.startswith("encoder.block.0.")}
        return tensors | {key.replace(".0.", ".23.", 1): tensor.clone() for key, tensor in first.items()}

    file, _ = rewritten(samples, tmp_path, "tiny_t5", deep)
    with pytest.raises(
        UnsupportedTextEncoderError, match=r"tiny_t5\.gguf: .* has 512 rows; .* 10240 or 5120 for type 'sd3'"
    ):
        load_text_encoder([file], "sd3")


def without(key: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def few_layers(tensors):
    kept = ("encoder.block.0.", "encoder.block.1.")
    return {key: value for key, value in tensors.items() if key.startswith(kept) or ".block." not in key}


def test_umt5_with_the_tokenizer_of_its_metadata(samples, tmp_path):
    file, decoded = rewritten(samples, tmp_path, "tiny_umt5", few_layers)
    save_file(load_file(decoded) | {"spiece_model": load_file(samples.sample("tiny_umt5"))["spiece_model"]}, decoded)
    clip = load_text_encoder([file], "wan")
    sizes = {"d_ff": 64, "num_heads": 1, "num_layers": 2, "vocab_size": 512}
    marked = load_file(decoded) | {text_encoder.T5_XXL_MARK: torch.empty(text_encoder.T5_XXL_ROWS, 0)}
    save_file(marked, decoded)
    assert_same(encoding(clip), reference([decoded], "wan", umt5xxl_model_config=sizes))


def test_tokenizer_equals_sentencepiece(samples):
    import sentencepiece
    from gguf_native.loader import open_gguf

    model = load_file(samples.sample("tiny_umt5"))["spiece_model"].numpy().tobytes()
    with open_gguf(samples.gguf("tiny_umt5", "Q8_0", "llama.cpp")) as file:
        rebuilt = sentencepiece_model("tiny_umt5", file.metadata).numpy().tobytes()
    one, other = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (model, rebuilt))
    for text in ["Licensed under the Apache License", "  two  spaces ", "naïve 狐 \u00a0", ""]:
        assert one.encode(text, add_eos=True) == other.encode(text, add_eos=True)
    assert other.decode(other.encode("the license")) == "the license"
    assert [one.eos_id(), one.pad_id(), one.unk_id()] == [other.eos_id(), other.pad_id(), other.unk_id()]


def test_a_tokenizer_normalises_and_falls_back_to_bytes():
    import sentencepiece

    kinds = [2, *[6] * 256, 1, 1, 1]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1.0] * len(tokens),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    model = sentencepiece_model("x", metadata).numpy().tobytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert pieces.encode("a  bé", out_type=str) == ["a", "▁", "▁", "b", "<0xC3>", "<0xA9>"]


def test_umt5_without_a_tokenizer_is_refused(samples, tmp_path):
    file, _ = rewritten(samples, tmp_path, "tiny_umt5", lambda tensors: without("spiece_model")(few_layers(tensors)))
    with pytest.raises(MissingTokenizerError, match=r"tiny_umt5\.gguf: its metadata has no SentencePiece vocabulary"):
        load_text_encoder([file], "wan")


@pytest.mark.parametrize("prefix", ["text_encoders.clip_l.transformer.", "cond_stage_model.transformer."])
def test_a_prefix_and_other_models_are_left_out(samples, tmp_path, prefix):
    def within_checkpoint(tensors):
        named = {prefix + key: tensor for key, tensor in tensors.items()}
        return named | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}

    file, _ = rewritten(samples, tmp_path, "tiny_clip_l", within_checkpoint)
    plain = samples.gguf("tiny_clip_l", "Q8_0")
    assert_same(
        encoding(load_text_encoder([file], "stable_diffusion")),
        encoding(load_text_encoder([plain], "stable_diffusion")),
    )


@pytest.mark.parametrize("converter", MLP_NAMES)
def test_clip_with_short_names(samples, tmp_path, monkeypatch, converter):
    first, second = MLP_NAMES[converter]
    mlp = [
        (rf"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc{number}\.", rf"t.blk.\1.{name}.")
        for number, name in ((1, first), (2, second))
    ]
    monkeypatch.setitem(quantise.NAMINGS, converter, CLIP_CPP_NAMES + mlp)
    file = tmp_path / "clip.gguf"
    quantise.quantise(samples.sample("tiny_clip_l"), file, "Q8_0", "clip", converter)
    plain = samples.gguf("tiny_clip_l", "Q8_0")
    assert_same(
        encoding(load_text_encoder([file], "stable_diffusion")),
        encoding(load_text_encoder([plain], "stable_diffusion")),
    )


def test_without_a_projection_the_rest_is_the_same(samples, tmp_path):
    file, _ = rewritten(samples, tmp_path, "tiny_clip_l", without("text_projection.weight"))
    clip = load_text_encoder([file], "stable_diffusion")
    whole = load_text_encoder([samples.gguf("tiny_clip_l", "Q8_0")], "stable_diffusion")
    cond, pooled = encoding(clip)
    assert torch.equal(cond, encoding(whole)[0])
    whole.cond_stage_model.clip_l.options_default = ("last", None, False)
    assert torch.equal(pooled, encoding(whole)[1])


@pytest.mark.parametrize(
    "key",
    ["shared.weight", "encoder.block.1.layer.1.layer_norm.weight", "encoder.block.1.layer.0.SelfAttention.o.weight"],
)
@pytest.mark.parametrize("mode", ["legacy", "dynamic"])
def test_a_missing_tensor_is_refused(samples, tmp_path, request, key, mode):
    if mode == "dynamic":
        request.getfixturevalue("dynamic_vram_on_cpu")
    file, _ = rewritten(samples, tmp_path, "tiny_t5", without(key))
    with pytest.raises(IncompleteTextEncoderError, match=rf"tiny_t5\.gguf: lacks .*'{key}'"):
        load_text_encoder([file, samples.gguf("tiny_clip_l", "Q8_0")], "flux")


def test_a_matrix_of_another_size_is_refused(samples, tmp_path):
    key = "encoder.block.1.layer.0.SelfAttention.v.weight"
    file, _ = rewritten(samples, tmp_path, "tiny_t5", lambda tensors: tensors | {key: torch.zeros(256, 512)})
    with pytest.raises(WrongShapeError, match=rf"tiny_t5\.gguf as type 'stable_audio': .*{key}' .*\[256, 512\]"):
        load_text_encoder([file], "stable_audio")


def test_two_files_for_one_place_are_refused(samples):
    clip_l = samples.gguf("clip_l", "Q5_K")
    with pytest.raises(
        IncompleteTextEncoderError, match=r"lacks 219 of the 219 tensors that T5XXLModel of type 'flux' has"
    ):
        load_text_encoder([clip_l, clip_l], "flux")


@pytest.mark.parametrize(("type_name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_float32_norms_do_not_widen_the_encoder(samples, type_name, dtype):
    clip = load_text_encoder([samples.gguf("tiny_t5", type_name, "llama.cpp")], "mochi")
    parameters = list(clip.cond_stage_model.t5xxl.transformer.parameters())
    assert {parameter.dtype for parameter in parameters} == {dtype}


def test_matrices_stay_packed(samples):
    file = samples.gguf("tiny_t5", "Q4_K", "llama.cpp")
    clip = load_text_encoder([file], "sd3")
    packed = [parameter for parameter in clip.cond_stage_model.parameters() if is_packed(parameter)]
    stored = [
        tensor for tensor in gguf.GGUFReader(file).tensors if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_K
    ]
    assert sum(parameter._qdata.nbytes for parameter in packed) == sum(int(tensor.n_bytes) for tensor in stored)


def test_the_host_can_load_it_again(samples):
    paths = [samples.gguf("tiny_t5", "Q8_0", "llama.cpp"), samples.sample("tiny_clip_l")]
    clip = load_text_encoder(paths, "flux")
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert type(again) is type(clip.patcher)
    assert again.model_size() == clip.patcher.model_size() > 0


@pytest.mark.usefixtures("dynamic_vram_on_cpu")
def test_a_clone_without_dynamic_vram(samples):
    clip = load_text_encoder([samples.gguf("tiny_t5", "Q8_0", "llama.cpp")], "sd3")
    static = clip.clone(disable_dynamic=True)
    assert clip.is_dynamic()
    assert not static.is_dynamic()
    static.cond_stage_model = static.patcher.model
    assert_same(encoding(static)[:1], encoding(clip)[:1])


def scaled_fp8(tensors):
    """As the fp8 files that ComfyUI knows: matrices in float8 with a scale, and a mark."""
    out = {}
    for key, tensor in tensors.items():
        if "DenseReluDense" not in key:
            out[key] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        out[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        layer = key.removesuffix(".weight")
        out[f"{layer}.weight_scale"] = scale
        settings = json.dumps({"format": "float8_e4m3fn"}).encode()
        out[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(settings), dtype=torch.uint8)
    return out


def test_scaled_fp8_safetensors_beside_gguf(samples, tmp_path):
    fp8 = tmp_path / "t5_fp8.safetensors"
    save_file(scaled_fp8(load_file(samples.sample("tiny_t5"))), fp8)
    files = [samples.decoded("tiny_clip_l", "Q8_0", torch.float32), fp8]
    # What ComfyUI finds in a T5-XXL by itself.
    expected = reference(files, "flux", **TINY, t5xxl_quantization_metadata={"mixed_ops": True})
    assert_same(encoding(load_text_encoder([samples.gguf("tiny_clip_l", "Q8_0"), fp8], "flux")), expected)


UNKNOWN = {
    "language model": (["blk.0.attn_norm.weight", "blk.0.attn_q.weight"], "qwen3", "later version"),
    "language model, ComfyUI": (["model.layers.0.input_layernorm.weight"], None, "later version"),
    "language model that sees": (
        ["model.layers.0.input_layernorm.weight", "visual.blocks.0.norm1.weight"],
        None,
        "later",
    ),
    "vision part": (["v.blk.0.attn_q.weight", "mm.0.weight"], "clip", "mmproj"),
    "diffusion model": (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "flux", "UnetLoaderGGUF"),
    "VAE": (["first_stage_model.decoder.conv_in.weight"], None, "VAELoaderGGUF"),
    "nothing known": (["a.weight", "b.weight"], "x", "no known text encoder"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_other_models_are_named(what):
    names, architecture, expected = UNKNOWN[what]
    metadata = {"general.architecture": architecture} if architecture else {}
    with pytest.raises(UnknownTextEncoderError) as caught:
        comfyui_tensors("file.gguf", {name: torch.zeros(2, 2) for name in names}, metadata)
    message = str(caught.value)
    assert message.startswith("file.gguf: ")
    assert expected in message
    assert f"'{names[0]}'" in message
    assert repr(architecture) in message
    assert all(row.family in message for row in TEXT_ENCODERS)


def test_a_real_diffusion_model_is_named(samples):
    with pytest.raises(UnknownTextEncoderError, match="It is a diffusion model: load it with UnetLoaderGGUF"):
        load_text_encoder([samples.gguf("tiny_flux_256", "Q8_0")], "flux")


def test_two_encoders_in_one_file_are_refused():
    layer = "text_model.encoder.layers.0.mlp.fc1.weight"
    tensors = {f"text_encoders.clip_{part}.transformer.{layer}": torch.zeros(2, 1) for part in "lg"}
    with pytest.raises(AmbiguousTextEncoderError, match=r"x\.gguf: .*'text_encoders\.clip_l\.transformer\.'"):
        comfyui_tensors("x.gguf", tensors, {})


def test_the_decoder_of_a_whole_t5_is_left_out():
    names = ["enc.blk.0.ffn_up.weight", "dec.blk.0.ffn_up.weight", "output.weight", "token_embd.weight"]
    kept = comfyui_tensors("x.gguf", {name: torch.zeros(4, 2) for name in names}, {})
    assert list(kept) == ["encoder.block.0.layer.1.DenseReluDense.wi.weight", "shared.weight"]


def test_an_alias_of_the_vocabulary_is_taken():
    names = ["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.embed_tokens.weight"]
    assert "shared.weight" in comfyui_tensors("x.gguf", {name: torch.zeros(2, 2) for name in names}, {})
