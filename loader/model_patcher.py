"""The host's model patchers, taught that a packed weight is patched beside, never in place."""

import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from ..ops.layers import PackedWeight
from ..ops.layout import is_packed
from ..ops.lora import side_path
from . import residency

ATTACHMENT = "gguf_native"


class PackedPatching:
    """What both patchers share. A patch of a packed weight goes to its layer's `side_path`, in every memory mode."""

    def load(self, device_to=None, *args, **kwargs):
        super().load(device_to, *args, **kwargs)
        hand_over(self, device_to)

    def partially_load(self, device_to, *args, **kwargs):
        residency.make_room(self)
        return super().partially_load(device_to, *args, **kwargs)

    def detach(self, unpatch_all=True):
        if unpatch_all:
            for layer in packed_layers(self.model).values():
                layer.side_path = None
        return super().detach(unpatch_all)

    def cleanup(self):
        super().cleanup()
        residency.leave_after_use(self)

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        if packed_layer(self.model, key) is not None and not force_cast:
            if not return_weight:
                return None
            force_cast = True  # for saving: decoded, with its LoRAs
        return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        sd = super().model_state_dict_for_saving(model, prefix)
        for key, layer in packed_layers(self.model).items():
            if key.startswith(prefix) and key[len(prefix) :] in sd:
                stand_in = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="meta")
                sd[key[len(prefix) :]] = comfy.model_patcher.LazyCastingParam(self, key, stand_in)
        return sd


class GGUFModelPatcherDynamic(PackedPatching, comfy.model_patcher.ModelPatcherDynamic):
    """DynamicVRAM: pages weights in from the file by itself."""


class GGUFModelPatcher(PackedPatching, comfy.model_patcher.ModelPatcher):
    """The legacy path: CPU, WSL, AMD, `--disable-dynamic-vram`, and clones for torch.compile and hooks."""

    def partially_unload(self, device_to, *args, **kwargs):
        freed = super().partially_unload(device_to, *args, **kwargs)
        hand_over(self, self.load_device)
        return freed

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        layer = packed_layer(self.model, key)
        if layer is None:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        patches = self.patches.get(key, []) + combined_patches.get(key, [])
        layer.side_path = _side_path(self, layer, key, patches, self.load_device)

    def unpatch_hooks(self, whitelist_keys_set=None):
        super().unpatch_hooks(whitelist_keys_set)
        hand_over(self, self.load_device)


def adopt(patcher, role: str, patch_dtype: torch.dtype | None = None, patch_on_device: bool = False):
    """Give a patcher that the host made, and every clone of it, the patching of packed weights.

    role: a row of residency.ROLES. patch_dtype: of the LoRA arithmetic, None for the model's compute dtype.
    patch_on_device: keep adapters without a low-rank form on the GPU instead of sending them for every use.
    """
    patcher.set_attachments(
        ATTACHMENT, {"role": role, "patch_dtype": patch_dtype, "patch_on_device": patch_on_device}
    )
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLONE, ATTACHMENT, _adopt_clone)
    return _adopt_clone(None, patcher)


def _adopt_clone(_, patcher):
    patcher.__class__ = GGUFModelPatcherDynamic if patcher.is_dynamic() else GGUFModelPatcher
    return patcher


def packed_layer(model: torch.nn.Module, key: str) -> PackedWeight | None:
    """The layer whose packed weight has this key in the model, if there is one."""
    name, _, parameter = key.rpartition(".")
    layer = comfy.utils.get_attr(model, name) if parameter == "weight" else None
    return layer if isinstance(layer, PackedWeight) and is_packed(layer.weight) else None


def packed_layers(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """All layers whose weight is packed, by the weight's key in the model."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight) and is_packed(module.weight)
    }


def hand_over(patcher, device: torch.device) -> None:
    """Take the patches of packed weights from where the host put them to the layers' side paths."""
    for key, layer in packed_layers(patcher.model).items():
        layer.weight_lowvram_function = None
        layer.weight_function = [f for f in layer.weight_function if not getattr(f, "is_lowvram_patch", False)]
        patches = patcher.patches.get(key, [])
        if layer.side_path is None or not layer.side_path.is_of(patches, device):
            layer.side_path = _side_path(patcher, layer, key, patches, device)


def _side_path(patcher, layer: PackedWeight, key: str, patches: list, device: torch.device):
    if not patches:
        return None
    options = patcher.get_attachment(ATTACHMENT)
    compute_dtype = getattr(patcher.model, "manual_cast_dtype", None) or layer.weight.dtype
    dtype = options["patch_dtype"] or compute_dtype
    return side_path(patches, key, tuple(layer.weight.shape), device, dtype, options["patch_on_device"])
