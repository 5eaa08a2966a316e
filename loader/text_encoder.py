"""From files to a ComfyUI CLIP: text encoders as GGUF, as safetensors, or one of each."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SDClipModel

from ..config import settings
from ..ops.layers import GGUFOps, PackedWeight, WeightShapeError
from ..ops.layout import is_packed
from . import residency
from .errors import (
    AmbiguousTextEncoderError,
    IncompleteTextEncoderError,
    UnknownTextEncoderError,
    UnsupportedTextEncoderError,
    WrongShapeError,
)
from .key_maps import OTHER_MODELS, TEXT_ENCODERS, TextEncoderNames
from .model_patcher import adopt
from .state_dict import read_state_dict
from .tokenizers import sentencepiece_model

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
CLIP_LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"
T5_BLOCK = "encoder.block.0.layer."
T5_ATTENTION = f"{T5_BLOCK}0.SelfAttention"
T5_BIAS_OF_SECOND_LAYER = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"

# Many real files lack it.
CLIP_PROJECTION = "text_projection.weight"

# The types that take T5-XXL, which ComfyUI tells from T5-base by the rows of this matrix of its last layer.
T5_XXL_TYPES = {"sd3", "flux", "ltxv", "pixart", "chroma", "wan", "hidream", "cogvideox", "mochi"}
T5_XXL_MARK = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
T5_XXL_ROWS, T5_XL_ROWS = 10240, 5120
# The names under which ComfyUI takes another configuration of a T5 than its own.
T5_CONFIGS = ("t5xxl_model_config", "umt5xxl_model_config", "t5base_model_config")


@dataclass(frozen=True)
class EncoderFile:
    """One file: its tensors under ComfyUI's names."""

    path: str
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def is_gguf(self) -> bool:
        return Path(self.path).suffix.lower() == ".gguf"

    @property
    def is_t5(self) -> bool:
        return f"{T5_ATTENTION}.q.weight" in self.tensors

    def shape(self, key: str) -> torch.Size:
        if key not in self.tensors:
            raise IncompleteTextEncoderError(f"{self.name}: lacks tensor '{key}'. Download or convert the file again.")
        return self.tensors[key].shape


def load_text_encoder(
    paths: Sequence[str],
    type_name: str,
    embedding_directory: list[str] | None = None,
    compute: str | None = None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Load one to four files as ComfyUI's own loaders do; each may be GGUF or safetensors.

    type_name: a value of the `type` input of ComfyUI's CLIP loaders. Sizes come from the tensors, not from the type.
    compute: see `model_patcher.adopt`; None is the setting's.
    Raises a GGUFError for a GGUF file that is broken, unknown, or incomplete for the type.
    """
    files = [_read(str(path)) for path in paths]
    model_options = _configurations(files)
    if any(file.is_gguf for file in files):
        model_options["custom_operations"] = GGUFOps
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            [_marked_as_xxl(file, type_name) for file in files],
            embedding_directory=embedding_directory,
            clip_type=getattr(comfy.sd.CLIPType, type_name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options=model_options,
            disable_dynamic=disable_dynamic,
        )
    except WeightShapeError as error:
        raise WrongShapeError(f"{', '.join(file.name for file in files)} as type '{type_name}': {error}") from error
    _refuse_incomplete(clip, files, type_name)
    clip.patcher = adopt(clip.patcher, residency.TEXT, compute=compute or settings().compute)
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (paths, type_name, embedding_directory, compute))
    return clip


def load_text_encoder_patcher(
    paths: Sequence[str],
    type_name: str,
    embedding_directory: list[str] | None = None,
    compute: str | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """The patcher of a freshly loaded CLIP: what the host calls to clone one for another device or mode."""
    return load_text_encoder(paths, type_name, embedding_directory, compute, disable_dynamic).patcher


def comfyui_tensors(
    file_name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Tensors of a GGUF file under ComfyUI's names, without those that belong to no text encoder.

    Raises UnknownTextEncoderError or AmbiguousTextEncoderError, which say what is in the file.
    """
    found = [(row, prefix) for row in TEXT_ENCODERS for prefix in _prefixes(row, tensors)]
    if not found:
        raise UnknownTextEncoderError(_what_it_is(file_name, tensors, metadata))
    if len({prefix for _, prefix in found}) > 1:
        listed = ", ".join(f"{row.family} at '{prefix}'" for row, prefix in found)
        raise AmbiguousTextEncoderError(
            f"{file_name}: holds more than one text encoder ({listed}). Give a file for each of them instead."
        )
    row, prefix = found[0]
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    named = {_renamed(key, row): tensor for key, tensor in own.items()}
    return {key: tensor for key, tensor in named.items() if key is not None}


def _prefixes(row: TextEncoderNames, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    ends = (key.removesuffix(row.signature) for key in tensors if key.endswith(row.signature))
    prefixes = (end for end in ends if not end or end.endswith("."))
    return [prefix for prefix in prefixes if _widens(row, prefix, tensors)]


def _widens(row: TextEncoderNames, prefix: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    if row.widens is None:
        return True
    matrix = tensors.get(prefix + row.widens)
    return matrix is not None and matrix.shape[0] > matrix.shape[1]


def _renamed(key: str, row: TextEncoderNames) -> str | None:
    module, _, leaf = key.rpartition(".")
    layer = LAYER_NUMBER.search(module)
    name = row.names.get(LAYER_NUMBER.sub("{}", module, count=1))
    if name is None:
        return key if row.keeps_others else None
    return f"{name.format(layer and layer[0])}.{leaf}"


def _what_it_is(file_name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> str:
    advice = next((other.advice for other in OTHER_MODELS if _holds(tensors, other.starts)), "")
    first = ", ".join(f"'{key}'" for key in list(tensors)[:5])
    tried = ", ".join(row.family for row in TEXT_ENCODERS)
    architecture = metadata.get("general.architecture")
    message = f"{file_name}: its tensors are of no known text encoder. {advice}{'. ' if advice else ''}"
    return f"{message}First tensors: {first}; general.architecture: {architecture!r}; tried: {tried}."


def _holds(tensors: Mapping[str, torch.Tensor], starts: tuple[str, ...]) -> bool:
    return any(f".{start}" in f".{key}" for key in tensors for start in starts)


def _read(path: str) -> EncoderFile:
    return EncoderFile(path, _read_gguf(path) if path.lower().endswith(".gguf") else _read_other(path))


def _read_other(path: str) -> dict[str, torch.Tensor]:
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return comfy.utils.convert_old_quants(tensors, model_prefix="", metadata=metadata)[0]


def _read_gguf(path: str) -> dict[str, torch.Tensor]:
    name = Path(path).name
    stored, metadata = read_state_dict(path, streaming=settings().streaming_loading)
    tensors = comfyui_tensors(name, stored, metadata)
    if T5_BIAS_OF_SECOND_LAYER in tensors:
        tensors["spiece_model"] = sentencepiece_model(name, metadata)
    if CLIP_LAYER in tensors and CLIP_PROJECTION not in tensors:
        # ComfyUI multiplies by it all the same: without one, the pooled output stays as it is.
        width = tensors[CLIP_LAYER].shape[1]
        tensors[CLIP_PROJECTION] = torch.eye(width, dtype=torch.float16)
    return _norms_as_matrices(tensors)


def _norms_as_matrices(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, a T5's norms in the half precision that they would have in a safetensors file: GGUF keeps them in F32.

    ComfyUI takes the dtype of T5's last norm for that of the whole encoder; F32 would double every plain matrix.
    """
    if f"{T5_ATTENTION}.q.weight" not in tensors:
        return tensors
    matrices = {tensor.dtype for tensor in tensors.values() if tensor.ndim > 1 and not is_packed(tensor)}
    dtype = torch.bfloat16 if torch.bfloat16 in matrices else torch.float16
    norms = {key: tensor for key, tensor in tensors.items() if tensor.ndim == 1 and tensor.dtype == torch.float32}
    return tensors | {key: norm.to(dtype) for key, norm in norms.items()}


def _marked_as_xxl(file: EncoderFile, type_name: str) -> dict[str, torch.Tensor]:
    """Its tensors; a smaller T5 in the place of T5-XXL gets the mark of that, a matrix without values."""
    if not file.is_t5 or type_name not in T5_XXL_TYPES:
        return file.tensors
    if T5_XXL_MARK not in file.tensors:
        return file.tensors | {T5_XXL_MARK: torch.empty(T5_XXL_ROWS, 0)}
    rows = file.shape(T5_XXL_MARK)[0]
    if rows not in (T5_XXL_ROWS, T5_XL_ROWS):
        raise UnsupportedTextEncoderError(
            f"{file.name}: '{T5_XXL_MARK}' has {rows} rows; of T5 encoders with 24 layers, ComfyUI takes those with "
            f"{T5_XXL_ROWS} or {T5_XL_ROWS} for type '{type_name}'. Use T5-XXL, or an encoder with fewer layers."
        )
    return file.tensors


def _configurations(files: Sequence[EncoderFile]) -> dict[str, object]:
    """Sizes of the encoders, under the names by which ComfyUI takes others than its own."""
    options: dict[str, object] = {}
    for file in files:
        if file.is_t5:
            options |= dict.fromkeys(T5_CONFIGS, _t5_configuration(file))
    clips = [file for file in files if CLIP_LAYER in file.tensors]
    # ComfyUI has one place for the sizes of CLIP-L and CLIP-G: with both, they are what it knows.
    if len(clips) == 1:
        options["model_config"] = _clip_configuration(clips[0])
    return options


def _t5_configuration(file: EncoderFile) -> dict[str, object]:
    vocabulary, width = file.shape("shared.weight")
    heads = file.shape(f"{T5_ATTENTION}.relative_attention_bias.weight")[1]
    is_gated = f"{T5_BLOCK}1.DenseReluDense.wi_0.weight" in file.tensors
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": file.shape(f"{T5_BLOCK}1.DenseReluDense.wi{'_0' if is_gated else ''}.weight")[0],
        "d_kv": file.shape(f"{T5_ATTENTION}.q.weight")[0] // heads,
        "num_heads": heads,
        "num_layers": _count_layers(file, "encoder.block."),
        "is_gated_act": is_gated,
        "dense_act_fn": "gelu_pytorch_tanh" if is_gated else "relu",
        "model_type": "umt5" if T5_BIAS_OF_SECOND_LAYER in file.tensors else "t5",
    }


def _clip_configuration(file: EncoderFile) -> dict[str, object]:
    width = file.shape("text_model.embeddings.token_embedding.weight")[1]
    return {
        "hidden_size": width,
        "intermediate_size": file.shape(CLIP_LAYER)[0],
        # All of CLIP-L, CLIP-H and CLIP-G have heads of 64.
        "num_attention_heads": width // 64,
        "num_hidden_layers": _count_layers(file, "text_model.encoder.layers."),
    }


def _count_layers(file: EncoderFile, start: str) -> int:
    return len({key.removeprefix(start).partition(".")[0] for key in file.tensors if key.startswith(start)})


def _refuse_incomplete(clip: comfy.sd.CLIP, files: Sequence[EncoderFile], type_name: str) -> None:
    """ComfyUI warns of missing tensors and goes on with arbitrary values in their place."""
    for encoder in clip.cond_stage_model.modules():
        if not isinstance(encoder, SDClipModel):
            continue
        wanted = _parameter_names(encoder.transformer)
        file = max(files, key=lambda file: _likeness(wanted, file.tensors.keys()))
        missing = [key for key in wanted if key not in file.tensors]
        if missing and file.is_gguf:
            first = ", ".join(f"'{key}'" for key in missing[:5])
            raise IncompleteTextEncoderError(
                f"{file.name}: lacks {len(missing)} of the {len(wanted)} tensors that {type(encoder).__name__} of type "
                f"'{type_name}' has: {first}. Choose the files that belong to this type, or convert this one again."
            )


def _parameter_names(model: torch.nn.Module) -> dict[str, None]:
    """In the model's order; a packed layer without a weight names it all the same."""
    names = {name: None for name, _ in model.named_parameters()}
    for path, layer in model.named_modules():
        if isinstance(layer, PackedWeight):
            names |= dict.fromkeys(f"{path}.{name}" for name in layer.expected_shapes())
    return names


def _likeness(some: Mapping[str, None], others: Set[str]) -> float:
    """How much two sets of names have in common: 1 where they are the same, 0 where they share none."""
    return len(some.keys() & others) / len(some.keys() | others)
