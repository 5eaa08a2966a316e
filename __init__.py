"""ComfyUI-GGUF-Native: GGUF models as native quantised tensors of ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, because the package is also a library that works without ComfyUI.
    from .nodes import GGUFExtension

    return GGUFExtension()
