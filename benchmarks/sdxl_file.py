"""The UNet of SDXL with random weights as GGUF: matrices of the transformers in Q8_0, others in 16 bits. 3 GB.

    python benchmarks/sdxl_file.py COMFYUI FOLDER

Its tensors' names and shapes are read off ComfyUI's own class.
"""

import sys
from pathlib import Path

import gguf
import torch

sys.path.append(sys.argv[1])
import comfy.ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from flux_files import DEVICE, random_blocks
from gguf_native.ops.formats import FORMATS

TYPE = "Q8_0"


def shapes() -> dict[str, tuple[int, ...]]:
    model = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        num_head_channels=64,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
        context_dim=2048,
        num_classes="sequential",
        adm_in_channels=2816,
        use_checkpoint=False,
        legacy=False,
        dtype=torch.float32,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_gguf(path: Path) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    writer = gguf.GGUFWriter(path, "sdxl")
    for name, shape in shapes().items():
        if len(shape) == 2 and "transformer_blocks" in name:
            n_blocks = shape[0] * shape[1] // FORMATS[TYPE].block_size
            blocks = random_blocks(TYPE, n_blocks, generator).view(shape[0], -1).cpu().numpy()
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[TYPE])
        elif len(shape) == 1:
            writer.add_tensor(name, torch.full(shape, float(name.endswith("weight"))).numpy())
        else:
            fan_in = torch.Size(shape[1:]).numel()
            values = torch.randn(shape, device=DEVICE, generator=generator) / fan_in**0.5
            writer.add_tensor(name, values.half().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[2]) / "sdxl.gguf")
