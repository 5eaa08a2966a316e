"""`--processes`: the same bytes from several processes, and what is left when one of them dies or all are stopped."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from gguf_native.ops.quantize import quantize
from gguf_native.quantizer import convert
from gguf_native.quantizer.encoders import encoder
from gguf_native.quantizer.errors import EncoderProcessError
from host.environment import ROOT
from safetensors.torch import save_file

WAIT_SECONDS = 30
START_AND_WAIT = """
import sys, torch
from gguf_native.quantizer.encoders import encoder
with encoder(3) as encode:
    encode(torch.ones(4, 32), "Q4_0", None)
    print("ready", flush=True)
    sys.stdin.read()
"""


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "encoder_process" in " ".join(child.cmdline())]


def values(n_rows: int) -> torch.Tensor:
    return torch.randn(n_rows, 512, generator=torch.Generator().manual_seed(n_rows))


def test_the_same_blocks_and_then_no_processes():
    n_threads = torch.get_num_threads()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1))
    with encoder(3) as encode:
        assert len(children()) == 2
        assert torch.get_num_threads() == 1
        for type_name, rows, weights in [
            ("Q4_K", values(300), None),
            ("Q3_K", values(7).bfloat16(), importance),
            ("Q8_0", values(1).half(), None),
            ("IQ4_XS", values(64).t().contiguous().t()[:, :256], None),
        ]:
            assert torch.equal(encode(rows, type_name, weights), quantize(rows, type_name, weights))
    assert children() == []
    assert torch.get_num_threads() == n_threads


def test_the_same_file(tmp_path):
    tensors = {f"double_blocks.{n}.img_attn.proj.weight": values(96) for n in range(3)}
    tensors |= {"double_blocks.0.img_attn.proj.bias": torch.randn(96), "img_in.weight": values(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    for processes in (1, 2):
        convert(tmp_path / "model.safetensors", tmp_path / f"{processes}.gguf", "Q4_K_M", processes=processes)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_one_that_dies_ends_the_run_and_leaves_no_file(tmp_path):
    def kill(done: int, total: int) -> None:
        for child in children():
            child.kill()

    save_file({f"double_blocks.{n}.img_attn.proj.weight": values(96) for n in range(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderProcessError, match=r"has ended with status -9.*fewer --processes"):
        convert(tmp_path / "model.safetensors", tmp_path / "out.gguf", "Q4_0", processes=2, progress=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert children() == []


def test_cancelled(tmp_path):
    save_file({"double_blocks.0.img_attn.proj.weight": values(96)}, tmp_path / "model.safetensors")

    def cancel(done: int, total: int) -> None:
        raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError, match="cancelled"):
        convert(tmp_path / "model.safetensors", tmp_path / "out.gguf", "Q4_0", processes=2, progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert children() == []


@pytest.mark.skipif(os.name == "nt", reason="signals are those of Unix")
def test_they_end_with_the_process_that_started_them_and_not_by_ctrl_c(tmp_path):
    (tmp_path / "gguf_native").symlink_to(ROOT, target_is_directory=True)
    command, environment = [sys.executable, "-c", START_AND_WAIT], os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        encoders = psutil.Process(parent.pid).children()
        assert len(encoders) == 2
        for process in encoders:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert all(process.is_running() for process in encoders)
        parent.kill()
    gone, alive = psutil.wait_procs(encoders, WAIT_SECONDS)
    assert (len(gone), alive) == (2, [])
