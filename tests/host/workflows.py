"""Workflows in the form that the HTTP API takes: node id -> class and inputs, where ["id", n] is output n of a node."""

from typing import Any

from host.client import Graph, WorkflowError

# Nodes that belong to the page alone.
NOTES = ("MarkdownNote", "Note")
PROMPT = "a red (cat:1.2) on a mat"


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    model: dict[str, Any],
    clip: dict[str, Any],
    vae: dict[str, Any],
    *,
    latent: str = "EmptySD3LatentImage",
    size: int = 64,
    steps: int = 2,
    cfg: float = 1.0,
    seed: int = 1,
) -> Graph:
    """Loaders to picture, with ids model, clip, vae, positive, negative, latent, sampler, image, save.

    Further nodes go between by changing inputs: graph["sampler"]["inputs"]["model"] = ["lora", 0].
    """
    return {
        "model": model,
        "clip": clip,
        "vae": vae,
        "positive": node("CLIPTextEncode", text=PROMPT, clip=["clip", 0]),
        "negative": node("CLIPTextEncode", text="", clip=["clip", 0]),
        "latent": node(latent, width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "image": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["image", 0], filename_prefix="test"),
    }


def painting(model: dict[str, Any], clip_file: str, vae_file: str, caption: str, *, seed: int = 1) -> Graph:
    """A caption painted by the trained model as it was evaluated: 128x128 pixels, 20 steps."""
    graph = text_to_image(
        model,
        node("CLIPLoader", clip_name=clip_file, type="stable_diffusion"),
        node("VAELoader", vae_name=vae_file),
        size=128,
        steps=20,
        seed=seed,
    )
    graph["positive"]["inputs"]["text"] = caption
    return graph


def widget_names(description: dict[str, Any]) -> list[str | None]:
    """The inputs of a node that are widgets, in the page's order; None is the page's own "control after generate"."""
    names: list[str | None] = []
    for group in ("required", "optional"):
        for name, (kind, *options) in description["input"].get(group, {}).items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                names.append(name)
                names += [None] if options and options[0].get("control_after_generate") else []
    return names


def from_page(page: dict[str, Any], object_info: dict[str, dict]) -> Graph:
    """A workflow as the page saves it -> the form the API takes; `object_info` is the server's."""
    sources = {link: [str(source), slot] for link, source, slot, *_ in page["links"]}
    graph: Graph = {}
    for entry in page["nodes"]:
        if entry["type"] in NOTES:
            continue
        if entry["type"] not in object_info:
            raise WorkflowError(entry["type"], "the server has no such node; its log says why")
        names = widget_names(object_info[entry["type"]])
        inputs = {name: value for name, value in zip(names, entry.get("widgets_values", []), strict=False) if name}
        slots = entry.get("inputs", [])
        inputs |= {slot["name"]: sources[slot["link"]] for slot in slots if slot.get("link") is not None}
        graph[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    return graph
