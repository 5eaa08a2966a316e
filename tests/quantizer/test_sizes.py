"""Sizes as they are typed to the commands."""

import pytest
from gguf_native.__main__ import main
from gguf_native.quantizer.sizes import file_size, memory_size

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4GB", 4 * 10**9), ("1.5 g", 15 * 10**8), ("500M", 5 * 10**8), ("2kb", 2000), ("7", 7), ("4GiB", 4 * GIB)],
)
def test_sizes_of_files_are_decimal(text, n_bytes):
    assert file_size(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("6GB", 6 * GIB), ("5.5 gib", 5.5 * GIB), ("8", 8 * GIB), ("512MB", GIB / 2)]
)
def test_sizes_of_memory_are_binary(text, n_bytes):
    assert memory_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "x", "-6GB", "0", "6PB", "6 GB 2", "1e9"])
@pytest.mark.parametrize(
    "command", [["recommend", "--vram"], ["recommend", "--ram"], ["quantize", "a.pt", "b.gguf", "--target-size"]]
)
def test_what_is_no_size_is_said(command, text, capsys):
    *rest, option = command
    with pytest.raises(SystemExit):
        main([*rest, f"{option}={text}"])
    assert f"{text!r} is no size; write it like" in capsys.readouterr().err
