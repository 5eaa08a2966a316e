"""`--processes`: a tensor's rows quantised by several processes at once, on the CPU."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import torch

from ..ops.encoder_process import Task, receive, send
from ..ops.quantize import quantize
from .errors import EncoderProcessError

# Ctrl-C at a terminal reaches every process of the command, and only the first one has something to tidy up.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import runpy, sys; "
    "runpy.run_path(sys.argv[1])['bind_folder'](); from gguf_native.ops.encoder_process import serve; serve()"
)
MAIN = Path(__file__).resolve().parents[1] / "__main__.py"

# quantize(rows, type, importance) -> blocks
Encode = Callable[[torch.Tensor, str, torch.Tensor | None], torch.Tensor]


@contextmanager
def encoder(n_processes: int) -> Iterator[Encode]:
    """`quantize`, by so many processes with this one. Raises EncoderProcessError if another one dies.

    With more than one, torch has one thread here until the end.
    """
    if n_processes == 1:
        yield quantize
        return
    command, others, n_threads = [sys.executable, "-c", START, str(MAIN)], n_processes - 1, torch.get_num_threads()
    # Where a pipe can be made larger, a megabyte instead of 64 kB: fewer turns of writing and reading.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "pipesize": 1 << 20}
    processes = [subprocess.Popen(command, **pipes) for _ in range(others)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(others, "gguf-native-process") as threads:

            def encode(rows: torch.Tensor, type: str, importance: torch.Tensor | None = None) -> torch.Tensor:
                mine, *parts = rows.chunk(n_processes)
                done = threads.map(encode_part, processes, parts, repeat(type), repeat(importance))
                return torch.cat([quantize(mine, type, importance), *done])

            yield encode
    finally:
        torch.set_num_threads(n_threads)
        for process in processes:
            process.kill()
            process.communicate()


def encode_part(
    process: subprocess.Popen, rows: torch.Tensor, type: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """The blocks of some rows, uint8 [rows, bytes]."""
    try:
        send(process.stdin, Task(tuple(rows.shape), rows.dtype, type, importance), rows.contiguous())
        _, blocks = receive(process.stdout)
    except (EOFError, BrokenPipeError):
        raise EncoderProcessError(
            f"A process that quantised {type} has ended with status {process.wait()}. If memory ran out, use fewer "
            "--processes; what it wrote before it ended is above."
        ) from None
    return blocks.view(len(rows), -1)
