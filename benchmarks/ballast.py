"""A graphics card with less memory: another process holds the rest of it."""

import subprocess
import sys
from typing import NamedTuple

HOLD_MEMORY = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
all_but = int(free - float(sys.argv[1]) * 2**30 - 0.55 * 2**30) >> 28
pieces = int(sys.argv[2]) if len(sys.argv) > 2 else all_but
assert pieces >= 0, f"only {free >> 20} MB are free"
held = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(pieces)]
torch.cuda.synchronize()
print(pieces, flush=True)
sys.stdin.read()
"""


class Ballast(NamedTuple):
    """The process that holds so many pieces of 256 MB."""

    process: subprocess.Popen
    n_pieces: int

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> "Ballast":
        """After `kill`: as much as before, whatever has become free or been taken since."""
        return _hold("0", str(self.n_pieces))


def hold_all_but(gigabytes: float) -> Ballast:
    """Hold all but so many times 2^30 bytes, and a CUDA context's; kill it at the end."""
    return _hold(str(gigabytes))


def _hold(*arguments: str) -> Ballast:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD_MEMORY, *arguments], stdin=pipe, stdout=pipe)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the GPU's memory could not be taken; see above")
    return Ballast(process, int(line))
