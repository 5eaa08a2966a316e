"""Quantiser: a model of the host's folders to a GGUF file beside it."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..quantizer import convert
from ..quantizer.recipes import FILE_TYPES
from . import folders

WHOLE = "whole file"
# Part of a model -> host's folder key that it belongs to.
FOLDERS = {"unet": "diffusion_models", "clip": "text_encoders", "vae": "vae"}
CHECKPOINTS = "checkpoints"
OUR_KEYS = {host_key: key for key, host_key in folders.SHARED.items()}
EXTENSIONS = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
DEVICES = ("GPU", "CPU")


class GGUFQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GGUFQuantize",
            display_name="Quantize to GGUF",
            category="model/loaders",
            description="Converts a model file to a GGUF file of a smaller type, which the GGUF loaders then list.",
            search_aliases=["gguf", "quantize", "convert to gguf", "Q4_K_M", "compress model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model",
                    options=files(),
                    tooltip="A file in models/diffusion_models, checkpoints, text_encoders or vae.",
                ),
                io.Combo.Input(
                    "type",
                    options=list(FILE_TYPES),
                    default="Q4_K_M",
                    tooltip="The file type. Q8_0 is hard to tell from 16 bits; Q5_K_M and Q4_K_M are the usual ones.",
                ),
                io.Combo.Input(
                    "part",
                    options=[WHOLE, *FOLDERS],
                    default=WHOLE,
                    tooltip="Of a full checkpoint, which part: diffusion model, text encoder or VAE. whole file: it is "
                    "one part already.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the new file, without a folder. Empty: the model's name and the type. A file "
                    "that is there is never replaced.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default=DEVICES[0],
                    tooltip="Where to quantize. GPU is many times faster and takes about 2 GB there.",
                    optional=True,
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The name of the new file in its folder.")],
        )

    @classmethod
    def execute(cls, model, type, part, name, device=DEVICES[0]) -> io.NodeOutput:
        key, _, file = model.partition("/")
        source = path_of(key, file)
        chosen = None if part == WHOLE else part
        target = Path(folder_of(key, chosen, source)) / file_name(name, source, type, chosen)
        progress = comfy.utils.ProgressBar(1)

        def report(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(done, total)

        on = comfy.model_management.get_torch_device() if device == "GPU" else "cpu"
        (written,) = convert(source, target, type, part=chosen, device=on, progress=report)
        return io.NodeOutput(written.name, ui={"text": [f"{written}: {written.stat().st_size / 1e6:,.1f} MB"]})


def files() -> list[str]:
    """Files that can be converted, as `host's folder key/name`."""
    listed = {host_key: folders.files_of_both_kinds(key) for host_key, key in OUR_KEYS.items()}
    listed[CHECKPOINTS] = folder_paths.get_filename_list(CHECKPOINTS)
    return [f"{key}/{name}" for key, names in listed.items() for name in names if name.lower().endswith(EXTENSIONS)]


def path_of(key: str, name: str) -> Path:
    """The path of a listed file; the host's FileNotFoundError if it is gone."""
    if key == CHECKPOINTS:
        return Path(folder_paths.get_full_path_or_raise(key, name))
    return Path(folders.full_path(OUR_KEYS[key], name))


def folder_of(key: str, part: str | None, source: Path) -> str | Path:
    """Where the result goes: beside the model if it belongs there, else the first folder of its kind."""
    wanted = FOLDERS[part] if part else key.replace(CHECKPOINTS, FOLDERS["unet"])
    return source.parent if wanted == key else folder_paths.get_folder_paths(wanted)[0]


def file_name(name: str, source: Path, type_name: str, part: str | None) -> str:
    """The name of the result; ValueError for one that leads out of the folder."""
    name = name.strip()
    if not name:
        return "-".join((source.stem, *([part] if part else []), type_name)) + ".gguf"
    return plain_file_name(GGUFQuantize.__name__, name)


def plain_file_name(node: str, name: str) -> str:
    """`name`, ending in .gguf; ValueError for one that is empty or leads to another folder."""
    name = name.strip()
    if not name or Path(name).name != name or "\\" in name:
        raise ValueError(f"{node}: '{name}' is no name of a file in this folder; give one without / and \\.")
    return name if name.lower().endswith(".gguf") else f"{name}.gguf"
