"""`--processes`: a tensor's rows quantised by several processes at once, on the CPU."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    """`quantize`, or the same done by so many processes, more than one. Raises EncoderProcessError if one dies."""
    if n_processes == 1:
        yield quantize
        return
    command = [sys.executable, "-c", START, str(MAIN)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(n_processes)]
    try:
        with ThreadPoolExecutor(n_processes, "gguf-native-process") as threads:

            def encode(rows: torch.Tensor, type: str, importance: torch.Tensor | None = None) -> torch.Tensor:
                parts = rows.chunk(n_processes)
                done = threads.map(encode_part, processes, parts, [type] * len(parts), [importance] * len(parts))
                return torch.cat(list(done))

            yield encode
    finally:
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
