"""Recommend: which file type suits this machine, as a table in the graph."""

import comfy.model_management
from comfy_api.latest import io, ui

from ..quantizer.known_models import MODELS
from ..quantizer.measure import find_device
from ..quantizer.recommend import GIB, lines, recommend

# What measuring takes on the GPU, beside what is loaded.
ROOM = GIB


class GGUFRecommend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GGUFRecommend",
            display_name="Recommend a File (GGUF)",
            category="model/loaders",
            description="Measures this machine for a few seconds and shows what each GGUF file type costs on it.",
            search_aliases=["gguf", "which gguf", "Q4_K_M or Q5_K_M", "vram", "benchmark"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("model", options=list(MODELS), default="flux", tooltip="The model at its usual size."),
                io.Float.Input(
                    "vram",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Memory of the card in GB, to see what another card would hold. 0: all that this one has.",
                ),
            ],
            outputs=[io.String.Output(display_name="table", tooltip="The table and the advice.")],
        )

    @classmethod
    def execute(cls, model, vram) -> io.NodeOutput:
        device = find_device()
        comfy.model_management.free_memory(ROOM, device.device)
        table = "\n".join(lines(recommend(MODELS[model], vram * GIB or device.total or None)))
        return io.NodeOutput(table, ui=ui.PreviewText(table))
