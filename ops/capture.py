"""What a GPU is given to do, recorded as a CUDA graph; where that fails, torch is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

# Graphs whose recording failed.
ABANDONED: list[torch.cuda.CUDAGraph] = []


@contextmanager
def capture() -> Iterator[torch.cuda.CUDAGraph]:
    """What is launched within it is recorded, not run; RuntimeError if that cannot be, and then nothing is left of it.

    torch's own `torch.cuda.graph` leaves the stream, the generator of random numbers and the allocator recording then.
    """
    graph, pool, device = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        with torch.cuda.stream(recording_stream(device)):
            try:
                # Other threads may use the GPU meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                yield graph
            finally:
                end_capture(graph, device, pool)
    finally:
        generator.graphsafe_set_state(state)


@cache
def recording_stream(device: int) -> torch.cuda.Stream:
    """One for all: on each, cuBLAS keeps memory of its own."""
    return torch.cuda.Stream(device)


def end_capture(graph: torch.cuda.CUDAGraph, device: int, pool: tuple[int, int]) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # Unless it failed after it had done that itself.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        # torch looks at it when pinned memory is asked for, as long as it believes that it records.
        ABANDONED.append(graph)
        raise
