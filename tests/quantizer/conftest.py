"""Files for the converter."""

import pytest
from safetensors.torch import save_file


@pytest.fixture
def save(tmp_path):
    """Function (tensors, name, metadata) -> the path of a safetensors file of them."""

    def save(tensors, name="model.safetensors", metadata=None):
        save_file(dict(tensors), tmp_path / name, metadata)
        return tmp_path / name

    return save
