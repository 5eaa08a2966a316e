"""RAM of the real server: what a model of 250 MB takes while it is used, what it leaves, and that nothing grows."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from host.client import Graph
from host.server import Server, running_server
from host.workflows import node, text_to_image

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="only Linux tells what a process has in RAM, and resets its peak"
)

MB, GB = 2**20, 2**30
LARGE = ("large-1.gguf", "large-2.gguf")
SECONDS_TO_LET_GO = 20
ALTERNATIONS = 20
# What the C library and torch keep for themselves comes and goes by so much, the text encoder with it; under a third of
# a model of LARGE.
SLACK = 80 * MB
# Two cores that other processes use make two threads wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STREAMING = {"streaming": {}, "reading": {"GGUF_NATIVE_STREAMING_LOADING": "off"}}


@pytest.fixture(scope="module")
def base(comfyui, tmp_path_factory) -> Path:
    """A folder for servers, whose output/ they also search for models: it has the files LARGE."""
    from host import large

    base = tmp_path_factory.mktemp("memory")
    folder = base / "output" / "diffusion_models"
    folder.mkdir(parents=True)
    for seed, name in enumerate(LARGE):
        large.write(folder / name, seed)
    return base


@pytest.fixture(scope="module")
def file_size(base) -> int:
    return (base / "output" / "diffusion_models" / LARGE[0]).stat().st_size


@pytest.fixture(scope="module", params=STREAMING)
def server(request, comfyui, samples, base) -> Iterator[Server]:
    with running_server(comfyui, base, samples.MODELS, settings=ONE_THREAD | STREAMING[request.param]) as server:
        yield server


@pytest.fixture(scope="module")
def idle(server) -> int:
    """What the server has in RAM before its first run."""
    return status(server, "VmRSS")


@pytest.fixture(scope="module")
def warm(server, idle, samples) -> int:
    """The same after a small picture: libraries are loaded, the text encoder and the VAE stay."""
    server.run(flux(samples, samples.gguf("tiny_flux_256", "Q5_K").name))
    return status(server, "VmRSS")


def flux(samples: ModuleType, model: str, seed: int = 1) -> Graph:
    """One step of 64x64 pixels, with CLIP-L alone: it makes 77 tokens, T5 would make 256."""
    return text_to_image(
        node("UnetLoaderGGUF", unet_name=model),
        node("CLIPLoaderGGUF", clip_name=samples.gguf("tiny_clip_l", "Q8_0").name, type="stable_diffusion"),
        node("VAELoaderGGUF", vae_name=samples.gguf("tiny_flux_vae", "Q8_0").name),
        steps=1,
        seed=seed,
    )


def status(server: Server, field: str) -> int:
    """Bytes: VmRSS is all that the process has in RAM, VmHWM its peak, RssFile what of it are pages of files."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def forget_peak(server: Server) -> None:
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


def own(server: Server) -> int:
    """Bytes in RAM that are not pages of files."""
    return status(server, "VmRSS") - status(server, "RssFile")


def pages_of_models(server: Server) -> dict[str, int]:
    """Name of each GGUF file that the process has mapped -> bytes of it in RAM."""
    text = Path(f"/proc/{server.pid}/smaps").read_text()
    mappings = re.findall(r"/([^/\n]+\.gguf)\n(?:.*\n)*?Rss:\s+(\d+) kB", text)
    return {name: int(kilobytes) * 1024 for name, kilobytes in mappings}


def comes_true(condition: Callable[[], bool]) -> bool:
    """Soon enough: the server collects garbage every ten seconds."""
    deadline = time.monotonic() + SECONDS_TO_LET_GO
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_peak_is_the_file_and_little_else(server, idle, warm, samples, file_size):
    """A second copy of the weights, even for a moment, would make it two files."""
    forget_peak(server)
    server.run(flux(samples, LARGE[0]))
    peak = status(server, "VmHWM")
    assert peak - idle <= file_size + GB
    assert file_size - SLACK <= peak - warm <= 1.5 * file_size


def test_what_is_unloaded_stays_in_the_file(server, warm, samples):
    """The server unloads outside inference mode, and keeps the loader's result for the next run."""
    loads = server.log().count("Requested to load Flux")
    server.run(flux(samples, LARGE[0]))
    before = own(server)
    server.request("/free", {"unload_models": True})
    time.sleep(1)
    server.run(flux(samples, LARGE[0], seed=2))
    assert server.log().count("Requested to load Flux") > loads
    assert own(server) <= before + SLACK


def test_what_is_unloaded_gives_its_pages_back(server, warm, samples, file_size, request):
    """Though the server keeps the loader's result, which views the file."""
    streaming = "streaming" in request.node.callspec.id
    server.run(flux(samples, LARGE[0], seed=30))
    assert (pages_of_models(server).get(LARGE[0], 0) > 0.9 * file_size) == streaming
    server.request("/free", {"unload_models": True})
    assert comes_true(lambda: pages_of_models(server).get(LARGE[0], 0) < 0.1 * file_size)
    assert (LARGE[0] in pages_of_models(server)) == streaming


def test_pages_are_given_back(server, warm, samples, file_size, request):
    streaming = "streaming" in request.node.callspec.id
    server.run(flux(samples, LARGE[0], seed=3))
    assert (pages_of_models(server).get(LARGE[0], 0) > 0.9 * file_size) == streaming
    server.free()
    assert comes_true(lambda: pages_of_models(server) == {})
    assert comes_true(lambda: status(server, "VmRSS") <= warm + SLACK)


def test_nothing_grows_while_two_models_alternate(server, warm, samples):
    taken = []
    for run in range(ALTERNATIONS):
        server.run(flux(samples, LARGE[run % 2], seed=4 + run))
        taken.append(own(server))
    assert max(taken) <= max(taken[:2]) + SLACK, [size // MB for size in taken]
