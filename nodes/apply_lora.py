"""LoRA applier: LoRAs beside the packed weights of a model and its text encoder."""

import folder_paths
from comfy_api.latest import io

from ..config import settings
from ..loader.lora import apply_lora
from ..loader.lora_files import preload_lora
from .folders import files

NONE = "none"


class LoraLoaderGGUF(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model", tooltip="The diffusion model that the LoRAs change; GGUF or not."),
            io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs that change it too."),
        ]
        for number in range(1, settings().max_loras + 1):
            inputs += _inputs_of_one(number)
        inputs.append(
            io.MultiCombo.Input(
                "preload",
                options=files("loras"),
                default=[],
                optional=True,
                tooltip="LoRAs to read into memory now, so that choosing one later reads nothing from disk. "
                "The setting preload_loras says how many megabytes stay.",
            )
        )
        return io.Schema(
            node_id="LoraLoaderGGUF",
            display_name="Load LoRA (GGUF)",
            category="model/loaders",
            description="Applies LoRAs beside the quantised weights: they are never merged, so nothing is lost by "
            "changing or removing them.",
            search_aliases=["gguf", "lora", "lora stack", "apply lora", "load lora"],
            inputs=inputs,
            # So that a workflow saved with more LoRAs is not painted without them.
            accept_all_inputs=True,
            outputs=[
                io.Model.Output(tooltip="The model with the LoRAs."),
                io.Clip.Output(tooltip="The text encoder with the LoRAs; nothing if none was connected."),
            ],
        )

    @classmethod
    def execute(cls, model, clip=None, preload=(), **widgets) -> io.NodeOutput:
        for name in preload:
            preload_lora(folder_paths.get_full_path_or_raise("loras", name))
        for number in sorted(int(widget.removeprefix("lora_")) for widget in widgets if widget.startswith("lora_")):
            name = widgets[f"lora_{number}"]
            strength_model = widgets.get(f"strength_model_{number}", 1.0)
            strength_clip = 0 if clip is None else widgets.get(f"strength_clip_{number}", 1.0)
            if name != NONE and (strength_model, strength_clip) != (0, 0):
                path = folder_paths.get_full_path_or_raise("loras", name)
                model, clip = apply_lora(model, clip, path, strength_model, strength_clip)
        return io.NodeOutput(model, clip)


def _inputs_of_one(number: int) -> list:
    strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "optional": True}
    return [
        io.Combo.Input(
            f"lora_{number}",
            options=[NONE, *files("loras")],
            default=NONE,
            optional=True,
            tooltip=f"LoRA number {number}, a file in models/loras.",
        ),
        io.Float.Input(
            f"strength_model_{number}",
            **strength,
            tooltip=f"How strongly LoRA {number} changes the diffusion model. 0 is off; negative works too.",
        ),
        io.Float.Input(
            f"strength_clip_{number}",
            **strength,
            tooltip=f"How strongly LoRA {number} changes the text encoder.",
        ),
    ]
