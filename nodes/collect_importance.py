"""Importance collector: watches a model while it paints the user's own prompts."""

from pathlib import Path

import comfy.patcher_extension
import folder_paths
from comfy_api.latest import io

from ..quantizer.collect import Seen, add_to_file, check_file, watching
from .quantize import plain_file_name

# In the output folder of the host.
FOLDER = "importance"
KEY = "gguf_native_importance"


class GGUFCollectImportance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GGUFCollectImportance",
            display_name="Collect Importance (GGUF)",
            category="model/loaders",
            description="Notes, while a model samples, which inputs of its matrices are large. Quantizing with that "
            "file spends precision where your own prompts need it.",
            search_aliases=["gguf", "imatrix", "importance matrix", "calibration", "quantize"],
            inputs=[
                io.Model.Input("model", tooltip="The model to watch, best unquantised or as Q8_0."),
                io.String.Input(
                    "name",
                    default="importance",
                    tooltip="Name of the file in output/importance. Every sampling run adds to it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, watched while it samples.")],
        )

    @classmethod
    def execute(cls, model, name) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / FOLDER / plain_file_name(cls.__name__, name)

        def sample(executor, *args, **kwargs):
            seen, watched = Seen(), executor.class_obj.model_patcher.model.diffusion_model
            check_file(path, watched)
            with watching(watched, seen):
                latent = executor(*args, **kwargs)
            # Only a run that was not cancelled counts.
            path.parent.mkdir(exist_ok=True)
            add_to_file(path, seen, "ComfyUI")
            return latent

        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, sample)
        return io.NodeOutput(model)
