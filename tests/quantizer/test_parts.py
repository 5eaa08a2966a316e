"""Full checkpoints: which parts there are and what each is called in its own file."""

import pytest
import torch
from gguf_native.quantizer.errors import PartError
from gguf_native.quantizer.parts import known_architecture, prefixes_of, take_part
from gguf_native.quantizer.sources import open_source
from safetensors.torch import load_file, save_file

HIDDEN = 64


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNET = {"time_embed.0.weight": matrix(8, 8), "input_blocks.1.0.in_layers.0.weight": matrix(8)}
CLIP = {"text_model.encoder.layers.0.mlp.fc1.weight": matrix(8, 4), "text_model.final_layer_norm.weight": matrix(4)}
T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": matrix(8, 8), "shared.weight": matrix(5, 8)}
VAE = {"decoder.conv_in.weight": matrix(8, 4, 3, 3), "encoder.conv_in.weight": matrix(8, 3, 3, 3)}
OPENCLIP = {
    "positional_embedding": matrix(7, HIDDEN),
    "token_embedding.weight": matrix(11, HIDDEN),
    "text_projection": matrix(HIDDEN, 32),
    "logit_scale": torch.ones(()),
    "ln_final.weight": matrix(HIDDEN),
    "ln_final.bias": matrix(HIDDEN),
    **{
        f"transformer.resblocks.{layer}.{name}.{end}": matrix(*(shape if end == "weight" else shape[:1]), seed=layer)
        for layer in range(2)
        for name, shape in {
            "ln_1": (HIDDEN,),
            "ln_2": (HIDDEN,),
            "mlp.c_fc": (4 * HIDDEN, HIDDEN),
            "mlp.c_proj": (HIDDEN, 4 * HIDDEN),
            "attn.out_proj": (HIDDEN, HIDDEN),
        }.items()
        for end in ("weight", "bias")
    },
    **{
        f"transformer.resblocks.{layer}.attn.in_proj_weight": matrix(3 * HIDDEN, HIDDEN, seed=layer)
        for layer in range(2)
    },
    **{f"transformer.resblocks.{layer}.attn.in_proj_bias": matrix(3 * HIDDEN, seed=layer) for layer in range(2)},
}
SD15 = {
    **{f"model.diffusion_model.{name}": tensor for name, tensor in UNET.items()},
    **{f"cond_stage_model.transformer.{name}": tensor for name, tensor in CLIP.items()},
    **{f"first_stage_model.{name}": tensor for name, tensor in VAE.items()},
    "model_ema.decay": torch.ones(()),
    "betas": matrix(10),
}
SDXL = {
    **{f"model.diffusion_model.{name}": tensor for name, tensor in UNET.items()},
    **{f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in CLIP.items()},
    **{f"conditioner.embedders.1.model.{name}": tensor for name, tensor in OPENCLIP.items()},
    **{f"first_stage_model.{name}": tensor for name, tensor in VAE.items()},
}
SD3 = {
    **{f"model.diffusion_model.{name}": tensor for name, tensor in UNET.items()},
    **{f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in CLIP.items()},
    **{f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in T5.items()},
    **{f"vae.{name}": tensor for name, tensor in VAE.items()},
    "text_encoders.clip_l.logit_scale": torch.ones(()),
}


@pytest.fixture
def opened(tmp_path):
    def opened(tensors):
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        return open_source(tmp_path / "model.safetensors")

    return opened


@pytest.mark.parametrize(
    ("checkpoint", "labels"),
    [
        (SD15, {"unet", "clip_l", "vae"}),
        (SDXL, {"unet", "clip_l", "clip_g", "vae"}),
        (SD3, {"unet", "clip_l", "t5xxl", "vae"}),
        (UNET, set()),
    ],
    ids=["SD 1.5", "SDXL", "SD3", "no checkpoint"],
)
def test_parts_are_found(checkpoint, labels):
    assert prefixes_of(checkpoint).keys() == labels


@pytest.mark.parametrize(
    ("checkpoint", "part", "expected"),
    [
        (SD15, "unet", UNET),
        (SD15, "clip", CLIP),
        (SD15, "vae", VAE),
        (SDXL, "clip_l", CLIP),
        (SD3, "t5xxl", T5),
        (SD3, "vae", VAE),
        (UNET, "unet", UNET),
        (UNET, None, UNET),
        ({f"model.diffusion_model.{name}": tensor for name, tensor in UNET.items()}, None, UNET),
        ({f"net.{name}": tensor for name, tensor in UNET.items()}, None, UNET),
        (VAE, "vae", VAE),
    ],
)
def test_a_part_has_its_own_names(opened, checkpoint, part, expected):
    taken = take_part(opened(checkpoint), part)
    assert taken.tensors.keys() == expected.keys()
    assert all(torch.equal(taken.tensors[name].read(), tensor) for name, tensor in expected.items())
    assert known_architecture(taken).part == {"clip_l": "clip", "t5xxl": "clip"}.get(part, part or "unet")


@pytest.mark.parametrize(
    ("checkpoint", "part", "message"),
    [
        (SD15, None, r"full checkpoint; choose one with --part: (?=.*unet)(?=.*clip_l)(?=.*vae)"),
        (SDXL, "clip", r"has several; choose one with --part: (?=.*clip_l)(?=.*clip_g)"),
        (SD15, "t5xxl", r"has no part 't5xxl'"),
        (UNET, "vae", r"has no part 'vae': it is the unet of a model \(sd1\) alone"),
    ],
)
def test_what_cannot_be_taken_is_said_with_the_parts_there_are(opened, checkpoint, part, message):
    with pytest.raises(PartError, match=message):
        take_part(opened(checkpoint), part)


def test_openclip_gets_the_names_that_the_host_gives_it(opened, host, tmp_path):
    taken = take_part(opened(SDXL), "clip_g")
    expected = host.utils.clip_text_transformers_convert(
        {name: tensor.clone() for name, tensor in OPENCLIP.items()}, "", ""
    )
    del expected["logit_scale"]
    assert taken.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert taken.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(taken.tensors[name].read(), tensor), name


def test_only_the_tensors_of_the_part_are_converted(opened, tmp_path):
    from gguf_native.loader import open_gguf
    from gguf_native.quantizer import convert

    path = opened(SD15).paths[0]
    convert(path, tmp_path / "vae.gguf", "Q8_0", part="vae")
    with open_gguf(tmp_path / "vae.gguf") as file:
        assert set(file.tensors) == set(VAE)
        assert file.metadata["general.architecture"] == "vae"
    assert set(load_file(path)) == set(SD15)
