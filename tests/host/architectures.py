"""Small models of real architectures, as tables of tensor shapes read off ComfyUI's own classes on the meta device."""

import json
from collections.abc import Mapping
from pathlib import Path

import comfy.clip_model
import comfy.ldm.flux.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ops
import comfy.taesd.taesd
import comfy.text_encoders.t5
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.model import Decoder
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

Shapes = dict[str, tuple[int, ...]]

COMFY = Path(comfy.ops.__file__).parent


class WithWeights(comfy.ops.disable_weight_init):
    """Under DynamicVRAM the host's own have no weights before a file gives them some."""

    Linear, Embedding = torch.nn.Linear, torch.nn.Embedding


ON_META = {"dtype": torch.float32, "device": "meta", "operations": WithWeights}


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def flux(context: int, pooled: int, width: int = 256, depth: int = 2, depth_single_blocks: int = 2) -> Shapes:
    """By default two double and two single blocks of width 256: all rows fit the K-quants."""
    model = comfy.ldm.flux.model.Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=pooled,
        context_in_dim=context,
        hidden_size=width,
        mlp_ratio=4.0,
        num_heads=width // 128,
        depth=depth,
        depth_single_blocks=depth_single_blocks,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        **ON_META,
    )
    # Flux files spell the gain of a norm "scale"; ComfyUI renames it when it loads one.
    return {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in shapes_of(model).items()}


def sd3() -> Shapes:
    """Depth 4, and with it width 256; as deep a position table as 1024 pixels need."""
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}}
    model = MMDiT(
        input_size=None,
        in_channels=16,
        depth=4,
        adm_in_channels=2048,
        context_embedder_config=context,
        num_patches=64 * 64,
        pos_embed_max_size=64,
        qk_norm="rms",
        **ON_META,
    )
    return shapes_of(model)


def wan() -> Shapes:
    """Wan 2.1 text to video, two blocks of width 256; its patch embedding has five dimensions."""
    model = comfy.ldm.wan.model.WanModel(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=4096, **ON_META)
    return shapes_of(model)


def sd15() -> Shapes:
    """One level of the SD1.5 UNet, at its full 320 channels: mostly convolutions."""
    model = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=[1],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        use_checkpoint=False,
        legacy=False,
        **ON_META,
    )
    return shapes_of(model)


def clip_l(changes: Mapping[str, int]) -> Shapes:
    config = json.loads((COMFY / "sd1_clip_config.json").read_text()) | changes
    return shapes_of(comfy.clip_model.CLIPTextModel(config, **ON_META))


def t5(config_file: str, changes: Mapping[str, int]) -> Shapes:
    config = json.loads((COMFY / "text_encoders" / config_file).read_text()) | changes
    return shapes_of(comfy.text_encoders.t5.T5(config, **ON_META))


def kl_decoder(latent_channels: int) -> Shapes:
    """The decoder of the SD and Flux VAEs at a quarter of their width; it is all that VAEDecode uses."""
    with torch.device("meta"):
        decoder = Decoder(
            z_channels=latent_channels,
            resolution=256,
            in_channels=3,
            out_ch=3,
            ch=32,
            ch_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_resolutions=[],
        )
    return {f"decoder.{key}": shape for key, shape in shapes_of(decoder).items()}


def sd15_vae() -> Shapes:
    quant = {
        "quant_conv.weight": (8, 8, 1, 1),
        "quant_conv.bias": (8,),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "post_quant_conv.bias": (4,),
    }
    return kl_decoder(4) | quant


def taesd(latent_channels: int) -> Shapes:
    with torch.device("meta"):
        return shapes_of(comfy.taesd.taesd.TAESD(latent_channels=latent_channels))


def wan_vae() -> Shapes:
    with torch.device("meta"):
        model = comfy.ldm.wan.vae.WanVAE(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    return shapes_of(model)


def lora(targets: Mapping[str, str], model: Shapes, rank: int = 8) -> Shapes:
    """Low-rank factors for the layers of `model`; `targets` maps a layer's key to its name in the LoRA file."""
    shapes: Shapes = {}
    for layer, name in targets.items():
        rows, columns = model[f"{layer}.weight"]
        shapes[f"{name}.lora_up.weight"] = (rows, rank)
        shapes[f"{name}.lora_down.weight"] = (rank, columns)
        shapes[f"{name}.alpha"] = ()
    return shapes


def flux_lora(context: int, pooled: int) -> Shapes:
    layers = ["img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "img_mlp.0", "img_mlp.2"]
    targets = [f"double_blocks.{block}.{layer}" for block in range(2) for layer in layers]
    targets += [f"single_blocks.{block}.{layer}" for block in range(2) for layer in ("linear1", "linear2")]
    return lora({layer: f"diffusion_model.{layer}" for layer in targets}, flux(context, pooled))


def clip_l_lora(changes: Mapping[str, int], layers: int) -> Shapes:
    targets = {}
    for block in range(layers):
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2"):
            name = f"lora_te1_text_model_encoder_layers_{block}_{layer.replace('.', '_')}"
            targets[f"text_model.encoder.layers.{block}.{layer}"] = name
    return lora(targets, clip_l(changes))
