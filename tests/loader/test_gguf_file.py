"""Opening GGUF files: what the header says, where the tensors lie, how long the mapping lives, split files, speed."""

import gc
import sys
import time
import warnings
import weakref
from pathlib import Path
from struct import pack

import gguf
import gguf_bytes as g
import pytest
import torch
from gguf_native.loader import GGUFFile, open_gguf
from gguf_native.loader import errors as e
from gguf_native.ops import dequantize
from gguf_native.ops.formats import FORMATS

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps exists on Linux only")

# value type, struct code, value as Python reads it back
NUMBERS = [
    (g.UINT8, "B", 255),
    (g.INT8, "b", -128),
    (g.UINT16, "H", 65_535),
    (g.INT16, "h", -32_768),
    (g.UINT32, "I", 2**32 - 1),
    (g.INT32, "i", -(2**31)),
    (g.FLOAT32, "f", -1.5),
    (g.BOOL, "?", True),
    (g.UINT64, "Q", 2**64 - 1),
    (g.INT64, "q", -(2**63)),
    (g.FLOAT64, "d", 0.1),
]


def bytes_for(type_name: str, n_values: int, seed: int = 0) -> bytes:
    """Random bytes for `n_values` values of a type."""
    tensor_type = FORMATS[type_name]
    n_bytes = n_values // tensor_type.block_size * tensor_type.block_bytes
    return torch.randint(256, (n_bytes,), dtype=torch.uint8, generator=torch.manual_seed(seed)).numpy().tobytes()


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with a vocabulary and two tensors."""
    pairs = [
        g.pair("general.architecture", g.STRING, g.string("flux")),
        g.pair("tokens", g.ARRAY, g.strings(["a", "", "\u00e9\u00e9", "d\0e"])),
    ]
    tensors = {"a": ((32, 3), g.Q8_0, bytes_for("Q8_0", 96)), "b.weight": ((5,), g.F32, bytes_for("F32", 5, 1))}
    return write(tmp_path / "small.gguf", g.model(tensors, pairs))


@pytest.mark.parametrize(("value_type", "code", "value"), NUMBERS)
def test_numbers_and_arrays_of_numbers(value_type: int, code: str, value: float, tmp_path: Path) -> None:
    one, many = pack("<" + code, value), pack(f"<3{code}", value, 0, 1)
    pairs = [g.pair("one", value_type, one), g.pair("many", g.ARRAY, g.array(value_type, 3, many))]
    with open_gguf(write(tmp_path / "numbers.gguf", g.file(pairs))) as file:
        assert file.metadata["one"] == value and type(file.metadata["one"]) is type(value)
        assert file.metadata["many"] == [value, 0, 1] and {type(x) for x in file.metadata["many"]} == {type(value)}


def test_strings(small: Path) -> None:
    with open_gguf(small) as file:
        assert dict(file.metadata) == {"general.architecture": "flux", "tokens": ["a", "", "\u00e9\u00e9", "d\0e"]}


def test_arrays_are_decoded_only_when_asked_for(tmp_path: Path) -> None:
    pairs = [g.pair("tokens", g.ARRAY, g.strings([b"\xff"])), g.pair("last", g.UINT8, b"\1")]
    with open_gguf(write(tmp_path / "lazy.gguf", g.file(pairs))) as file:
        assert list(file.metadata) == ["tokens", "last"] and len(file.metadata) == 2
        assert "tokens" in file.metadata and "absent" not in file.metadata
        assert file.metadata["last"] == 1
        with pytest.raises(e.StringEncodingError, match=r"lazy\.gguf: item 0 of the value of key 'tokens'"):
            file.metadata["tokens"]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("type_name", FORMATS)
def test_every_type_and_version(type_name: str, version: int, tmp_path: Path) -> None:
    tensor_type = FORMATS[type_name]
    columns = 3 * tensor_type.block_size
    first, second = bytes_for(type_name, columns * 7), bytes_for(type_name, columns * 2, 1)
    tensors = {"x": ((columns, 7), tensor_type.number, first), "y": ((columns, 1, 2), tensor_type.number, second)}
    path = write(tmp_path / "types.gguf", g.model(tensors, version=version))
    with open_gguf(path) as file:
        assert [(i.name, i.type, i.shape, i.path) for i in file.tensors.values()] == [
            ("x", type_name, (7, columns), path),
            ("y", type_name, (2, 1, columns), path),
        ]
        for name, raw in (("x", first), ("y", second)):
            info = file.tensors[name]
            assert info.nbytes == len(raw)
            assert path.read_bytes()[info.offset : info.offset + info.nbytes] == raw
            assert file.read(name).numpy().tobytes() == raw


@pytest.mark.parametrize("dims", [(), (1,), (2, 3), (2, 3, 5), (2, 3, 5, 7), (2, 3, 5, 7, 2)])
def test_shape_is_in_torch_order(dims: tuple[int, ...], tmp_path: Path) -> None:
    n_values = torch.Size(dims).numel()
    with open_gguf(write(tmp_path / "dims.gguf", g.model({"w": (dims, g.F16, bytes(2 * n_values))}))) as file:
        assert file.tensors["w"].shape == dims[::-1]
        assert file.read("w").shape == (2 * n_values,)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment(alignment: int, tmp_path: Path) -> None:
    raws = {f"t{n}": bytes_for("F32", n, n) for n in (1, 3, 11)}
    pairs = [g.pair("general.alignment", g.UINT32, pack("<I", alignment))]
    tensors = {name: ((len(raw) // 4,), g.F32, raw) for name, raw in raws.items()}
    with open_gguf(write(tmp_path / "aligned.gguf", g.model(tensors, pairs, alignment))) as file:
        assert all(info.offset % alignment == 0 for info in file.tensors.values())
        assert {name: file.read(name).numpy().tobytes() for name in file.tensors} == raws


def test_tensors_out_of_order_with_gaps(tmp_path: Path) -> None:
    infos = [g.info("late", (8,), offset=96), g.info("early", (8,), offset=0)]
    data = b"e" * 32 + b"-" * 64 + b"l" * 32
    with open_gguf(write(tmp_path / "order.gguf", g.file([], infos, data))) as file:
        assert bytes(file.read("late").tolist()) == b"l" * 32
        assert bytes(file.read("early").tolist()) == b"e" * 32


def test_read_is_a_view_with_a_storage_of_its_own_and_no_warning(small: Path) -> None:
    torch.set_warn_always(True)
    try:
        with open_gguf(small) as file, warnings.catch_warnings():
            warnings.simplefilter("error")
            tensors = {name: file.read(name) for name in file.tensors}
            infos = dict(file.tensors)
    finally:
        torch.set_warn_always(False)
    a, b = tensors["a"], tensors["b.weight"]
    assert b.data_ptr() - a.data_ptr() == infos["b.weight"].offset - infos["a"].offset
    for name, tensor in tensors.items():
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() == infos[name].nbytes


def test_tensors_outlive_the_file(small: Path) -> None:
    with open_gguf(small) as file:
        tensor = file.read("a")
    del file
    gc.collect()
    assert tensor.numpy().tobytes() == bytes_for("Q8_0", 96)


@LINUX
def test_mapping_goes_with_the_last_tensor(small: Path) -> None:
    file = open_gguf(small)
    mapping = weakref.ref(file.mapping("a"))
    first, second = file.read("a"), file.read("b.weight")[2:4]
    file.close()
    del first
    assert mapping() is not None and is_mapped(small)
    del second
    assert mapping() is None and not is_mapped(small)
    assert str(small) not in {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


@LINUX
def test_mapping_goes_when_the_file_is_forgotten_or_refused(small: Path, tmp_path: Path) -> None:
    open_gguf(small)
    cut = write(tmp_path / "cut.gguf", small.read_bytes()[:-30])
    with pytest.raises(e.TruncatedFileError):
        open_gguf(cut)
    gc.collect()
    assert not is_mapped(small) and not is_mapped(cut)


def test_the_file_is_never_written(small: Path) -> None:
    file = open_gguf(small)
    with pytest.raises(TypeError):
        file.mapping("a")[0] = 0
    file.close()
    small.unlink()


def test_after_close(small: Path) -> None:
    decoded, untouched = open_gguf(small), open_gguf(small)
    assert decoded.metadata["tokens"][0] == "a"
    decoded.close()
    untouched.close()
    untouched.close()
    assert decoded.metadata["tokens"][0] == "a" and list(decoded.tensors) == ["a", "b.weight"]
    for ask in (lambda: decoded.read("a"), lambda: decoded.mapping("a"), lambda: untouched.metadata["tokens"]):
        with pytest.raises(e.ClosedFileError, match=r"small\.gguf: .* after the file was closed"):
            ask()


def test_a_tensor_that_is_not_there(small: Path) -> None:
    with open_gguf(small) as file, pytest.raises(e.MissingTensorError, match=r"no tensor 'c'; .* the 2 it has"):
        file.read("c")


@pytest.mark.parametrize("name", ["absent.gguf", "."], ids=["no file", "a folder"])
def test_unreadable(name: str, tmp_path: Path) -> None:
    with pytest.raises(e.FileUnreadableError, match="cannot be opened"):
        open_gguf(tmp_path / name)


def test_a_cut_download_says_how_much_is_missing(small: Path) -> None:
    whole = small.read_bytes()
    data_end = len(whole) - 12  # the last tensor's 20 bytes are padded to 32
    small.write_bytes(whole[: data_end - 17])
    with pytest.raises(e.TruncatedFileError, match=r"small\.gguf: 17 bytes are missing: tensor 'b\.weight'") as caught:
        open_gguf(small)
    assert caught.value.missing_bytes == 17


def write_parts(folder: Path, n_parts: int = 3, n_tensors: int = 5, **said: int) -> list[Path]:
    """A model of `n_tensors` F32 tensors t0, t1, ... of four values, dealt out to parts; `said` overrides the keys."""
    values = {"count": n_parts, "total": n_tensors, **said}
    paths = []
    for part in range(n_parts):
        pairs = [
            g.pair("split.no", g.UINT16, pack("<H", part)),
            g.pair("split.count", g.UINT16, pack("<H", values["count"] if part == n_parts - 1 else n_parts)),
            g.pair("split.tensors.count", g.INT32, pack("<i", values["total"])),
            g.pair("part", g.UINT8, pack("<B", part)),
        ]
        tensors = {f"t{n}": ((4,), g.F32, pack("<4f", *[n] * 4)) for n in range(part, n_tensors, n_parts)}
        paths.append(write(folder / f"big-model-{part + 1:05d}-of-{n_parts:05d}.gguf", g.model(tensors, pairs)))
    return paths


def test_split_file_opens_through_its_first_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    with open_gguf(paths[0]) as file:
        tensors = {name: file.read(name) for name in file.tensors}
        assert file.metadata["part"] == 0
        assert {name: info.path for name, info in file.tensors.items()} == {f"t{n}": paths[n % 3] for n in range(5)}
        assert len({id(file.mapping(name)) for name in file.tensors}) == 3
    assert {name: t.view(torch.float32).tolist() for name, t in tensors.items()} == {f"t{n}": [n] * 4 for n in range(5)}


def test_split_file_opened_through_a_later_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    with pytest.raises(e.NotFirstShardError, match=r"part 2 of 3 .* Open big-model-00001-of-00003\.gguf instead"):
        open_gguf(paths[1])


def test_split_file_without_its_other_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    paths[2].unlink()
    with pytest.raises(e.MissingShardError, match=r"2 of 3 parts are missing: big-model-00002-of-00003\.gguf, big"):
        open_gguf(paths[0])


def test_split_file_with_a_part_of_another_name(tmp_path: Path) -> None:
    renamed = write_parts(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(e.ShardNameError, match=r"model\.gguf: .* must end in -00001-of-00003\.gguf"):
        open_gguf(renamed)


def test_split_file_with_a_part_of_another_split(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, count=4)
    with pytest.raises(e.ShardMismatchError, match=r"00003\.gguf: says it is part 3 of 4; expected part 3 of 3"):
        open_gguf(paths[0])


def test_split_file_that_lacks_tensors(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, total=6)
    with pytest.raises(e.ShardMismatchError, match=r"hold 5 tensors together; 'split\.tensors\.count' says 6"):
        open_gguf(paths[0])


def test_split_file_with_a_tensor_twice(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, n_parts=2)
    pairs = [g.pair("split.no", g.UINT16, b"\1\0"), g.pair("split.count", g.UINT16, b"\2\0")]
    paths[1].write_bytes(g.model({"t0": ((4,), g.F32, bytes(16))}, pairs))
    with pytest.raises(e.DuplicateTensorError, match=r"00002\.gguf: tensor 't0' is also in big-model-00001"):
        open_gguf(paths[0])


def test_split_file_with_a_cut_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    with pytest.raises(e.TruncatedFileError, match=r"big-model-00003-of-00003\.gguf: 4 bytes are missing"):
        open_gguf(paths[0])


def test_opens_800_tensors_and_260_000_tokens_in_50_ms(tmp_path: Path) -> None:
    tokens = [f"token{n}" for n in range(260_000)]
    pairs = [
        g.pair("tokenizer.ggml.tokens", g.ARRAY, g.strings(tokens)),
        g.pair("tokenizer.ggml.scores", g.ARRAY, g.array(g.FLOAT32, len(tokens), bytes(4 * len(tokens)))),
        g.pair("tokenizer.ggml.token_type", g.ARRAY, g.array(g.INT32, len(tokens), bytes(4 * len(tokens)))),
    ]
    tensors = {f"double_blocks.{n}.img_attn.qkv.weight": ((256, 4), 12, bytes(4 * 144)) for n in range(800)}
    path = write(tmp_path / "vocabulary.gguf", g.model(tensors, pairs))
    best = min(cpu_seconds_to_open(path) for _ in range(5))
    with open_gguf(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert best < 0.05


def cpu_seconds_to_open(path: Path) -> float:
    started = time.process_time()
    with open_gguf(path):
        return time.process_time() - started


def test_a_file_of_llama_cpp(smollm2: Path) -> None:
    reference = gguf.GGUFReader(smollm2)
    with open_gguf(smollm2) as file:
        assert file.metadata["general.architecture"] == "llama"
        types = [info.type for info in file.tensors.values()]
        assert {name: types.count(name) for name in types} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert [(i.name, i.type, i.shape, i.offset, i.nbytes) for i in file.tensors.values()] == [
            (t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes)
            for t in reference.tensors
        ]
        for tensor in reference.tensors[::34]:
            info, data = file.tensors[tensor.name], file.read(tensor.name)
            assert data.numpy().tobytes() == tensor.data.tobytes()
            values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(dequantize(data, info.type, info.shape), values.view(info.shape))
        keys = [key for key in reference.fields if not key.startswith(("GGUF.", "tokenizer.ggml.tokens"))]
        assert len(keys) > 25
        assert {key: file.metadata[key] for key in keys} == {key: reference.fields[key].contents() for key in keys}
        tokens = file.metadata["tokenizer.ggml.tokens"]
        field = reference.fields["tokenizer.ggml.tokens"]
        assert len(tokens) == len(field.data) == 49_152
        assert tokens[::997] == [bytes(field.parts[n]).decode() for n in field.data[::997]]


def test_an_unfinished_download_of_a_file_of_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    size = smollm2.stat().st_size
    with smollm2.open("rb") as file:
        cut = write(tmp_path / "download.gguf", file.read(5_000_000))
    with pytest.raises(e.TruncatedFileError) as caught:
        open_gguf(cut)
    assert caught.value.missing_bytes == size - 5_000_000


def test_open_gguf_gives_a_gguf_file(small: Path) -> None:
    with open_gguf(str(small)) as file:
        assert isinstance(file, GGUFFile) and file.path == small and file.name == "small.gguf"
