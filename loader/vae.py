"""From a GGUF file to a ComfyUI VAE, its matrices and convolutions still packed."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import comfy.diffusers_convert
import comfy.ldm.modules.diffusionmodules.model as kl
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..config import settings
from ..ops.layers import GGUFOps, PackedWeight
from ..ops.layout import decoded, is_packed, relabel, reshape_packed
from .errors import IncompleteModelError, UnknownModelError, WrongShapeError
from .model_patcher import adopt
from .residency import VAE
from .state_dict import read_state_dict
from .vae_strips import Host, StripDecoder, n_convolutions

log = logging.getLogger("gguf_native")

# The host's VAEs take no `custom_operations`: their layers become ours, class by class, once they stand.
PACKABLE = {
    getattr(comfy.ops.disable_weight_init, name): getattr(GGUFOps, name)
    for name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Embedding")
}


def _keeps_the_size(conv: torch.nn.Conv2d) -> bool:
    padding = {(1, 1): (0, 0), (3, 3): (1, 1)}.get(conv.kernel_size)
    expected = ((1, 1), (1, 1), 1, padding, "zeros")
    return (conv.stride, conv.dilation, conv.groups, conv.padding, conv.padding_mode) == expected


# What StripDecoder knows: each kind of module in a decoder (subclasses are others), and whether one is as it expects.
KNOWN = {
    kl.Decoder: lambda decoder: True,
    kl.ResnetBlock: lambda block: True,
    kl.AttnBlock: lambda block: True,
    kl.Upsample: lambda upsample: upsample.with_conv and upsample.scale_factor == 2,
    comfy.ops.disable_weight_init.GroupNorm: lambda norm: norm.affine,
    comfy.ops.disable_weight_init.Conv2d: _keeps_the_size,
    GGUFOps.Conv2d: _keeps_the_size,
    torch.nn.Module: lambda level: True,
    torch.nn.ModuleList: lambda levels: True,
    torch.nn.SiLU: lambda swish: True,
    torch.nn.Dropout: lambda dropout: not dropout.training,
}


def _is_known_part(module: torch.nn.Module) -> bool:
    # Packs for seamless pictures replace what a convolution does.
    replaced = {"forward", "_conv_forward"} & vars(module).keys()
    hooked = module._forward_hooks or module._forward_pre_hooks
    is_as_expected = KNOWN.get(type(module))
    return not replaced and not hooked and is_as_expected is not None and is_as_expected(module)


def can_go_in_strips(decoder: torch.nn.Module | None) -> bool:
    """Whether StripDecoder gives what the decoder gives."""
    return isinstance(decoder, kl.Decoder) and all(_is_known_part(module) for module in decoder.modules())


class GGUFVAE(comfy.sd.VAE):
    """The host's VAE with packed layers. With `vae_slicing` it decodes one latent at a time, a big one in pieces."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The state dict that CheckpointSave writes: dense, so that any loader reads it."""
        sd = super().get_sd()
        for name, layer in self.first_stage_model.named_modules():
            if isinstance(layer, PackedWeight) and is_packed(layer.weight):
                sd[f"{name}.weight"] = decoded(layer.weight, layer.weight.dtype).cpu()
        return sd

    def decode(self, samples_in: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        options = vae_options or {}
        if not settings().vae_slicing:
            return super().decode(samples_in, options)
        log.info("GGUF Native: decoding %d latent(s) one at a time (vae_slicing).", len(samples_in))
        return torch.cat([self._decode_one(latent, options) for latent in samples_in.split(1)])

    def _decode_one(self, latent: torch.Tensor, options: dict) -> torch.Tensor:
        needed = self.memory_used_decode(latent.shape, self.vae_dtype)
        # As the host's decode does: what other models hold counts as free only once they have left.
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=needed, force_full_load=self.disable_offload
        )
        if latent.ndim != 4 or needed <= self.patcher.get_free_memory(self.device):
            return super().decode(latent, options)
        decoder = getattr(self.first_stage_model, "decoder", None)
        gigabytes = needed / 2**30
        if not can_go_in_strips(decoder):
            log.info("GGUF Native: %.1f GB do not fit for one picture: decoding it in tiles.", gigabytes)
            return self.decode_tiled(latent)
        log.info("GGUF Native: %.1f GB do not fit for one picture: decoding it in strips of rows.", gigabytes)
        with ExitStack() as until_decoded:
            decoder.forward = partial(self._decoder_in_strips, decoder)
            until_decoded.callback(delattr, decoder, "forward")
            return super().decode(latent, options)

    def _decoder_in_strips(self, decoder: kl.Decoder, latent: torch.Tensor) -> torch.Tensor:
        progress = comfy.utils.ProgressBar(n_convolutions(decoder))
        host = Host(
            borrow=borrowed,
            attention=comfy.ops.scaled_dot_product_attention,
            free_bytes=partial(self.patcher.get_free_memory, self.device),
            pin=comfy.model_management.pin_memory,
            unpin=comfy.model_management.unpin_memory,
            between=comfy.model_management.throw_exception_if_processing_interrupted,
            advance=partial(progress.update, 1),
        )
        return StripDecoder(decoder, host, latent).decode()


@contextmanager
def borrowed(layer: torch.nn.Module, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of a layer on x's device and in its dtype, decoded; given back afterwards, also on Cancel."""
    if isinstance(layer, PackedWeight):
        borrow, give_back = partial(layer.borrow_dense, x, x.dtype), layer.give_back
    else:
        borrow = partial(comfy.ops.cast_bias_weight, layer, x, offloadable=True)
        give_back = partial(comfy.ops.uncast_bias_weight, layer)
    weight, bias, token = borrow()
    try:
        yield weight, bias
    finally:
        give_back(weight, bias, token)


def load_vae(path: str) -> GGUFVAE:
    """Load any VAE that the host accepts from a GGUF file. Raises GGUFError kinds.

    The host builds the VAE from decoded weights, so that it sees what it knows; then every layer that it left under
    the file's name takes its blocks back.
    """
    sd, metadata = read_state_dict(path, settings().streaming_loading)
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in sd:
        sd = comfy.diffusers_convert.convert_vae_state_dict(sd)
    dense = {name: decoded(tensor, torch.float32) if is_packed(tensor) else tensor for name, tensor in sd.items()}
    # Audio VAEs keep their sizes in this key.
    config = {"config": metadata["config"]} if isinstance(metadata.get("config"), str) else None
    try:
        vae = comfy.sd.VAE(sd=dense, metadata=config)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise WrongShapeError(f"{Path(path).name}: {error}") from error
    if vae.first_stage_model is None:
        raise UnknownModelError(
            f"{Path(path).name}: holds no VAE that this ComfyUI knows. Its first tensors are {', '.join(list(sd)[:8])};"
            " a diffusion model belongs into the UNet loader, a text encoder into a CLIP loader."
        )
    _refuse_incomplete(path, vae.first_stage_model, sd)
    for name, layer in vae.first_stage_model.named_modules():
        packed = sd.get(f"{name}.weight")
        if is_packed(packed) and isinstance(layer, tuple(PACKABLE)):
            layer.__class__ = packed_class(type(layer))
            blocks = relabel(reshape_packed(packed, tuple(layer.weight.shape)), vae.vae_dtype)
            layer.weight = torch.nn.Parameter(blocks, requires_grad=False)
    vae.__class__ = GGUFVAE
    vae.size = comfy.model_management.module_size(vae.first_stage_model)
    vae.patcher.size = vae.size
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path,))
    vae.patcher = adopt(vae.patcher, VAE)
    return vae


def _refuse_incomplete(path: str, model: torch.nn.Module, sd: dict[str, torch.Tensor]) -> None:
    """Raise IncompleteModelError if a part that the file has (encoder, decoder) lacks a tensor: the host only warns."""
    parts = {name.partition(".")[0] for name in sd}
    wanted = [name for name, _ in model.named_parameters() if name.partition(".")[0] in parts]
    if missing := [name for name in wanted if name not in sd]:
        raise IncompleteModelError(
            f"{Path(path).name}: lacks {len(missing)} of the {len(wanted)} tensors of its VAE: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Download or convert it again."
        )


@cache
def packed_class(kind: type) -> type:
    """The host's layer class `kind` with a packed weight; a VAE's own kind of convolution keeps its forward."""
    ours = next(ours for host, ours in PACKABLE.items() if issubclass(kind, host))
    return ours if kind.__module__ == comfy.ops.__name__ else type(kind.__name__, (ours, kind), {})


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The patcher of a freshly loaded VAE: what the host calls to clone one for another device.

    As with the host's own, whether it is dynamic is not for the caller to say.
    """
    return load_vae(path).patcher
