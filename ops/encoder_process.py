"""A process that only quantises: tensors come in by standard input, their blocks go out by standard output.

Threads of one process take turns at Python's lock after every operation of torch; processes do not.
"""

import pickle
import sys
from typing import BinaryIO, NamedTuple

import torch

from .quantize import quantize


class Task(NamedTuple):
    """What comes before the bytes of a tensor; `dtype` and `type` as for `quantize`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    type: str
    importance: torch.Tensor | None


def send(file: BinaryIO, about: object, tensor: torch.Tensor) -> None:
    """Write a head, then the bytes of a contiguous CPU tensor."""
    pickle.dump((about, tensor.nbytes), file)
    file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    file.flush()


def receive(file: BinaryIO) -> tuple[object, torch.Tensor]:
    """What `send` wrote, the tensor as its bytes. EOFError where the other end is gone."""
    about, n_bytes = pickle.load(file)
    raw = torch.empty(n_bytes, dtype=torch.uint8)
    if file.readinto(memoryview(raw.numpy())) < n_bytes:
        raise EOFError
    return about, raw


def serve(tasks: BinaryIO = sys.stdin.buffer, blocks: BinaryIO = sys.stdout.buffer) -> None:
    """Quantise until the input ends: it does when the process that sends tasks is gone, however that ended."""
    torch.set_num_threads(1)
    while True:
        try:
            task, raw = receive(tasks)
        except EOFError:
            return
        send(blocks, None, quantize(raw.view(task.dtype).view(task.shape), task.type, task.importance))
