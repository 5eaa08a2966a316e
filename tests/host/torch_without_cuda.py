"""Let the CUDA builds of torchvision and torchaudio, the only ones in the registry, import beside a torch without CUDA.

Their compiled parts ask for CUDA libraries. torchaudio is pure Python, by its own design, when it finds none.
torchvision goes on without its compiled operators but still describes two of them to torch, which refuses: those two
lines get the guard that the rest of that file has.
"""

import importlib
import re
import sysconfig
from pathlib import Path

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
UNGUARDED = re.compile(r'^@(torch\.library\.register_fake\("torchvision::q?nms"\))$', re.MULTILINE)
GUARDED = r"@(\1 if torchvision.extension._has_ops() else lambda function: function)"


def imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def main() -> None:
    if not imports("torchvision"):
        file = SITE_PACKAGES / "torchvision" / "_meta_registrations.py"
        file.write_text(UNGUARDED.sub(GUARDED, file.read_text()))
    if not imports("torchaudio"):
        for library in (SITE_PACKAGES / "torchaudio" / "lib").glob("*.so"):
            library.unlink()


if __name__ == "__main__":
    main()
