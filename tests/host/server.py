"""The real ComfyUI server, with this pack in its custom_nodes, as a process that lasts as long as a with block."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from host.client import Client
from host.environment import ROOT

PACK = "ComfyUI-GGUF-Native"
# The page would open its template gallery over everything on its first start.
USER_SETTINGS = {"Comfy.TutorialCompleted": True}
START_SECONDS = 180
STOP_SECONDS = 15
# What a test run sets for itself: a server is started as a user starts one.
NOT_PASSED_ON = ("PYTHONPATH", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Server(Client):
    """A client of a server on this machine, which also sees its process and the folder it works in."""

    pid: int
    base: Path

    def log(self) -> str:
        """All that the server has said so far."""
        return log_file(self.base).read_text(errors="replace")


def log_file(base: Path) -> Path:
    return base / "server.log"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_base(base: Path) -> None:
    """The folders ComfyUI works in, away from the user's own."""
    for folder in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / PACK
    if pack.is_symlink():
        pack.unlink()  # the checkout may have moved
    if not pack.exists():
        pack.symlink_to(ROOT, target_is_directory=True)
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(USER_SETTINGS))


def command(base: Path, models: Path, port: int, arguments: Sequence[str]) -> list[str]:
    return [
        sys.executable,
        "main.py",
        *("--listen", "127.0.0.1", "--port", str(port)),
        *("--base-directory", str(base), "--models-directory", str(models)),
        *("--database-url", "sqlite:///:memory:"),
        "--disable-api-nodes",
        *arguments,
    ]


def wait_until_ready(process: subprocess.Popen, client: Client, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with status {process.returncode} before it was ready:\n{tail(log)}")
        try:
            client.request("/system_stats")
        except URLError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"ComfyUI was not ready after {START_SECONDS} s:\n{tail(log)}")


def tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def running_server(
    comfyui: Path,
    base: Path,
    models: Path,
    arguments: Sequence[str] = (),
    settings: dict[str, str] | None = None,
    device: str = "--cpu",
) -> Iterator[Server]:
    """Start ComfyUI in `base`, which holds its output/ and its server.log, and stop it at the end.

    `arguments` are further ones for main.py; `settings` are environment variables. Tests run on the CPU, also where
    there is a GPU: what they claim to the bit holds in float32.
    """
    make_base(base)
    log = log_file(base)
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON} | (settings or {})
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(base, models, port, [device, *arguments]),
            cwd=comfyui,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        client = Server(f"http://127.0.0.1:{port}", process.pid, base)
        wait_until_ready(process, client, log)
        yield client
    finally:
        stop(process)
