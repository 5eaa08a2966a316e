"""When the forward of a diffusion model may be recorded as a CUDA graph: what of that only the host knows."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.cli_args
import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP
from comfy_aimdo.model_vbar import vbar_fault, vbar_signature_compare, vbar_unpin

from ..config import settings
from ..ops.graph import ForwardGraphs
from ..ops.matmul import Workspace
from .packed_layers import packed_layers
from .residency import ATTACHMENT

# Of `transformer_options`, what changes from call to call and no model reads.
UNREAD = ("wrappers", "callbacks", "uuids")


def record_forwards(patcher, workspace: Workspace) -> None:
    """Have a patcher's diffusion model, and those of its clones, replay their forwards where that is faster."""
    model = patcher.model
    if not settings().enable_cuda_graph or patcher.load_device.type != "cuda" or torch.version.hip is not None:
        return
    # Weak: a model that holds what holds it would stay until the garbage collector comes.
    the_model = weakref.ref(model)
    model.diffusion_model.gguf_native_graphs = ForwardGraphs(
        workspace, lambda x, options: why_not(the_model(), x, options), lambda: held_weights(the_model())
    )
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ATTACHMENT, replaying)


def replaying(executor, *args, **kwargs):
    """The host's wrapper around a forward."""
    graphs = None if torch.compiler.is_compiling() else graphs_of(executor.class_obj)
    options = options_of(args, kwargs)
    if graphs is None or options is None or torch.is_grad_enabled():
        return executor(*args, **kwargs)
    unread = {"wrappers": {}} | {key: options[key] for key in UNREAD if key in options}
    # Hooks bring other nodes' wrappers for a part of the prompt: such a forward is none of those without.
    read = {key: value for key, value in options.items() if key not in UNREAD} | {"wrappers": other_wrappers(options)}
    args = [read if value is options else value for value in args]
    kwargs = {key: read if value is options else value for key, value in kwargs.items()}

    def run(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if is_options(value):
                value.update(unread)
        return executor(*args, **kwargs)

    return graphs.forward(run, args, kwargs, options)


def graphs_of(diffusion_model: torch.nn.Module) -> ForwardGraphs | None:
    return getattr(diffusion_model, "gguf_native_graphs", None)


def forget_graphs(model: torch.nn.Module) -> None:
    """Because a weight or what is computed beside it moves or changes."""
    graphs = graphs_of(getattr(model, "diffusion_model", None))
    if graphs is not None:
        graphs.reset()


def is_options(value: object) -> bool:
    return isinstance(value, dict) and "cond_or_uncond" in value


def options_of(args: tuple, kwargs: dict) -> dict | None:
    """The host's `transformer_options` among the arguments of a forward."""
    return next((value for value in (*args, *kwargs.values()) if is_options(value)), None)


def other_wrappers(options: dict) -> list[str]:
    """The keys under which others than this pack work around each forward."""
    return [str(key) for key in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}) if key != ATTACHMENT]


def why_not(model: torch.nn.Module, x: torch.Tensor, options: dict) -> str | None:
    """Why the forward may not be recorded now, or None."""
    # Not the one that the loader chose: the host has a copy for each GPU, and a node to choose another.
    device = model.device
    if not getattr(comfy.cli_args.args, "disable_comfy_compiler", True):
        return "ComfyUI records graphs itself"
    if not hasattr(torch._C, "_cuda_endAllocateToPool"):
        return "torch is older than 2.8"
    if others := other_wrappers(options):
        return f"another node works around each forward ({', '.join(others)})"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "another node watches the model's layers"
    patcher, layers = model.current_patcher, packed_layers(model).values()
    if patcher is not None and (patcher.hook_patches or patcher.forced_hooks):
        return "hooks change weights while the model samples"
    if any(layer.side_path is not None and layer.side_path.rewrite is not None for layer in layers):
        return "adapters without a low-rank form rebuild weights at every use"
    paged = [module for module in model.modules() if hasattr(module, "_v")]
    resident = all(layer.weight._qdata.device == device for layer in layers if not hasattr(layer, "_v"))
    if not resident or not all(map(is_resident, paged)):
        return "weights stream"
    free, held_by_torch = mm.get_free_memory(device, torch_free_too=True)
    missing = int(model.memory_required(list(x.shape)) + mm.minimum_inference_memory() - (free - held_by_torch))
    return f"{missing >> 20} MB more would have to be free" if missing > 0 else None


def is_resident(module: torch.nn.Module) -> bool:
    """Whether DynamicVRAM has kept what a module's weight was sent to; one that streams is not asked for."""
    if module._v_signature is None:
        return False
    signature = vbar_fault(module._v)
    if signature is not None:
        vbar_unpin(module._v)
    return vbar_signature_compare(signature, module._v_signature)


@contextmanager
def held_weights(model: torch.nn.Module) -> Iterator[object]:
    """See `ForwardGraphs`. DynamicVRAM gives pages back and tells by their signature; the legacy patcher tells us."""
    vbar = getattr(model, "dynamic_vbars", {}).get(model.device)
    if vbar is None:
        yield None
        return
    everything = vbar, vbar.base_addr, vbar.offset
    signature = vbar_fault(everything)
    try:
        # What has no room is like nothing that was recorded.
        yield object() if signature is None else bytes(signature)
    finally:
        if signature is not None:
            vbar_unpin(everything)
