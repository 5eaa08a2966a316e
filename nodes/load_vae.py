"""VAE loader: a VAE from a GGUF file, its convolutions packed."""

from comfy_api.latest import io

from ..loader.vae import load_vae
from . import folders


class VAELoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAELoaderGGUF",
            display_name="VAE Loader (GGUF)",
            category="model/loaders",
            description="Loads a VAE from a GGUF file. Its convolutions stay quantised in memory.",
            search_aliases=["gguf", "vae gguf", "load vae", "quantized vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folders.files("vae_gguf"),
                    tooltip="A GGUF file in models/vae. For safetensors use ComfyUI's own Load VAE.",
                )
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, its weights still quantised.")],
        )

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(load_vae(folders.full_path("vae_gguf", vae_name)))
