"""UNet loaders: a diffusion model from a GGUF file."""

import torch
from comfy_api.latest import io

from ..loader.diffusion_model import load_diffusion_model
from . import compute_input, folders

DTYPES = {
    "default": None,
    "target": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

FILE_TOOLTIP = "A GGUF file in models/diffusion_models or models/unet. The kind of model is read from its tensors."


class UnetLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnetLoaderGGUF",
            display_name="Unet Loader (GGUF)",
            category="model/loaders",
            description="Loads a diffusion model from a GGUF file. Its weights stay quantised in memory.",
            search_aliases=["gguf", "load diffusion model gguf", "quantized unet", "flux gguf", "Q4_K_M"],
            inputs=[
                io.Combo.Input("unet_name", options=folders.files("unet_gguf"), tooltip=FILE_TOOLTIP),
                compute_input.INPUT,
            ],
            outputs=[io.Model.Output(tooltip="The diffusion model, its weights still quantised.")],
        )

    @classmethod
    def execute(cls, unet_name, compute=compute_input.BY_SETTING) -> io.NodeOutput:
        path = folders.full_path("unet_gguf", unet_name)
        return io.NodeOutput(load_diffusion_model(path, compute=compute_input.chosen(compute)))


class UnetLoaderGGUFAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnetLoaderGGUFAdvanced",
            display_name="Unet Loader (GGUF/Advanced)",
            category="model/loaders",
            description="Loads a diffusion model from a GGUF file; you choose the precision of decoding and of LoRAs.",
            search_aliases=["gguf", "gguf advanced", "dequant dtype", "patch dtype"],
            inputs=[
                io.Combo.Input("unet_name", options=folders.files("unet_gguf"), tooltip=FILE_TOOLTIP),
                io.Combo.Input(
                    "dequant_dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="What decoded weights are rounded to before the model computes with them. default and "
                    "target: straight to the model's compute dtype, which is exact to one rounding.",
                ),
                io.Combo.Input(
                    "patch_dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="The precision of the LoRA arithmetic. default and target: the model's compute dtype.",
                ),
                io.Boolean.Input(
                    "patch_on_device",
                    default=False,
                    tooltip="Keep LoHa, LoKr, DoRA and other adapters that must rebuild whole weights on the GPU: "
                    "faster, for more memory. Plain LoRAs are always there.",
                ),
                compute_input.INPUT,
            ],
            outputs=[io.Model.Output(tooltip="The diffusion model, its weights still quantised.")],
        )

    @classmethod
    def execute(
        cls, unet_name, dequant_dtype, patch_dtype, patch_on_device, compute=compute_input.BY_SETTING
    ) -> io.NodeOutput:
        path = folders.full_path("unet_gguf", unet_name)
        dtypes = DTYPES[dequant_dtype], DTYPES[patch_dtype]
        return io.NodeOutput(load_diffusion_model(path, *dtypes, patch_on_device, compute_input.chosen(compute)))
