"""What `inspect` says of a file, and of one that is none."""

import json

import pytest
from gguf_bytes import ARRAY, F32, FLOAT32, STRING, model, pair, string, strings
from gguf_native.__main__ import main
from gguf_native.loader import open_gguf
from gguf_native.ops.formats import FORMATS
from gguf_native.quantizer.inspect_file import Part, group_of, inspect_file, merge_small
from samples import random_blocks


def write(path, tensors, pairs=()):
    path.write_bytes(model(tensors, pairs))
    return path


def packed(name, rows, columns):
    """A tensor as gguf_bytes.model takes it."""
    row = FORMATS[name]
    blocks = random_blocks(name, rows * columns // row.block_size)
    return (columns, rows), row.number, blocks.numpy().tobytes()


def inspected(path):
    with open_gguf(path) as file:
        return inspect_file(file)


def test_counts_of_a_file_made_by_hand(tmp_path):
    tensors = {
        "double_blocks.0.a.weight": packed("Q4_K", 2, 512),
        "double_blocks.1.a.weight": packed("Q8_0", 4, 64),
        "single_blocks.0.b.weight": packed("Q4_K", 1, 256),
        "img_in.weight": ((4,), F32, bytes(16)),
    }
    contents = inspected(write(tmp_path / "a.gguf", tensors, [pair("general.architecture", STRING, string("flux"))]))
    assert contents.whole == Part("all", 4, 1024 + 256 + 256 + 4, 576 + 272 + 144 + 16)
    assert contents.types == [
        Part("Q4_K", 2, 1280, 720),
        Part("Q8_0", 1, 256, 272),
        Part("F32", 1, 4, 16),
    ]
    assert contents.groups == [
        Part("double_blocks", 2, 1280, 848),
        Part("single_blocks", 1, 256, 144),
        Part("others", 1, 4, 16),
    ]
    assert contents.bits_per_weight == pytest.approx(1008 * 8 / 1540)
    assert contents.declared == "flux"
    assert contents.found is None


def test_types_and_groups_each_hold_the_whole(samples):
    contents = inspected(samples.gguf("tiny_flux", "Q4_K"))
    for parts in (contents.types, contents.groups):
        sums = [sum(part[column] for part in parts) for column in (1, 2, 3)]
        assert sums == list(contents.whole[1:])
    assert (contents.found, contents.part) == ("flux", "unet")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("double_blocks.3.img_attn.qkv.weight", "double_blocks"),
        ("model.diffusion_model.input_blocks.4.1.proj_in.weight", "input_blocks"),
        ("enc.blk.11.attn_q.weight", "enc.blk"),
        ("img_in.weight", "others"),
    ],
)
def test_groups_are_named_by_their_blocks(name, group):
    assert group_of(name) == group


def test_small_groups_are_merged():
    groups = [Part("a", 1, 10, 990), Part("b", 2, 5, 9), Part("c", 3, 1, 1)]
    assert merge_small(groups) == [groups[0], Part("others", 5, 6, 10)]


def test_long_metadata_are_shortened_and_infinities_are_json(tmp_path, capsys):
    pairs = [
        pair("tokens", ARRAY, strings(f"t{i}" for i in range(50))),
        pair("text", STRING, string("x" * 5000)),
        pair("number", FLOAT32, b"\x00\x00\x80\x7f"),
        pair("escape", STRING, string("\x1b[31m")),
    ]
    path = write(tmp_path / "a.gguf", {"a": ((4,), F32, bytes(16))}, pairs)
    assert main(["inspect", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["metadata"]["tokens"] == {"items": 50, "first": ["t0", "t1", "t2", "t3"]}
    assert len(data["metadata"]["text"]) < 200
    assert data["metadata"]["number"] == "inf"
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_name_that_the_terminal_would_obey_is_escaped(tmp_path, capsys):
    path = write(tmp_path / "a.gguf", {"\x1b[2J.0.b": ((4,), F32, bytes(16))})
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J" in shown


def test_bars_are_as_long_as_the_shares(samples, capsys):
    assert main(["inspect", str(samples.gguf("tiny_flux", "Q4_K"))]) == 0
    bars = {line.split()[0]: line.count("#") for line in capsys.readouterr().out.splitlines() if "#" in line}
    assert bars["double_blocks"] == pytest.approx(40 * 0.62, abs=1)
    assert sum(bars.values()) == pytest.approx(40, abs=3)


def test_a_split_file_counts_its_parts(tmp_path):
    from gguf_bytes import UINT16

    for number in range(2):
        pairs = [pair("split.no", UINT16, bytes([number, 0])), pair("split.count", UINT16, b"\2\0")]
        write(tmp_path / f"a-{number + 1:05d}-of-00002.gguf", {f"t{number}": ((4,), F32, bytes(16))}, pairs)
    contents = inspected(tmp_path / "a-00001-of-00002.gguf")
    assert (contents.files, contents.whole.tensors) == (2, 2)


def test_safetensors_say_what_to_do(samples, capsys):
    assert main(["inspect", str(samples.sample("tiny_flux"))]) == 2
    assert "with `quantize tiny_flux.safetensors tiny_flux-Q4_K_M.gguf" in capsys.readouterr().err
