"""Make ComfyUI's own modules importable in this process, on the CPU: there its arithmetic is float32."""

import sys
from pathlib import Path

from host.environment import ROOT


def bind(comfyui: Path) -> None:
    """Put ComfyUI on the path and settle what it decides once, when comfy.model_management is imported."""
    # At the end: the host's folder holds modules called app, utils, tests and server. Without the checkout, which
    # `python -m` puts in front: `import nodes` means the host's.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    sys.path.append(str(comfyui))
    import comfy_aimdo.control
    from comfy.cli_args import args

    args.cpu = True
    args.database_url = "sqlite:///:memory:"
    # As main.py does: the library's other modules keep what init found when they are imported.
    comfy_aimdo.control.init()
