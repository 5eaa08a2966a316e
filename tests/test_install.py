"""Installed with pip, the package imports as `gguf_native` from anywhere, without ComfyUI; its metadata is right."""

import shutil
import subprocess
import sys

import pytest
import tomllib
from host.environment import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_PACKAGED = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "docs", "benchmarks", "__pycache__")
# A process in which importing comfy fails.
WITHOUT_COMFY = "import sys; sys.modules['comfy'] = None; "


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installed a copy of the checkout into."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_PACKAGED)
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True)
    return folder / "site"


@pytest.mark.parametrize("module", ["config", "ops.formats", "loader.gguf_file"])
def test_the_installed_package_imports_without_comfyui(installed, tmp_path, module):
    code = f"{WITHOUT_COMFY}import gguf_native.{module} as module; print(module.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(installed)), done.stderr


def test_every_module_of_the_checkout_is_installed(installed):
    folders = [ROOT.joinpath(*package.split(".")[1:]) for package in packages()]
    modules = {file.relative_to(ROOT) for folder in folders for file in folder.glob("*.py")}
    assert {
        file.relative_to(installed / "gguf_native") for file in (installed / "gguf_native").rglob("*.py")
    } == modules


def test_every_folder_with_code_is_a_package_of_the_project():
    top = [ROOT / name for name in ("loader", "nodes", "ops", "quantizer")]
    folders = {file.parent.relative_to(ROOT) for folder in top for file in folder.rglob("*.py")}
    names = {".".join(("gguf_native", *folder.parts)) for folder in folders} | {"gguf_native"}
    assert names == set(packages())


def packages():
    return PROJECT["tool"]["setuptools"]["packages"]


def test_requirements_txt_lists_what_the_project_needs():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


def test_comfyui_reads_the_project_metadata(host):
    from comfy_config import config_parser

    read = config_parser.extract_node_configuration(str(ROOT))
    assert read.project.name == "gguf-native"
    assert read.project.supported_comfyui_version == ">=0.30.0"
    assert read.project.supported_os == ["OS Independent"]
    assert read.tool_comfy.display_name == "GGUF Native"
