"""The host's model patchers, taught that a packed weight is patched beside, never in place."""

import logging
from functools import cache
from typing import NamedTuple

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from ..config import settings
from ..ops.cache import DecodedCache
from ..ops.layers import GGUFOps, PackedWeight
from ..ops.lora import n_loras, side_path
from ..ops.matmul import Workspace
from . import residency
from .file_streaming import parts_viewed, send_once, stop_streaming, stream_from_files, unpin_parts
from .graphs import forget_graphs, record_forwards
from .load_order import spread
from .out_of_memory import retry_forwards
from .packed_layers import block_layers, cache_of, packed_layer, packed_layers, unpatched_slots
from .residency import ATTACHMENT, DIFFUSION

log = logging.getLogger("gguf_native")
told = set()  # What is said once for the process

# The kinds of pinned memory that the host's functions take by default.
EVERY_PIN = ("weights-loaded", "patches-loaded", "weights", "patches")


class Backup(NamedTuple):
    """What the host keeps in `backup` to put a weight back."""

    weight: torch.Tensor
    inplace_update: bool


class PackedPatching:
    """What both patchers share. A patch of a packed weight goes to its layer's `side_path`, in every memory mode."""

    def load(self, device_to=None, *args, **kwargs):
        super().load(device_to, *args, **kwargs)
        hand_over(self, device_to)

    def partially_load(self, device_to, *args, **kwargs):
        residency.make_room(self)
        # Nobody tells a text encoder or a VAE that it is done.
        for patcher in residency.idle_beside(self):
            stop_streaming(patcher.model)
        return super().partially_load(device_to, *args, **kwargs)

    def loaded_size(self):
        cache = cache_of(self.model)
        return super().loaded_size() + (cache.nbytes if cache is not None else 0)

    def partially_unload(self, device_to, memory_to_free=0, *args, **kwargs):
        """Decoded weights leave before packed ones: they only save time."""
        forget_graphs(self.model)
        stop_streaming(self.model)
        cache = cache_of(self.model)
        given_up = cache.give_up() if cache is not None else 0
        if given_up >= memory_to_free:
            return given_up
        return given_up + super().partially_unload(device_to, memory_to_free - given_up, *args, **kwargs)

    def detach(self, unpatch_all=True):
        forget_graphs(self.model)
        model = super().detach(unpatch_all)
        if unpatch_all:
            for layer in packed_layers(self.model).values():
                layer.side_path = None
                layer.workspace.release()
            move_choices(self.model, self.offload_device)
            # The loader's result, which ComfyUI keeps, may be used again: then they come from the system's cache.
            for part in parts_viewed(self.model):
                part.give_pages_back()
        return model

    def cleanup(self):
        stop_streaming(self.model)
        super().cleanup()
        forget_graphs(self.model)
        # Not the one of `adopt`: a clone without DynamicVRAM has a model of its own.
        for layer in packed_layers(self.model).values():
            layer.workspace.release()
        residency.leave_after_use(self)

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        layer = packed_layer(self.model, key)
        if layer is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight or _is_resized(layer, key, self.patches.get(key, [])):
            # Decoded, with its LoRAs: for saving, and where the model reads its own shape off the weight.
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast=True)
        if force_cast:
            # DynamicVRAM keeps small weights on the device.
            self.backup[key] = Backup(layer.weight, False)
            comfy.utils.set_attr_param(self.model, key, layer.weight.to(device_to))
        return None

    def model_state_dict_for_saving(self, model=None, prefix=""):
        sd = super().model_state_dict_for_saving(model, prefix)
        for key, layer in packed_layers(self.model).items():
            if key.startswith(prefix) and key[len(prefix) :] in sd:
                stand_in = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="meta")
                sd[key[len(prefix) :]] = comfy.model_patcher.LazyCastingParam(self, key, stand_in)
        return sd


# Under the host's own names, because logs and other packs tell the memory mode by them.
class ModelPatcherDynamic(PackedPatching, comfy.model_patcher.ModelPatcherDynamic):
    """DynamicVRAM: pages weights in from the file by itself."""

    def load(self, device_to=None, *args, **kwargs):
        slots = unpatched_slots(self.model)
        super().load(device_to, *args, **kwargs)
        stream_from_files(self.model, device_to)
        # Where patches differ from the last load the host has every slot filled anew, to patch what is in it.
        for layer in slots.keys() & unpatched_slots(self.model).keys():
            layer._v_signature = slots[layer]

    def _load_list(self, for_dynamic=False, default_device=None):
        loading = super()._load_list(for_dynamic, default_device)
        return spread(loading) if for_dynamic else loading

    def partially_unload_ram(self, ram_to_unload, subsets=EVERY_PIN):
        return self._pages_first(super().partially_unload_ram, ram_to_unload, subsets)

    def unregister_inactive_pins(self, ram_to_unload, subsets=EVERY_PIN):
        return self._pages_first(super().unregister_inactive_pins, ram_to_unload, subsets)

    def _pages_first(self, free_others, n_bytes, subsets):
        """Free a file's pages, which the system or the disk has anyway, and only then what the host would; bytes."""
        freed = unpin_parts(self.model) if "weights" in subsets else 0
        return freed if freed >= n_bytes else freed + free_others(n_bytes - freed, subsets)


class ModelPatcher(PackedPatching, comfy.model_patcher.ModelPatcher):
    """The legacy path: CPU, WSL, AMD, `--disable-dynamic-vram`, and clones for torch.compile and hooks."""

    def partially_load(self, device_to, *args, **kwargs):
        if self.model.current_weight_patches_uuid not in (None, self.patches_uuid):
            # The host would move the whole model off the device and back, to patch it anew.
            if all_beside(self):
                self.model.current_weight_patches_uuid = self.patches_uuid
            else:
                log_loading_anew()
        n_bytes = super().partially_load(device_to, *args, **kwargs)
        # Where the model lies on the device already the host calls no `load`.
        hand_over(self, device_to)
        return n_bytes

    def load(self, device_to=None, *args, **kwargs):
        super().load(device_to, *args, **kwargs)
        for layer in packed_layers(self.model).values():
            if isinstance(layer, GGUFOps.Linear):
                layer.prepare(self.load_device)

    def partially_unload(self, device_to, *args, **kwargs):
        freed = super().partially_unload(device_to, *args, **kwargs)
        hand_over(self, self.load_device)
        return freed

    def patch_hooks(self, hooks):
        super().patch_hooks(hooks)
        if hooks is not None:
            hand_over(self, self.load_device)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *args, **kwargs):
        if packed_layer(self.model, key) is None:
            self._make_writable(key)
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def patch_cached_hook_weights(self, cached_weights, key, *args, **kwargs):
        # When models leave while sampling, what hooks had written to may view its file again.
        self._make_writable(key)
        super().patch_cached_hook_weights(cached_weights, key, *args, **kwargs)

    def _make_writable(self, key: str) -> None:
        """Before the host writes into a weight, which may be a read-only view of a file."""
        # What is pinned must not go before it is unpinned: later copies from its addresses would fail.
        self.unpin_weight(key)
        weight = comfy.utils.get_attr(self.model, key)
        weight.data = weight.data.clone()

    def unpatch_hooks(self, whitelist_keys_set=None):
        was_hooked = self.current_hooks is not None
        super().unpatch_hooks(whitelist_keys_set)
        # Only then: a clone that is not loaded shares these layers with the one that is.
        if was_hooked:
            hand_over(self, self.load_device)


def adopt(
    patcher, role: str, patch_dtype: torch.dtype | None = None, patch_on_device: bool = False, compute: str = "exact"
):
    """Give a patcher that the host made, and every clone of it, the patching of packed weights.

    role: DIFFUSION, TEXT or VAE of residency. patch_dtype: of the LoRA arithmetic, None for the model's compute dtype.
    patch_on_device: keep adapters without a low-rank form on the GPU instead of sending them for every use.
    compute: of compute.COMPUTE, for the layers of the model's repeated blocks; all others compute exactly.
    """
    cache = DecodedCache(settings().quant_cache_size << 20, room_for_decoded) if role == DIFFUSION else None
    workspace = Workspace(cache=cache)
    for layer in packed_layers(patcher.model).values():
        layer.workspace = workspace
    for layer in block_layers(patcher.model):
        layer.compute = compute
    patcher.set_attachments(ATTACHMENT, {"role": role, "patch_dtype": patch_dtype, "patch_on_device": patch_on_device})
    if role == DIFFUSION:
        retry_forwards(patcher)
        send_once(patcher)
        record_forwards(patcher, workspace)
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLONE, ATTACHMENT, _adopt_clone)
    return _adopt_clone(None, patcher)


def _adopt_clone(_, patcher):
    patcher.__class__ = ModelPatcherDynamic if patcher.is_dynamic() else ModelPatcher
    return patcher


def room_for_decoded(device: torch.device) -> int:
    """Bytes that neither the host's reserve for sampling needs nor torch holds for the activations of the next step."""
    free, held_by_torch = mm.get_free_memory(device, torch_free_too=True)
    # Of system memory the host gives the same number twice.
    taken = 0 if mm.is_device_cpu(device) or mm.is_device_mps(device) else held_by_torch
    return int(free - taken - mm.minimum_inference_memory())


def all_beside(patcher) -> bool:
    """Whether all patches, those of the last load and those of this patcher, are side paths of packed weights."""
    packed = packed_layers(patcher.model)
    functions = (getattr(module, "weight_function", ()) for module in patcher.model.modules())
    functions_of_biases = (getattr(module, "bias_function", ()) for module in patcher.model.modules())
    changed = patcher.backup or patcher.hook_backup or patcher.weight_wrapper_patches
    if changed or any(functions) or any(functions_of_biases):
        return False
    return all(key in packed and not _is_resized(packed[key], key, of) for key, of in patcher.patches.items())


def move_choices(model: torch.nn.Module, device: torch.device) -> None:
    """What layers have chosen to compute with outlives their time on a GPU: its scales go with them."""
    for layer in model.modules():
        if isinstance(layer, GGUFOps.Linear) and layer.chosen is not None:
            layer.chosen = layer.chosen.on(device)


def hand_over(patcher, device: torch.device) -> None:
    """Take the patches of packed weights from where the host put them to the layers' side paths."""
    forget_graphs(patcher.model)
    rebuilt = []
    of_hooks = patcher.get_combined_hook_patches(patcher.current_hooks)
    move_choices(patcher.model, device)
    for key, layer in packed_layers(patcher.model).items():
        layer.weight_lowvram_function = None
        layer.weight_function = [f for f in layer.weight_function if not getattr(f, "is_lowvram_patch", False)]
        patches = patcher.patches.get(key, []) + of_hooks.get(key, [])
        dtype = _patch_dtype(patcher, layer)
        if layer.side_path is None or not layer.side_path.is_of(patches, device, dtype):
            layer.side_path = _side_path(patcher, layer, key, patches, device, dtype)
            rebuilt += [layer.side_path] if patches else []
    n_rewritten = sum(path.rewrite is not None for path in rebuilt)
    if n_rewritten:
        log_slow_patches(n_rewritten)
    n_most = max((n_loras(path.patches) for path in rebuilt), default=0)
    if n_most > settings().max_loras:
        log_many_loras(n_most, packed_layers(patcher.model))


@cache
def log_slow_patches(n_weights: int) -> None:
    log.info(
        "GGUF Native: the adapters of %d weights have no low-rank form (LoHa, LoKr, DoRA, ...): "
        "these weights are rebuilt at every use, which is slower.",
        n_weights,
    )


@cache
def log_loading_anew() -> None:
    log.info(
        "GGUF Native: a LoRA or another patch changes more than quantised weights: without DynamicVRAM every change of "
        "it loads the whole model anew, which is slower."
    )


def log_many_loras(n_most: int, layers: dict[str, PackedWeight]) -> None:
    """Once for the process; the cost is that of the layers' multiplications, and of the memory of the factors."""
    if log_many_loras in told:
        return
    told.add(log_many_loras)
    factors = [layer.side_path.low_rank for layer in layers.values() if layer.side_path and layer.side_path.low_rank]
    values = sum(low_rank.down.numel() + low_rank.up.numel() for low_rank in factors)
    n_bytes = sum(low_rank.down.nbytes + low_rank.up.nbytes for low_rank in factors)
    log.warning(
        "GGUF Native: %d LoRAs on one model, more than max_loras, which is %d. They are all applied. Each adds to the "
        "work of the layers that it changes and stays in memory beside them: now %.1f %% more multiplications in the "
        "model's layers and %.1f MB.",
        n_most,
        settings().max_loras,
        100 * values / sum(layer.weight.numel() for layer in layers.values()),
        n_bytes / 2**20,
    )


def _is_resized(layer: PackedWeight, key: str, patches: list) -> bool:
    return tuple(comfy.lora.calculate_shape(patches, layer.weight, key)) != tuple(layer.weight.shape)


def _patch_dtype(patcher, layer: PackedWeight) -> torch.dtype:
    compute_dtype = getattr(patcher.model, "manual_cast_dtype", None) or layer.weight.dtype
    return patcher.get_attachment(ATTACHMENT)["patch_dtype"] or compute_dtype


def _side_path(patcher, layer: PackedWeight, key: str, patches: list, device: torch.device, dtype: torch.dtype):
    if not patches:
        return None
    on_device = patcher.get_attachment(ATTACHMENT)["patch_on_device"]
    return side_path(patches, key, tuple(layer.weight.shape), device, dtype, on_device, layer.side_path)
