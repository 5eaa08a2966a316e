"""The command line as a user runs it: in its three forms, interrupted, killed, short of memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_native.loader import open_gguf
from host.environment import ROOT
from safetensors.torch import save_file

NAME = "double_blocks.{}.img_attn.proj.weight"
# What a process may take besides twice its largest tensor: torch alone takes 220 MB.
ALLOWANCE = 500 << 20
WAIT_SECONDS = 60

# As an installed `gguf-native` starts.
ENTRY_POINT = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("gguf_native", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["gguf_native"] = importlib.util.module_from_spec(spec)
from gguf_native.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A ComfyUI's custom_nodes with this pack under a name that is no identifier."""
    pack = tmp_path / "custom_nodes" / "some-pack.1"
    pack.parent.mkdir()
    pack.symlink_to(ROOT, target_is_directory=True)
    return pack


@pytest.fixture
def importable(tmp_path) -> str:
    """A folder from which `import gguf_native` finds this checkout."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "gguf_native").symlink_to(ROOT, target_is_directory=True)
    return str(tmp_path / "site")


@pytest.fixture
def model(tmp_path) -> Path:
    save_file({NAME.format(0): torch.randn(256, 512), "img_in.bias": torch.zeros(512)}, tmp_path / "flux.safetensors")
    return tmp_path / "flux.safetensors"


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


def assert_converted(done: subprocess.CompletedProcess, out: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out.name}: 0.1 MB\n"
    assert done.stderr == ""
    with open_gguf(out) as file:
        assert file.tensors[NAME.format(0)].type == "Q4_K"


def test_as_a_module(model, tmp_path, importable):
    arguments = ["quantize", model.name, "out.gguf", "--type", "Q4_K_S"]
    done = run(["-m", "gguf_native", *arguments], tmp_path, PYTHONPATH=importable)
    assert_converted(done, tmp_path / "out.gguf")


def test_as_an_installed_command(model, tmp_path):
    done = run(["-c", ENTRY_POINT, ROOT, "quantize", model.name, "out.gguf", "--type", "Q4_K_S"], tmp_path)
    assert_converted(done, tmp_path / "out.gguf")


def test_as_a_folder_of_any_name(model, tmp_path, folder):
    done = run([folder.relative_to(tmp_path), "quantize", model.name, "out.gguf", "--type", "Q4_K_S"], tmp_path)
    assert_converted(done, tmp_path / "out.gguf")


def test_every_command_has_a_module_with_its_three_names(folder, tmp_path):
    done = run([folder, "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("quantize", "inspect", "verify", "recommend", "doctor"):
        assert f"\n    {name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", "out.gguf", "--type", "Q4_K_M"], "none.safetensors: there is no such file."),
        (["flux.safetensors", "out.gguf", "--type", "Q4_K"], "'Q4_K' is no file type"),
        (["flux.safetensors", "out.gguf", "--type", "Q8_0", "--part", "vae"], "has no part 'vae'"),
        (["flux.safetensors", "no/out.gguf", "--type", "Q8_0"], "no such folder"),
        (["broken.gguf", "out.gguf", "--type", "Q8_0"], "broken.gguf: starts with"),
    ],
)
def test_errors_are_one_line_and_status_2(model, tmp_path, folder, arguments, message):
    (tmp_path / "broken.gguf").write_bytes(b"nothing of the kind")
    done = run([folder, "quantize", *arguments], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", ["0", "4XB", "-1GB"])
def test_sizes_that_are_none_are_usage_errors(model, tmp_path, folder, size):
    done = run([folder, "quantize", model.name, "out.gguf", "--type", "Q8_0", f"--split-max-size={size}"], tmp_path)
    assert done.returncode == 2
    assert "is no size; write it like 4GB" in done.stderr


def test_shards_of_a_size(tmp_path, folder):
    save_file({NAME.format(number): torch.randn(512, 512) for number in range(4)}, tmp_path / "flux.safetensors")
    done = run(
        [folder, "quantize", "flux.safetensors", "out.gguf", "--type=Q8_0", "--split-max-size", "0.6MB"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "out-00001-of-00002.gguf",
        "out-00002-of-00002.gguf",
    ]
    with open_gguf(tmp_path / "out-00001-of-00002.gguf") as file:
        assert len(file.tensors) == 4


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Flux that takes a few seconds: 33 million values."""
    path = tmp_path_factory.mktemp("large") / "flux.safetensors"
    weight = torch.randn(1024, 1024).bfloat16()
    save_file({NAME.format(number): weight.clone() for number in range(32)}, path)
    return path


@pytest.fixture
def running(large, tmp_path, folder):
    """The process of a conversion whose output has begun."""
    out = tmp_path / "out.gguf"
    # A shell has what it starts in the background ignore interrupts, and with it what that starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, folder, "quantize", large, out, "--type", "Q2_K"], stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(tmp_path.glob("out.gguf.*.part")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("out*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_leaves_nothing(running, tmp_path, number):
    running.send_signal(number)
    assert running.wait(WAIT_SECONDS) == 130
    assert running.stderr.read() == "interrupted\n"
    assert outputs(tmp_path) == []


def test_a_killed_run_leaves_no_final_name_and_the_next_one_finishes(running, tmp_path, folder, large):
    running.kill()
    running.wait(WAIT_SECONDS)
    assert outputs(tmp_path) == [f"out.gguf.{running.pid}.part"]
    done = run([folder, "quantize", large, "out.gguf", "--type", "Q8_0"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == ["out.gguf"]
    with open_gguf(tmp_path / "out.gguf") as file:
        assert len(file.tensors) == 32


# The peak of this process alone: getrusage counts what its parent had before.
PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self/status")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "gguf"])
def test_memory_is_two_of_the_largest_tensors_and_a_constant(tmp_path, folder, kind):
    n_tensors, rows, columns = 12, 4096, 4096
    tensors = {NAME.format(number): torch.full((rows, columns), number / 7).bfloat16() for number in range(n_tensors)}
    largest = rows * columns * 2
    if kind == "pt":
        torch.save(tensors, tmp_path / "flux.pt")
    else:
        save_file(tensors, tmp_path / "flux.safetensors")
    source = tmp_path / f"flux.{kind}"
    if kind == "gguf":
        done = run([folder, "quantize", "flux.safetensors", source, "--type", "BF16"], tmp_path)
        assert done.returncode == 0, done.stderr
    # A file held whole would show.
    assert source.stat().st_size > 2 * largest + ALLOWANCE / 2
    done = run(["-c", PEAK, folder, "quantize", source, "out.gguf", "--type", "Q8_0", "--force"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) * 1024 <= 2 * largest + ALLOWANCE
    source.unlink()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:77", "--type", "Q8_0"], "'cuda:77' is no device here"),
        (["--device", "meta", "--type", "Q8_0"], "'meta' is no device here"),
        (["--bits", "inf"], "'inf' is no number of bits"),
        (["--bits", "0"], "'0' is no number of bits"),
        (["--target-size", "0.0001K"], "'0.0001K' is no size"),
        (["--type", ""], "'' is no file type"),
        (["--type", "Q8_0", "--bits", "4"], "not allowed with argument"),
    ],
)
def test_options_that_make_no_sense_are_one_line(folder, large, tmp_path, options, said):
    done = run([folder, "quantize", large, "out.gguf", *options], tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert outputs(tmp_path) == []
