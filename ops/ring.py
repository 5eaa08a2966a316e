"""A ring of memory: places that a copy writes and a product reads, one after the other and over again."""

from collections import deque
from dataclasses import dataclass

import torch

# What the host aligns weights to in its own memory.
ALIGNMENT = 1024


@dataclass(eq=False)
class Place:
    """Bytes `start` to `end` of a ring; `done` happens when the GPU has used them, None while they are in use."""

    start: int
    end: int
    done: torch.cuda.Event | None = None


class Ring:
    """Places in a buffer of `nbytes`, taken in a circle and given back in the order in which they were taken."""

    def __init__(self, nbytes: int):
        self.nbytes, self.head = nbytes, 0
        self.taken: deque[Place] = deque()

    def take(self, nbytes: int) -> tuple[Place, list] | None:
        """A place and the events to wait for before it is written; None while those who have it are not done."""
        start = self.head if self.head + nbytes <= self.nbytes else 0
        new = Place(start, start + -(-nbytes // ALIGNMENT) * ALIGNMENT)
        overlapping = [i for i, old in enumerate(self.taken) if old.start < new.end and new.start < old.end]
        n_before = overlapping[-1] + 1 if overlapping else 0
        before = [self.taken[i].done for i in range(n_before)]
        if nbytes > self.nbytes or None in before:
            return None
        for _ in range(n_before):
            self.taken.popleft()
        self.taken.append(new)
        self.head = new.end
        return new, before
