"""The `compute` input of the loaders."""

from comfy_api.latest import io

from ..ops.compute import COMPUTE

BY_SETTING = "default"

INPUT = io.Combo.Input(
    "compute",
    options=[BY_SETTING, *COMPUTE],
    default=BY_SETTING,
    optional=True,
    advanced=True,
    tooltip="How the model's blocks multiply. exact: no error added. fp8 (RTX 40 and newer), int8 (RTX 20 and newer): "
    "faster, with a small error. auto: by layer the fastest whose error is below that of the file. "
    "default: what the settings say, exact unless you changed it.",
)


def chosen(compute: str) -> str | None:
    """What the loaders take: None for the setting's."""
    return None if compute == BY_SETTING else compute
