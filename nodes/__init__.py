"""The pack's nodes, in menu order, and how they join ComfyUI."""

import logging

import comfy.model_management
from comfy_api.latest import ComfyExtension, io

import nodes as host_nodes

from ..ops.dequantize import prepare_kernels
from . import folders
from .apply_lora import LoraLoaderGGUF
from .collect_importance import GGUFCollectImportance
from .load_diffusion_model import UnetLoaderGGUF, UnetLoaderGGUFAdvanced
from .load_text_encoder import CLIPLoaderGGUF, DualCLIPLoaderGGUF, QuadrupleCLIPLoaderGGUF, TripleCLIPLoaderGGUF
from .load_vae import VAELoaderGGUF
from .quantize import GGUFQuantize
from .recommend import GGUFRecommend

log = logging.getLogger("gguf_native")

NODES: list[type[io.ComfyNode]] = [
    UnetLoaderGGUF,
    UnetLoaderGGUFAdvanced,
    CLIPLoaderGGUF,
    DualCLIPLoaderGGUF,
    TripleCLIPLoaderGGUF,
    QuadrupleCLIPLoaderGGUF,
    VAELoaderGGUF,
    LoraLoaderGGUF,
    GGUFQuantize,
    GGUFCollectImportance,
    GGUFRecommend,
]


class GGUFExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()
        prepare_kernels(comfy.model_management.get_torch_device())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """NODES, less those whose id another pack registered before."""
        taken = [node for node in NODES if node.GET_SCHEMA().node_id in host_nodes.NODE_CLASS_MAPPINGS]
        if taken:
            log.info(
                "GGUF Native: another pack already has the nodes %s; theirs stay, ours of that name are left out.",
                ", ".join(node.__name__ for node in taken),
            )
        return [node for node in NODES if node not in taken]
