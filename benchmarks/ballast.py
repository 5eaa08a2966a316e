"""A graphics card with less memory: another process holds the rest of it."""

import subprocess
import sys

HOLD_MEMORY = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
pieces = int(free - float(sys.argv[1]) * 2**30 - 0.55 * 2**30) >> 28
assert pieces >= 0, f"only {free >> 20} MB are free"
held = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(pieces)]
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
"""


def hold_all_but(gigabytes: float) -> subprocess.Popen:
    """The process, once it holds all but so many times 2^30 bytes, and a CUDA context's; kill it at the end."""
    pipe = subprocess.PIPE
    ballast = subprocess.Popen([sys.executable, "-c", HOLD_MEMORY, str(gigabytes)], stdin=pipe, stdout=pipe)
    if ballast.stdout.readline() != b"held\n":
        raise RuntimeError(f"all but {gigabytes} GB of the GPU's memory could not be taken; see above")
    return ballast
