"""The sample models: random weights with fixed seeds, made when first asked for and kept under .host/models/.

Beside them, so that a server finds both, lies the one that was trained: training/weights/.

Run by itself, it makes the samples named and prints their files:  python -m host.samples tiny_flux clip_l
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from host import quantise
from host.environment import HERE, HOST, ROOT, find_comfyui
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

if TYPE_CHECKING:
    from host.architectures import Shapes

MODELS = HOST / "models"
WEIGHTS = ROOT / "training" / "weights"
# What was trained -> its folder under models/; "tiny_flux" is the name of a sample, so all are called trained_.
TRAINED = {"tiny_flux": "diffusion_models", "tiny_vae": "vae", "tiny_lora": "loras"}

TINY_CLIP_L = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": 256,
}
TINY_T5 = {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4, "num_layers": 2}
# The width that Wan takes, and a vocabulary of its own.
TINY_UMT5 = {"d_model": 4096, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 2, "vocab_size": 512}


# The files that example_workflows/flux_gguf.json asks for -> the sample, type and naming that stand in for them.
EXAMPLE_FILES = {
    "diffusion_models/flux1-dev-Q5_K_S.gguf": ("tiny_flux_256", "Q5_K", "comfyui"),
    "text_encoders/clip-l-Q8_0.gguf": ("tiny_clip_l", "Q8_0", "comfyui"),
    "text_encoders/t5-v1_1-xxl-encoder-Q4_K_S.gguf": ("tiny_t5", "Q4_K", "llama.cpp"),
    "vae/ae-Q8_0.gguf": ("tiny_flux_vae", "Q8_0", "comfyui"),
}


@dataclass(frozen=True)
class Sample:
    """One model: its folder under models/, `general.architecture` of its GGUF file, its shapes as a function's name."""

    folder: str
    architecture: str
    shapes: str
    arguments: tuple
    dtype: torch.dtype


def diffusion_model(architecture: str, shapes: str, *arguments: int, dtype: torch.dtype = torch.bfloat16) -> Sample:
    return Sample("diffusion_models", architecture, shapes, arguments, dtype)


def text_encoder(architecture: str, shapes: str, *arguments: object) -> Sample:
    return Sample("text_encoders", architecture, shapes, arguments, torch.float16)


def vae(shapes: str, *arguments: int, dtype: torch.dtype = torch.float16) -> Sample:
    return Sample("vae", "vae", shapes, arguments, dtype)


def lora(shapes: str, *arguments: object) -> Sample:
    return Sample("loras", "lora", shapes, arguments, torch.float16)


SAMPLES: dict[str, Sample] = {
    # For CLIP-L or T5-base, both 768 wide: they run with ComfyUI's own loaders.
    "tiny_flux": diffusion_model("flux", "flux", 768, 768),
    # For tiny_t5 and tiny_clip_l.
    "tiny_flux_256": diffusion_model("flux", "flux", 256, 256),
    "tiny_sd3": diffusion_model("sd3", "sd3"),
    "tiny_wan": diffusion_model("wan", "wan"),
    "tiny_sd15": diffusion_model("sd1", "sd15", dtype=torch.float16),
    "clip_l": text_encoder("clip", "clip_l", {}),
    "tiny_clip_l": text_encoder("clip", "clip_l", TINY_CLIP_L),
    "t5_base": text_encoder("t5encoder", "t5", "t5_config_base.json", {}),
    "tiny_t5": text_encoder("t5encoder", "t5", "t5_config_xxl.json", TINY_T5),
    "tiny_umt5": text_encoder("t5encoder", "t5", "umt5_config_xxl.json", TINY_UMT5),
    "tiny_flux_vae": vae("kl_decoder", 16),
    "tiny_sd15_vae": vae("sd15_vae"),
    "tiny_flux_taesd": vae("taesd", 16),
    "tiny_wan_vae": vae("wan_vae", dtype=torch.bfloat16),
    "tiny_flux_lora": lora("flux_lora", 768, 768),
    "tiny_flux_256_lora": lora("flux_lora", 256, 256),
    "clip_l_lora": lora("clip_l_lora", {}, 12),
    "tiny_clip_l_lora": lora("clip_l_lora", TINY_CLIP_L, 2),
}


def fill(shapes: "Shapes", seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near unit size: gains of norms are one, rows are scaled by their length."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        if len(shape) <= 1 and not key.endswith("bias"):
            tensor = torch.ones(shape)
        elif len(shape) == 1:
            tensor = torch.randn(shape, generator=generator) * 0.02
        else:
            tensor = torch.randn(shape, generator=generator) / fan_in(shape) ** 0.5
        tensors[key] = tensor.to(dtype)
    return tensors


def fan_in(shape: tuple[int, ...]) -> int:
    """How many values one output is summed from."""
    return torch.Size(shape[1:]).numel()


def sentencepiece_model(vocabulary: int) -> torch.Tensor:
    """A SentencePiece model as UMT5 files carry it, trained on this project's licence."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
        model_writer=model,
        vocab_size=vocabulary,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def build(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a sample; needs ComfyUI in this process (host.in_process)."""
    from host import architectures

    sample = SAMPLES[name]
    shapes = getattr(architectures, sample.shapes)(*sample.arguments)
    tensors = fill(shapes, zlib.crc32(name.encode()), sample.dtype)
    if name == "tiny_umt5":
        tensors["spiece_model"] = sentencepiece_model(TINY_UMT5["vocab_size"])
    return tensors


def once(file: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` make the file, unless it is there; a file half written never has its name."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be making the same file.
        unfinished = file.with_name(f"unfinished-{os.getpid()}-{file.name}")
        write(unfinished)
        unfinished.replace(file)
    return file


def sample(name: str) -> Path:
    """The safetensors file of a sample."""
    return once(
        MODELS / SAMPLES[name].folder / f"{name}.safetensors",
        lambda file: save_file(build(name), file, {"format": "pt"}),
    )


def gguf(name: str, type_name: str, naming: str = "comfyui") -> Path:
    """The sample quantised to `type_name`; `naming` is a key of quantise.NAMINGS."""
    suffix = "" if naming == "comfyui" else f"-{naming}"
    return once(
        MODELS / SAMPLES[name].folder / f"{name}{suffix}-{type_name}.gguf",
        lambda file: quantise.quantise(sample(name), file, type_name, SAMPLES[name].architecture, naming),
    )


def decoded(name: str, type_name: str, dtype: torch.dtype) -> Path:
    """What a GGUF file decodes to, by the gguf package and not by the pack, as safetensors for ComfyUI's own nodes."""
    label = str(dtype).removeprefix("torch.")
    return once(
        MODELS / SAMPLES[name].folder / f"{name}-{type_name}-decoded-{label}.safetensors",
        lambda file: quantise.decode(gguf(name, type_name), file, dtype),
    )


def trained(name: str) -> Path:
    """The safetensors file of a part of the trained model, a key of TRAINED."""
    return once(
        MODELS / TRAINED[name] / f"trained_{name}.safetensors",
        lambda file: shutil.copyfile(WEIGHTS / f"{name}.safetensors", file),
    )


def trained_gguf(file_type: str) -> Path:
    """The trained diffusion model as GGUF, by this pack's own command line as a user calls it."""
    source = trained("tiny_flux")
    return once(
        source.with_name(f"{source.stem}-{file_type}.gguf"),
        lambda file: subprocess.run(
            [sys.executable, ROOT, "quantize", source, file, "--type", file_type],
            check=True,
            stdout=subprocess.DEVNULL,
        ),
    )


def make_example_files() -> None:
    for file, source in EXAMPLE_FILES.items():
        once(MODELS / file, lambda target, source=source: shutil.copyfile(gguf(*source), target))


def discard_outdated() -> None:
    """Throw all samples away when the code or the weights that they are made of have changed."""
    files = [HERE / file for file in ("architectures.py", "samples.py", "quantise.py")]
    files += sorted(WEIGHTS.glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = MODELS / "made_by.sha256"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    shutil.rmtree(MODELS, ignore_errors=True)
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        (MODELS / folder).mkdir(parents=True)
    stamp.write_text(digest)


def main() -> None:
    from host import in_process

    in_process.bind(find_comfyui())
    discard_outdated()
    for name in sys.argv[1:] or SAMPLES:
        file = sample(name)
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(MODELS)}")


if __name__ == "__main__":
    main()
