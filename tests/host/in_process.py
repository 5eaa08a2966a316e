"""Make ComfyUI's own modules importable in this process, in float32: on the CPU, or with TEST_DEVICE=cuda on a GPU."""

import os
import sys
from pathlib import Path

from host.environment import ROOT

ON_GPU = os.environ.get("TEST_DEVICE") == "cuda"


def bind(comfyui: Path) -> None:
    """Put ComfyUI on the path and settle what it decides once, when comfy.model_management is imported."""
    # At the end: the host's folder holds modules called app, utils, tests and server. Without the checkout, which
    # `python -m` puts in front: `import nodes` means the host's.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    sys.path.append(str(comfyui))
    import comfy_aimdo.control
    from comfy.cli_args import args

    args.cpu, args.force_fp32 = not ON_GPU, ON_GPU
    args.database_url = "sqlite:///:memory:"
    # As main.py does: the library's other modules keep what init found when they are imported.
    comfy_aimdo.control.init()
    if ON_GPU:
        begin_dynamic_vram()


def begin_dynamic_vram() -> None:
    """As main.py does; which models use it, a test decides. Products of float32 are in float32."""
    import comfy.model_management
    import comfy_aimdo.control
    import torch

    torch.backends.cudnn.allow_tf32 = False
    devices = comfy.model_management.get_all_torch_devices()
    assert comfy_aimdo.control.init_devices((device.index, 0) for device in devices)
