"""GGUFOps: ComfyUI's layers, with weights that may be GGUF blocks; handed to the host as `custom_operations`."""

import comfy.ops
import torch
import torch.nn.functional as F
from comfy_aimdo.model_vbar import vbar_fault, vbar_signature_compare, vbar_unpin

from .compute import EXACT, METHODS, Chosen, choose, log_exact, prepare
from .layout import is_packed, relabel, reshape_packed
from .lora import SidePath
from .low_rank import LowRank
from .matmul import MAX_FEW_ROWS, Workspace, decode_weight, few_rows_limit, gather_rows, linear, linear_few_rows
from .streaming import Sent, Streamer

HOST = comfy.ops.manual_cast


class WeightShapeError(ValueError):
    """A tensor of the file cannot be the weight that the model wants."""


class PackedWeight:
    """What every layer with a packed weight shares: how it is loaded, moved, patched, saved and read in a forward.

    A layer whose weight is a plain tensor behaves as the host's own `manual_cast` layer does.
    """

    side_path: SidePath | None = None
    workspace: Workspace | None = None
    # What brings the weight from its file under DynamicVRAM; None where that is left to the host.
    streamer: Streamer | None = None
    # A dtype that decoded weights are rounded to before the compute dtype; None for straight to the compute dtype.
    decode_dtype: torch.dtype | None = None
    # Parameters that the state dict lacked.
    missing: tuple[str, ...] = ()

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters without which the layer cannot work, and their shapes by its own arguments."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items() if parameter is not None}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        # Assigned, never copied: a packed weight stays the view of the file that the loader made.
        given = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        shapes = self.expected_shapes()
        self.missing = tuple(name for name in shapes if name not in given)
        missing_keys += [prefix + name for name in self.missing]
        unexpected_keys += [prefix + name for name in given if name not in shapes]
        for name, shape in shapes.items():
            if name not in given:
                continue
            tensor = _as_shape(given[name], shape, prefix + name)
            dtype = getattr(self, f"{name}_comfy_model_dtype", None) or tensor.dtype
            if is_packed(tensor):
                tensor = relabel(tensor, dtype)
            # Under DynamicVRAM a plain one is cast on its way to the GPU.
            elif not local_metadata.get("assign_to_params_buffers", False):
                tensor = tensor.to(dtype)
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not is_packed(self.weight):
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        # The host sums `nbytes` of these to know what a layer costs: packed bytes, not values.
        destination[prefix + "weight"] = self.weight._qdata
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _apply(self, fn, recurse=True):
        # These layers have neither children nor buffers. What `.to()` leaves in place stays as it is: outside inference
        # mode, where the server unloads, the host's `_quantized_apply` copies it, and every view of a file becomes RAM.
        moved = {name: fn(tensor) for name, tensor in self._parameters.items() if tensor is not None}
        for name, tensor in moved.items():
            if tensor is not self._parameters[name]:
                self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return self

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The host's hook: what it may compute on when it merges or saves a weight."""
        return decode_weight(weight, weight.dtype) if is_packed(weight) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """The host's hook for a weight it computed: kept dense, because blocks are never quantised again."""
        weight = weight.to(self.weight.dtype)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def borrow(self, x: torch.Tensor):
        """(weight, bias, token) on x's device, the weight still packed; give all three to `give_back`."""
        if not self.weight_function and not self.bias_function:
            is_sent = self.streamer is not None and self in self.streamer.sent
            here = (None if is_sent else self._borrow_resident(x) or self._borrow_here(x)) or self._borrow_streamed(x)
            if here is not None:
                weight, bias, token = here
                if bias is None or bias.dtype == x.dtype:
                    return here
                try:
                    return weight, bias.to(x.dtype), token
                except BaseException:
                    self.give_back(*here)
                    raise
        return comfy.ops.cast_bias_weight(
            self,
            None,
            dtype=self.weight.dtype,
            device=x.device,
            bias_dtype=x.dtype,
            offloadable=True,
            compute_dtype=x.dtype,
            want_requant=True,
        )

    def _borrow_here(self, x: torch.Tensor):
        """As `borrow` where the layer's own tensors lie on x's device, else None."""
        weight, bias = self._parameters["weight"], self._parameters.get("bias")
        # A packed weight is asked through its bytes: a property of a tensor subclass takes microseconds.
        held = weight._qdata if is_packed(weight) else weight
        if held.device == x.device and (bias is None or bias.device == x.device):
            return weight, bias, None
        return None

    def _borrow_resident(self, x: torch.Tensor):
        """As `borrow` where DynamicVRAM has kept the weight on the GPU since its last use, else None.

        What `cast_bias_weight` does for such a weight, without its preparations for one that must be fetched.
        """
        if torch.compiler.is_compiling():
            return None
        state = self.__dict__
        if state.get("_v_signature") is None or "_prefetch" in state or not x.is_cuda:
            return None
        signature = vbar_fault(self._v)
        if vbar_signature_compare(signature, self._v_signature):
            return self._v_weight, self._v_bias, (None, x.device, None)
        if signature is not None:
            vbar_unpin(self._v)
        return None

    def _borrow_streamed(self, x: torch.Tensor):
        """As `borrow` where the model's streamer brings the weight, else None."""
        if self.streamer is None or not x.is_cuda or torch.compiler.is_compiling():
            return None
        # A patched bias is the host's affair.
        if getattr(self, "bias_lowvram_function", None) is not None:
            return None
        sent = self.streamer.borrow(self)
        return None if sent is None else (sent.weight, sent.bias, sent)

    def give_back(self, weight: torch.Tensor, bias: torch.Tensor | None, token) -> None:
        """After the last use of what `borrow` gave."""
        if isinstance(token, Sent):
            # The layer itself may have lost it meanwhile, to a system that needs the memory.
            token.streamer.give_back(token)
        else:
            comfy.ops.uncast_bias_weight(self, weight, bias, token)

    def borrow_dense(self, x: torch.Tensor, dtype: torch.dtype):
        """As `borrow`, but the weight decoded to `dtype`, and patched unless the patches are low-rank factors."""
        borrowed = weight, bias, token = self.borrow(x)
        try:
            # A host or third-party weight function has had the weight decoded already.
            if is_packed(weight):
                weight = decode_weight(weight, self.decode_dtype or dtype, self.workspace)
            weight = weight.to(dtype)
            if self.side_path is not None and self.side_path.rewrite is not None:
                weight = self.side_path.rewrite(weight)
        except BaseException:
            self.give_back(*borrowed)
            raise
        return weight, bias, token


def _as_shape(tensor: torch.Tensor, shape: tuple[int, ...], key: str) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    if tensor.numel() != torch.Size(shape).numel():
        raise WeightShapeError(
            f"tensor '{key}' has shape {list(tensor.shape)}; the model needs {list(shape)}. "
            "The file is of another model or version, or its converter lost the shape."
        )
    return reshape_packed(tensor, shape) if is_packed(tensor) else tensor.reshape(shape)


def _plus(low_rank: LowRank | None, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if low_rank is None else low_rank.add_to(y, x)


class PackedConv(PackedWeight):
    """A convolution decodes its weight once per call."""

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        if not is_packed(self.weight):
            return super().forward_comfy_cast_weights(input, *args, **kwargs)
        weight, bias, token = self.borrow_dense(input, input.dtype)
        try:
            return self._conv_forward(input, weight, bias, *args, **kwargs)
        finally:
            self.give_back(weight, bias, token)


class GGUFOps(HOST):
    """The host's `manual_cast` namespace; norms are there to be checked, a file never packs them usefully."""

    class Linear(PackedWeight, HOST.Linear):
        compute: str = "exact"  # one of compute.COMPUTE
        chosen: Chosen | None = None  # what that came to; None until the first inputs are seen

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            # No storage is reserved for a dense weight that never comes.
            torch.nn.Module.__init__(self)
            self.in_features = in_features
            self.out_features = out_features
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
            self.shapes = {"weight": (out_features, in_features)} | ({"bias": (out_features,)} if bias else {})
            self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype

        def expected_shapes(self):
            return self.shapes

        def _load_from_state_dict(self, state_dict, prefix, *args):
            if prefix + "comfy_quant" in state_dict:
                self._become_host_quantised()
                return self._load_from_state_dict(state_dict, prefix, *args)
            return super()._load_from_state_dict(state_dict, prefix, *args)

        def prepare(self, device: torch.device) -> None:
            """Choose what to compute with on `device` before the first inputs: torch.compile records no choice."""
            if self.compute in METHODS and self.chosen is None and self.decode_dtype is None:
                self.chosen = prepare(self.compute, self.weight.to(device))

        def _become_host_quantised(self):
            # A safetensors encoder beside a GGUF one may be in a format of the host's (scaled fp8): the host's affair.
            dtype = self.weight_comfy_model_dtype
            layer_class = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True).Linear
            twin = layer_class(self.in_features, self.out_features, "bias" in self.shapes, dtype=dtype)
            self.__class__, self.__dict__ = layer_class, twin.__dict__

        def _multiply(
            self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low_rank: LowRank | None
        ) -> torch.Tensor:
            """x W^T + bias with the LoRAs: where W is decoded to the dtype of x, they join it."""
            if (
                low_rank is not None
                and (self.compute == "exact" or self.chosen is EXACT)
                and not torch.compiler.is_compiling()
                and not torch.is_grad_enabled()
                and is_packed(weight)
                and x.numel() // x.shape[-1] > MAX_FEW_ROWS
                and low_rank.joins(weight, x.dtype)
            ):
                return linear(x, weight, bias, self.workspace, low_rank)
            return _plus(low_rank, self._product(x, weight, bias), x)

        def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if not is_packed(weight):
                # A host or third-party weight function has had the weight decoded.
                return F.linear(x, weight.to(x.dtype), bias)
            if torch.is_grad_enabled() and x.requires_grad:
                # The other products have no backward.
                return linear(x, weight, bias, None)
            n_rows = x.numel() // x.shape[-1]
            if 0 < n_rows <= MAX_FEW_ROWS and n_rows <= few_rows_limit(weight):
                return linear_few_rows(x, weight, bias)
            if self.compute == "exact":
                return linear(x, weight, bias, self.workspace)
            if x.dtype == torch.float32:
                if x.is_cuda and not torch.compiler.is_compiling():
                    log_exact(self.compute, "the model computes in float32")
                return linear(x, weight, bias, self.workspace)
            if self.chosen is None and not torch.compiler.is_compiling():
                self.chosen = choose(self.compute, weight, x, self.workspace)
            chosen = self.chosen or EXACT
            if n_rows < chosen.min_rows:
                return linear(x, weight, bias, self.workspace)
            return chosen.linear(x, weight, bias, self.workspace)

        def forward_comfy_cast_weights(self, input):
            if not is_packed(self._parameters["weight"]):
                return super().forward_comfy_cast_weights(input)
            side_path = self.side_path
            low_rank = None if side_path is None else side_path.low_rank
            if self.decode_dtype is not None or (side_path is not None and side_path.rewrite is not None):
                weight, bias, token = self.borrow_dense(input, input.dtype)
            else:
                weight, bias, token = self.borrow(input)
            try:
                return self._multiply(input, weight, bias, low_rank)
            finally:
                self.give_back(weight, bias, token)

    class Conv1d(PackedConv, HOST.Conv1d):
        pass

    class Conv2d(PackedConv, HOST.Conv2d):
        pass

    class Conv3d(PackedConv, HOST.Conv3d):
        pass

    class ConvTranspose1d(PackedConv, HOST.ConvTranspose1d):
        def _conv_forward(self, input, weight, bias, output_size=None):
            padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 1, self.dilation
            )
            return F.conv_transpose1d(
                input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
            )

    class ConvTranspose2d(PackedConv, HOST.ConvTranspose2d):
        def _conv_forward(self, input, weight, bias, output_size=None):
            padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
            return F.conv_transpose2d(
                input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
            )

    class Embedding(PackedWeight, HOST.Embedding):
        def expected_shapes(self):
            return {"weight": (self.num_embeddings, self.embedding_dim)}

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            if not is_packed(self.weight):
                return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
            dtype = out_dtype or self.weight.dtype
            weight, bias, token = self.borrow(input) if self.side_path is None else self.borrow_dense(input, dtype)
            try:
                if self.side_path is None:
                    return gather_rows(weight, input, dtype)
                out = F.embedding(input, weight)
                if self.side_path.low_rank is not None:
                    out += self.side_path.low_rank.rows(input).to(dtype)
                return out
            finally:
                self.give_back(weight, bias, token)

    class LayerNorm(PackedWeight, HOST.LayerNorm):
        pass

    class RMSNorm(PackedWeight, HOST.RMSNorm):
        pass

    class GroupNorm(PackedWeight, HOST.GroupNorm):
        pass
