"""A recording that fails leaves torch as it was."""

import pytest
import torch
from gguf_native.ops.capture import capture


@pytest.mark.cuda
def test_on_a_gpu_a_recording_that_failed_leaves_nothing_behind():
    """Random numbers go on where they were, and memory that another stream has used is free again when it is done."""
    torch.cuda.manual_seed(7)
    expected, before = torch.randn(8, device="cuda"), torch.cuda.memory_allocated()
    torch.cuda.manual_seed(7)
    with pytest.raises(RuntimeError), capture():
        torch.ones(1 << 20, device="cuda").sum().item()
    assert torch.equal(torch.randn(8, device="cuda"), expected)
    used_elsewhere = torch.ones(1 << 20, device="cuda")
    used_elsewhere.record_stream(torch.cuda.Stream())
    address = used_elsewhere.data_ptr()
    del used_elsewhere
    torch.cuda.synchronize()
    assert torch.ones(1 << 20, device="cuda").data_ptr() == address
    # The state of the generator that the recording had.
    assert torch.cuda.memory_allocated() - before < 1 << 20
