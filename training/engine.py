"""ComfyUI in this process: its text encoder for the training, and pictures painted by its own nodes."""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from host import in_process, samples
from host.environment import find_comfyui

LOG = logging.getLogger("training")
# CLIP's tokens of start and end; the end fills up what is left of the 77.
START, END, TOKENS = 49406, 49407, 77
FOLDERS = {"diffusion_models": "tiny_flux", "vae": "tiny_vae", "loras": "tiny_lora"}


def bind() -> torch.device:
    """Make `comfy` importable, on the GPU if there is one; call it before any module that imports comfy."""
    in_process.bind(find_comfyui())
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    # The host's other kinds have no gradient, or are slower.
    args.use_pytorch_cross_attention = True
    import comfy.model_management
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return comfy.model_management.get_torch_device()


def load_clip():
    """The random CLIP-L of the demo and the tests, as a CLIP of the host."""
    import comfy.sd

    file = samples.sample("clip_l")
    LOG.info("text encoder: %s, sha256 %s", file.name, hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    return comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def token_ids(clip, sentences: Sequence[str]) -> torch.Tensor:
    """int64 [N, 77]: what the host's tokenizer makes of each sentence, asked once for each word."""
    words: dict[str, list[int]] = {}
    for word in {word for sentence in sentences for word in sentence.split()}:
        row = [token for token, _ in clip.tokenize(word)["l"][0]]
        words[word] = row[1 : row.index(END)]
    rows = [[START, *(token for word in sentence.split() for token in words[word])] for sentence in sentences]
    return torch.tensor([row + [END] * (TOKENS - len(row)) for row in rows])


@contextlib.contextmanager
def shortened(transformer, tokens: int):
    """CLIP on the first tokens only: it never looks ahead, so they are what they are among all 77."""
    positions = transformer.text_model.embeddings.position_embedding
    whole = positions.weight
    positions.weight = torch.nn.Parameter(whole[:tokens], requires_grad=False)
    yield
    positions.weight = whole


@torch.inference_mode()
def encode(
    clip, sentences: Sequence[str], device: torch.device, tokens: int = TOKENS, batch: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIPTextEncode gives, of the first tokens: bfloat16 context [N, tokens, 768] and pooled text [N, 768].

    Whole contexts are computed as the host does, shorter ones, of which there are many, by bfloat16 products.
    """
    transformer = clip.cond_stage_model.clip_l.transformer.to(device).float()
    contexts, pooled = [], []
    quick = torch.autocast(device.type, torch.bfloat16, enabled=tokens < TOKENS)
    with shortened(transformer, tokens), quick:
        for ids in token_ids(clip, sentences)[:, :tokens].split(batch):
            context, _, _, end = transformer(ids.to(device), dtype=torch.float32)
            contexts.append(context.bfloat16())
            pooled.append(end.bfloat16())
    # Not as inference tensors, which no gradient passes.
    with torch.inference_mode(False):
        return torch.cat(contexts).clone(), torch.cat(pooled).clone()


class Painter:
    """The nodes of a text-to-image workflow, with the models of one folder loaded by the host's own loaders."""

    def __init__(self, folder: Path):
        import folder_paths

        import nodes

        self.nodes = nodes
        for kind in FOLDERS:
            folder_paths.add_model_folder_path(kind, str(folder))
        folder_paths.add_model_folder_path("text_encoders", str(samples.sample("clip_l").parent))
        self.model = nodes.UNETLoader().load_unet("tiny_flux.safetensors", "default")[0]
        self.clip = nodes.CLIPLoader().load_clip("clip_l.safetensors", "stable_diffusion")[0]
        self.vae = nodes.VAELoader().load_vae("tiny_vae.safetensors")[0]

    def with_lora(self):
        """The diffusion model with the LoRA at full strength."""
        return self.nodes.LoraLoader().load_lora(self.model, self.clip, "tiny_lora.safetensors", 1.0, 0.0)[0]

    @torch.inference_mode()
    def paint(self, model, sentences: Sequence[str], steps: int) -> torch.Tensor:
        """One picture for each sentence, its number being the seed: float32 [N, 3, height, width] of 0 to 1."""
        pictures = []
        for seed, sentence in enumerate(sentences):
            (prompt,) = self.nodes.CLIPTextEncode().encode(self.clip, sentence)
            latent = {"samples": torch.zeros(1, 16, 16, 16)}
            (latent,) = self.nodes.KSampler().sample(
                model, seed, steps, 1.0, "euler", "simple", prompt, prompt, latent, 1.0
            )
            pictures.append(self.nodes.VAEDecode().decode(self.vae, latent)[0].cpu().float())
        return torch.cat(pictures).movedim(-1, 1)
