"""CLIP loaders: one to four text encoders, each from a GGUF file or from safetensors."""

import folder_paths
from comfy_api.latest import io

import nodes as host_nodes

from ..loader.text_encoder import load_text_encoder
from . import compute_input, folders

FILE_TOOLTIP = "A GGUF or safetensors file in models/text_encoders or models/clip. The two kinds may be mixed."
TYPE_TOOLTIP = "The kind of model that the text encoder is for, as in ComfyUI's own loader."
OUTPUT_TOOLTIP = "The text encoders, ready for CLIP Text Encode."


def _file(name: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=folders.files_of_both_kinds("clip_gguf"), tooltip=FILE_TOOLTIP)


def _type(host_loader: type) -> io.Combo.Input:
    options = host_loader.INPUT_TYPES()["required"]["type"][0]
    return io.Combo.Input("type", options=options, tooltip=TYPE_TOOLTIP)


def _schema(node_id: str, display_name: str, description: str, inputs: list) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category="model/loaders",
        description=description,
        search_aliases=["gguf", "clip gguf", "text encoder gguf", "t5 gguf", "load clip"],
        inputs=[*inputs, compute_input.INPUT],
        outputs=[io.Clip.Output(tooltip=OUTPUT_TOOLTIP)],
    )


def _load(names: list[str], type_name: str, compute: str) -> io.NodeOutput:
    paths = [folders.full_path("clip_gguf", name) for name in names]
    embeddings = folder_paths.get_folder_paths("embeddings")
    return io.NodeOutput(load_text_encoder(paths, type_name, embeddings, compute_input.chosen(compute)))


class CLIPLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "CLIPLoaderGGUF",
            "CLIPLoader (GGUF)",
            "Loads one text encoder from a GGUF or safetensors file.",
            [_file("clip_name"), _type(host_nodes.CLIPLoader)],
        )

    @classmethod
    def execute(cls, clip_name, type, compute=compute_input.BY_SETTING) -> io.NodeOutput:
        return _load([clip_name], type, compute)


class DualCLIPLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "DualCLIPLoaderGGUF",
            "DualCLIPLoader (GGUF)",
            "Loads two text encoders, as Flux, SDXL and HunyuanVideo need them.",
            [_file("clip_name1"), _file("clip_name2"), _type(host_nodes.DualCLIPLoader)],
        )

    @classmethod
    def execute(cls, clip_name1, clip_name2, type, compute=compute_input.BY_SETTING) -> io.NodeOutput:
        return _load([clip_name1, clip_name2], type, compute)


class TripleCLIPLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "TripleCLIPLoaderGGUF",
            "TripleCLIPLoader (GGUF)",
            "Loads the three text encoders of Stable Diffusion 3.",
            [_file("clip_name1"), _file("clip_name2"), _file("clip_name3")],
        )

    @classmethod
    def execute(cls, clip_name1, clip_name2, clip_name3, compute=compute_input.BY_SETTING) -> io.NodeOutput:
        return _load([clip_name1, clip_name2, clip_name3], "sd3", compute)


class QuadrupleCLIPLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "QuadrupleCLIPLoaderGGUF",
            "QuadrupleCLIPLoader (GGUF)",
            "Loads the four text encoders of HiDream.",
            [_file("clip_name1"), _file("clip_name2"), _file("clip_name3"), _file("clip_name4")],
        )

    @classmethod
    def execute(cls, clip_name1, clip_name2, clip_name3, clip_name4, compute=compute_input.BY_SETTING) -> io.NodeOutput:
        return _load([clip_name1, clip_name2, clip_name3, clip_name4], "hidream", compute)
