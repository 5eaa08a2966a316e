"""The parts of a full checkpoint: which there are, and one of them under its own names."""

import re
from collections.abc import Iterable, Mapping

from ..loader.architectures import Architecture, architecture_of
from .errors import PartError
from .openclip import is_openclip, with_comfyui_names
from .source import Source, SourceTensor

# What `--part` takes -> what the start of a tensor's name looks like; a group is the name of one of several encoders.
PARTS = {
    "unet": re.compile(r"model\.diffusion_model\."),
    "clip": re.compile(
        r"(?:cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.(\w+))\.(?:transformer|model)\."
    ),
    "vae": re.compile(r"(?:first_stage_model|vae)\."),
}
# Stable Diffusion's checkpoints number their encoders.
NUMBERED_ENCODERS = {
    "cond_stage_model.transformer.": "clip_l",
    "cond_stage_model.model.": "clip_h",
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.0.model.": "clip_g",
    "conditioner.embedders.1.model.": "clip_g",
}


def prefixes_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Label -> (part, prefix) of each part in a full checkpoint; labels are unet, vae and the encoders' own names."""
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        for part, start in PARTS.items():
            if match := start.match(name):
                prefix = match[0]
                encoder = (match.group(1) if start.groups else None) or NUMBERED_ENCODERS.get(prefix, part)
                found.setdefault(encoder if part == "clip" else part, (part, prefix))
    return found


def take_part(source: Source, part: str | None) -> Source:
    """The tensors of one part of a source, without what stands before all of its names.

    part: unet, clip or vae, the name of one encoder where there are several, or None for the only part.
    Raises PartError, which names the parts found.
    """
    found = prefixes_of(source.tensors)
    if not found:
        return bare_model(source, part)
    fitting = {label: prefix for label, (kind, prefix) in found.items() if part in (None, kind, label)}
    if len(fitting) != 1:
        among = f"has no part '{part}'" if not fitting else "is a full checkpoint" if part is None else "has several"
        raise PartError(f"{source.name}: {among}; choose one with --part: {', '.join(found)}.")
    ((_, prefix),) = fitting.items()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items() if name.startswith(prefix)}
    return source.with_tensors(with_usual_names(tensors))


def bare_model(source: Source, part: str | None) -> Source:
    """A source that is one part, as that part."""
    known = architecture_of(source.tensors)
    row, prefix = known if known else (None, "")
    if part is not None and row is not None and part != row.part:
        raise PartError(f"{source.name}: has no part '{part}': it is the {row.part} of a model ({row.name}) alone.")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items() if name.startswith(prefix)}
    return source.with_tensors(with_usual_names(tensors))


def with_usual_names(tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """A CLIP of OpenCLIP under ComfyUI's names; all others as they are."""
    return with_comfyui_names(tensors) if is_openclip(tensors) else tensors


def known_architecture(source: Source) -> Architecture | None:
    """The architecture of one part, as `take_part` gives it."""
    known = architecture_of(source.tensors)
    return known[0] if known else None
