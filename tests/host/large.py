"""A Flux of a few hundred megabytes that runs in half a second: many small blocks, random bytes under sane scales."""

from pathlib import Path

import gguf
import numpy as np
from host.architectures import flux

# About 250 million values; the largest matrix, which is decoded at once, has 6 million. For tiny_clip_l, 256 wide.
SIZES = {"context": 256, "pooled": 256, "width": 1024, "depth": 6, "depth_single_blocks": 1}
BLOCK_VALUES, BLOCK_BYTES = 32, 34
# Blocks are drawn from so many: drawing each would take longer than the test.
N_DRAWN = 65_536


def write(path: Path, seed: int) -> None:
    """Matrices as Q8_0 whose values spread by 1 / sqrt(row), everything else as F32."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (N_DRAWN, BLOCK_BYTES), np.uint8)
    writer = gguf.GGUFWriter(path, "flux")
    for name, shape in flux(**SIZES).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.full(shape, name.endswith("scale"), np.float32))
            continue
        n_blocks = shape[0] * shape[1] // BLOCK_VALUES
        drawn = blocks[(np.arange(n_blocks) + random.integers(N_DRAWN)) % N_DRAWN]
        drawn[:, :2] = np.float16(1 / 74 / shape[1] ** 0.5).reshape(1).view(np.uint8)
        writer.add_tensor(name, drawn.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
