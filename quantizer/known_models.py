"""Full-size diffusion models for `recommend`: their weights, the work of a step, the memory beside the weights.

Weights and work were counted on ComfyUI's own classes without data; work is additions and multiplications, attention
included. `memory_factor` is ComfyUI's own (memory_usage_factor).
"""

import math
from typing import NamedTuple


class Weight(NamedTuple):
    """So many weights of this shape; `{}` in the name is the number of each."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def values(self) -> int:
        return math.prod(self.shape) * self.count

    def names(self) -> list[str]:
        return [self.name.format(number) for number in range(self.count)]


class KnownModel(NamedTuple):
    """`values` counts all parameters; those not in `weights` are small tensors, which are not quantised. The two
    streams of a model (picture and text) count as one of twice the depth.

    A step at `at` takes `forwards` forwards of `operations` each, on latents of `latents` points.
    """

    architecture: str
    what: str
    at: str
    values: int
    operations: float
    forwards: int
    latents: int
    memory_factor: float
    weights: tuple[Weight, ...]


FLUX = (
    Weight("double_blocks.{}.img_mod.lin.weight", (18432, 3072), 38),
    Weight("double_blocks.{}.img_attn.qkv.weight", (9216, 3072), 38),
    Weight("double_blocks.{}.img_attn.proj.weight", (3072, 3072), 38),
    Weight("double_blocks.{}.img_mlp.0.weight", (12288, 3072), 38),
    Weight("double_blocks.{}.img_mlp.2.weight", (3072, 12288), 38),
    Weight("single_blocks.{}.linear1.weight", (21504, 3072), 38),
    Weight("single_blocks.{}.linear2.weight", (3072, 15360), 38),
    Weight("single_blocks.{}.modulation.lin.weight", (9216, 3072), 38),
    Weight("txt_in.weight", (3072, 4096), 1),
    Weight("time_in.out_layer.weight", (3072, 3072), 1),
    Weight("vector_in.out_layer.weight", (3072, 3072), 1),
    Weight("guidance_in.out_layer.weight", (3072, 3072), 1),
    Weight("final_layer.adaLN_modulation.1.weight", (6144, 3072), 1),
)
SD3_MEDIUM = (
    Weight("joint_blocks.{}.x_block.attn.qkv.weight", (4608, 1536), 48),
    Weight("joint_blocks.{}.x_block.attn.proj.weight", (1536, 1536), 47),
    Weight("joint_blocks.{}.x_block.mlp.fc1.weight", (6144, 1536), 47),
    Weight("joint_blocks.{}.x_block.mlp.fc2.weight", (1536, 6144), 47),
    Weight("joint_blocks.{}.x_block.adaLN_modulation.1.weight", (9216, 1536), 47),
    Weight("pos_embed", (1, 36864, 1536), 1),
    Weight("context_embedder.weight", (1536, 4096), 1),
)
SD35_LARGE = (
    Weight("joint_blocks.{}.x_block.attn.qkv.weight", (7296, 2432), 76),
    Weight("joint_blocks.{}.x_block.attn.proj.weight", (2432, 2432), 75),
    Weight("joint_blocks.{}.x_block.mlp.fc1.weight", (9728, 2432), 75),
    Weight("joint_blocks.{}.x_block.mlp.fc2.weight", (2432, 9728), 75),
    Weight("joint_blocks.{}.x_block.adaLN_modulation.1.weight", (14592, 2432), 75),
    Weight("pos_embed", (1, 36864, 2432), 1),
    Weight("context_embedder.weight", (2432, 4096), 1),
)
WAN_14B = (
    Weight("blocks.{}.self_attn.q.weight", (5120, 5120), 40),
    Weight("blocks.{}.cross_attn.q.weight", (5120, 5120), 40),
    Weight("blocks.{}.self_attn.k.weight", (5120, 5120), 40),
    Weight("blocks.{}.cross_attn.k.weight", (5120, 5120), 40),
    Weight("blocks.{}.self_attn.v.weight", (5120, 5120), 40),
    Weight("blocks.{}.cross_attn.v.weight", (5120, 5120), 40),
    Weight("blocks.{}.self_attn.o.weight", (5120, 5120), 40),
    Weight("blocks.{}.cross_attn.o.weight", (5120, 5120), 40),
    Weight("blocks.{}.ffn.0.weight", (13824, 5120), 40),
    Weight("blocks.{}.ffn.2.weight", (5120, 13824), 40),
    Weight("time_projection.1.weight", (30720, 5120), 1),
    Weight("text_embedding.0.weight", (5120, 4096), 1),
    Weight("text_embedding.2.weight", (5120, 5120), 1),
    Weight("time_embedding.2.weight", (5120, 5120), 1),
)
WAN_1_3B = (
    Weight("blocks.{}.self_attn.q.weight", (1536, 1536), 30),
    Weight("blocks.{}.cross_attn.q.weight", (1536, 1536), 30),
    Weight("blocks.{}.self_attn.k.weight", (1536, 1536), 30),
    Weight("blocks.{}.cross_attn.k.weight", (1536, 1536), 30),
    Weight("blocks.{}.self_attn.v.weight", (1536, 1536), 30),
    Weight("blocks.{}.cross_attn.v.weight", (1536, 1536), 30),
    Weight("blocks.{}.self_attn.o.weight", (1536, 1536), 30),
    Weight("blocks.{}.cross_attn.o.weight", (1536, 1536), 30),
    Weight("blocks.{}.ffn.0.weight", (8960, 1536), 30),
    Weight("blocks.{}.ffn.2.weight", (1536, 8960), 30),
    Weight("time_projection.1.weight", (9216, 1536), 1),
    Weight("text_embedding.0.weight", (1536, 4096), 1),
)
QWEN_IMAGE = (
    Weight("transformer_blocks.{}.img_mod.1.weight", (18432, 3072), 120),
    Weight("transformer_blocks.{}.img_mlp.net.0.proj.weight", (12288, 3072), 120),
    Weight("transformer_blocks.{}.img_mlp.net.2.weight", (3072, 12288), 120),
    Weight("transformer_blocks.{}.attn.to_q.weight", (3072, 3072), 120),
    Weight("transformer_blocks.{}.attn.to_k.weight", (3072, 3072), 120),
    Weight("transformer_blocks.{}.attn.to_v.weight", (3072, 3072), 120),
    Weight("transformer_blocks.{}.attn.to_out.0.weight", (3072, 3072), 120),
    Weight("norm_out.linear.weight", (6144, 3072), 1),
    Weight("txt_in.weight", (3072, 3584), 1),
)
# The UNets' many sizes by kind: each row has as many values as all weights of its kind, wherever they are.
SDXL = (
    Weight("output_blocks.{}.1.transformer_blocks.5.ff.net.0.proj.weight", (10240, 1280), 60),
    Weight("output_blocks.{}.1.transformer_blocks.5.ff.net.2.weight", (1280, 5120), 62),
    Weight("output_blocks.{}.1.transformer_blocks.5.attn1.to_q.weight", (1280, 1280), 125),
    Weight("output_blocks.{}.1.transformer_blocks.5.attn2.to_k.weight", (1280, 2048), 104),
    Weight("output_blocks.{}.1.transformer_blocks.5.attn2.to_v.weight", (1280, 2048), 104),
    Weight("output_blocks.{}.1.transformer_blocks.5.attn1.to_out.0.weight", (1280, 1280), 125),
    Weight("output_blocks.{}.0.in_layers.2.weight", (1280, 2560, 3, 3), 6),
    Weight("output_blocks.{}.0.out_layers.3.weight", (1280, 1280, 3, 3), 10),
    Weight("output_blocks.{}.0.emb_layers.1.weight", (1280, 1280), 11),
    Weight("output_blocks.{}.1.proj_in.weight", (1280, 1280), 14),
)
SD15 = (
    Weight("output_blocks.{}.0.in_layers.2.weight", (1280, 2560, 3, 3), 10),
    Weight("output_blocks.{}.0.out_layers.3.weight", (1280, 1280, 3, 3), 17),
    Weight("output_blocks.{}.1.transformer_blocks.0.ff.net.0.proj.weight", (10240, 1280), 8),
    Weight("output_blocks.{}.1.transformer_blocks.0.ff.net.2.weight", (1280, 5120), 7),
    Weight("output_blocks.{}.1.transformer_blocks.0.attn1.to_q.weight", (1280, 1280), 58),
    Weight("output_blocks.{}.0.emb_layers.1.weight", (1280, 1280), 16),
    Weight("output_blocks.{}.1.proj_in.weight", (1280, 1280, 1, 1), 16),
)

MODELS = {
    "flux": KnownModel("flux", "Flux.1-dev", "1024x1024", 11_901_408_320, 74.38e12, 1, 128 * 128, 3.1, FLUX),
    "sd1": KnownModel("sd1", "Stable Diffusion 1.5", "512x512", 859_520_964, 0.803e12, 2, 64 * 64, 1.0, SD15),
    "sdxl": KnownModel("sdxl", "SDXL", "1024x1024", 2_567_463_684, 6.76e12, 2, 128 * 128, 0.8, SDXL),
    "sd3": KnownModel("sd3", "SD3 medium", "1024x1024", 2_084_951_104, 8.44e12, 2, 128 * 128, 1.6, SD3_MEDIUM),
    "sd3.5": KnownModel("sd3", "SD3.5 large", "1024x1024", 8_146_280_768, 29.6e12, 2, 128 * 128, 1.6, SD35_LARGE),
    "wan": KnownModel(
        "wan", "Wan 2.1 14B", "832x480, 81 frames", 14_288_491_584, 1678.4e12, 2, 21 * 104 * 60, 0.9, WAN_14B
    ),
    "wan-1.3b": KnownModel(
        "wan", "Wan 2.1 1.3B", "832x480, 81 frames", 1_418_996_800, 283.0e12, 2, 21 * 104 * 60, 0.9, WAN_1_3B
    ),
    "qwen-image": KnownModel(
        "qwen_image", "Qwen-Image", "1024x1024", 20_430_401_088, 78.3e12, 2, 128 * 128, 1.8, QWEN_IMAGE
    ),
}
