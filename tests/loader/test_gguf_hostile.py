"""Every way a GGUF file can be broken, by hand and by chance: the named error, at once, in little memory."""

import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import NamedTuple

import gguf_bytes as g
import pytest
from gguf_native.loader import GGUFError, open_gguf
from gguf_native.loader import errors as e

ACCEPT = None
SPARE_BYTES = 256 * 1024


class Case(NamedTuple):
    """One file: what is wrong, its bytes, the error it must raise, and why where that could be decided otherwise."""

    id: str
    build: Callable[[], bytes]
    expected: type[GGUFError] | None
    decision: str = ""


def one_tensor(
    dims: tuple[int, ...] = (8, 2), type_number: int = g.F32, offset: int = 0, data: bytes = bytes(64)
) -> bytes:
    """A file with one tensor, by default whole: 16 values of F32."""
    return g.file([], [g.info("w", dims, type_number, offset)], data)


def one_pair(value_type: int, payload: bytes, key: str | bytes = "k") -> bytes:
    """A file with one key-value pair and one tensor."""
    return g.file([g.pair(key, value_type, payload)], [g.info("w", (16,))], bytes(64))


def aligned(alignment: int, value_type: int = g.UINT32, code: str = "I") -> bytes:
    """A file that names its alignment; the data is padded to a valid one."""
    pair = g.pair("general.alignment", value_type, pack("<" + code, alignment))
    return g.file([pair], [g.info("w", (16,))], bytes(64), alignment=65_536)


def short_string_array(count: int) -> bytes:
    """A file that ends after the first string of an array of `count`."""
    return g.header([g.pair("k", g.ARRAY, g.array(g.STRING, count, g.string("12345678")))], [])


def two_tensors(first: int, second: int, data: bytes) -> bytes:
    """Two tensors of 16 F32 values at the given offsets."""
    return g.file([], [g.info("a", (16,), offset=first), g.info("b", (16,), offset=second)], data)


def named(name: str | bytes) -> bytes:
    """A file with one tensor of this name."""
    return g.file([], [g.info(name, (16,))], bytes(64))


GOOD = g.model({"a": ((32, 2), g.Q8_0, bytes(68)), "b": ((5,), g.F32, bytes(20))})

HEADER_CASES = [
    Case("empty", lambda: b"", e.TruncatedFileError),
    Case("3_bytes", lambda: b"GGU", e.TruncatedFileError),
    Case("3_other_bytes", lambda: b"abc", e.NotGGUFError),
    Case("magic_only", lambda: b"GGUF", e.TruncatedFileError),
    Case("bad_magic", lambda: b"GGUE" + GOOD[4:], e.NotGGUFError),
    Case("lfs_pointer", lambda: b"version https://git-lfs.github.com/spec/v1\n", e.NotGGUFError),
    Case("web_page", lambda: b"<!DOCTYPE html><html></html>", e.NotGGUFError),
    Case("version_0", lambda: g.header([], [], version=0), e.UnsupportedVersionError),
    Case("version_1", lambda: g.header([], [], version=1), e.UnsupportedVersionError),
    Case("version_2", lambda: g.file(version=2), ACCEPT),
    Case("version_3", lambda: g.file(), ACCEPT, "a file of neither keys nor tensors is whole"),
    Case("version_4", lambda: g.header([], [], version=4), e.UnsupportedVersionError),
    Case("version_2^32-1", lambda: g.header([], [], version=2**32 - 1), e.UnsupportedVersionError),
    Case("big_endian_3", lambda: b"GGUF" + pack(">IQQ", 3, 0, 0), e.BigEndianError),
    Case("big_endian_2", lambda: g.header([], [], version=0x02000000), e.BigEndianError),
    Case("n_tensors_2^63", lambda: g.header([], [], n_infos=2**63), e.CountError),
    Case("n_tensors_-1", lambda: g.header([], [], n_infos=-1), e.CountError),
    Case("n_tensors_2^32", lambda: g.header([], [], n_infos=2**32), e.CountError),
    Case("n_tensors_5e8", lambda: g.header([], [], n_infos=500_000_000), e.CountError),
    Case("n_tensors_5000", lambda: g.header([], [], n_infos=5000), e.TruncatedFileError, "believable: a cut header"),
    Case("n_tensors_+1", lambda: g.file([], [g.info("w", (16,))], bytes(64), n_infos=2), e.TensorNameError),
    Case("n_tensors_-1_of_1", lambda: g.file([], [g.info("w", (16,))], bytes(64), n_infos=0), ACCEPT, "trailing junk"),
    Case("n_kv_2^63", lambda: g.header([], [], n_pairs=2**63), e.CountError),
    Case("n_kv_-1", lambda: g.header([], [], n_pairs=-1), e.CountError),
    Case("n_kv_2^32", lambda: g.header([], [], n_pairs=2**32), e.CountError),
    Case("n_kv_5e8", lambda: g.header([], [], n_pairs=500_000_000), e.CountError),
    Case("n_kv_+1", lambda: g.header([g.pair("k", g.UINT8, b"\1")], [], n_pairs=2), e.TruncatedFileError),
]

KEY_CASES = [
    Case("key_length_2^63", lambda: g.header([pack("<Q", 2**63)], []), e.KeyNameError),
    Case("key_length_2^64-1", lambda: g.header([pack("<Q", 2**64 - 1)], []), e.KeyNameError),
    Case("key_length_1GiB+1", lambda: g.header([pack("<Q", 2**30 + 1)], []), e.KeyNameError),
    Case("key_length_65535", lambda: one_pair(g.UINT8, b"\1", "k" * 65_535), ACCEPT, "the specification's limit"),
    Case("key_length_65536", lambda: one_pair(g.UINT8, b"\1", "k" * 65_536), e.KeyNameError),
    Case("key_empty", lambda: one_pair(g.UINT8, b"\1", ""), e.KeyNameError),
    Case("key_duplicate", lambda: g.header([g.pair("k", g.UINT8, b"\1")] * 2, []), e.DuplicateKeyError),
    Case("key_not_utf8", lambda: one_pair(g.UINT8, b"\1", b"k\xff"), e.KeyNameError),
    Case("key_umlaut", lambda: one_pair(g.UINT8, b"\1", "\u00f6"), ACCEPT, "spec: ASCII; orig_shape keys hold names"),
    Case("key_nul", lambda: one_pair(g.UINT8, b"\1", "k\0"), ACCEPT, "a key is looked up, never cut at NUL"),
]

VALUE_CASES = [
    Case("value_not_utf8", lambda: one_pair(g.STRING, g.string(b"\xc3(")), e.StringEncodingError),
    Case("value_nul", lambda: one_pair(g.STRING, g.string("a\0b")), ACCEPT),
    Case("value_empty", lambda: one_pair(g.STRING, g.string("")), ACCEPT),
    Case("value_type_13", lambda: one_pair(13, bytes(8)), e.UnknownValueTypeError),
    Case("value_type_99", lambda: one_pair(99, bytes(8)), e.UnknownValueTypeError),
    Case("value_type_-1", lambda: one_pair(-1, bytes(8)), e.UnknownValueTypeError),
    Case("string_length_2^63", lambda: one_pair(g.STRING, pack("<Q", 2**63)), e.StringLengthError),
    Case("string_length_wraps", lambda: one_pair(g.STRING, pack("<Q", 2**64 - 8)), e.StringLengthError),
    Case("string_length_1e6", lambda: one_pair(g.STRING, pack("<Q", 10**6)), e.TruncatedFileError, "believable: cut"),
    Case("bool_0", lambda: one_pair(g.BOOL, b"\0"), ACCEPT),
    Case("bool_7", lambda: one_pair(g.BOOL, b"\7"), e.BoolValueError),
    Case("float_nan", lambda: one_pair(g.FLOAT32, pack("<f", float("nan"))), ACCEPT),
    Case("alignment_0", lambda: aligned(0), e.AlignmentError),
    Case("alignment_3", lambda: aligned(3), e.AlignmentError),
    Case("alignment_4", lambda: aligned(4), e.AlignmentError, "the specification asks for a multiple of 8"),
    Case("alignment_8", lambda: aligned(8), ACCEPT),
    Case("alignment_48", lambda: aligned(48), e.AlignmentError),
    Case("alignment_65536", lambda: aligned(65_536), ACCEPT, "the largest page size in use"),
    Case("alignment_2^17", lambda: aligned(2**17), e.AlignmentError),
    Case("alignment_2^30", lambda: aligned(2**30), e.AlignmentError),
    Case("alignment_2^31", lambda: aligned(2**31), e.AlignmentError),
    Case("alignment_u64", lambda: aligned(32, g.UINT64, "Q"), e.AlignmentError, "llama.cpp asks for UINT32 too"),
    Case("alignment_i32", lambda: aligned(32, g.INT32, "i"), e.AlignmentError),
    Case("alignment_string", lambda: one_pair(g.STRING, g.string("32"), "general.alignment"), e.AlignmentError),
    Case("arch_number", lambda: one_pair(g.UINT8, b"\1", "general.architecture"), ACCEPT, "a hint, never a condition"),
    Case("arch_1MB", lambda: one_pair(g.STRING, g.string("x" * 10**6), "general.architecture"), ACCEPT),
    Case("arch_homoglyph", lambda: one_pair(g.STRING, g.string("fl\u03c5x"), "general.architecture"), ACCEPT),
]

ARRAY_CASES = [
    Case("array_2^63_u8", lambda: one_pair(g.ARRAY, g.array(g.UINT8, 2**63)), e.ArrayLengthError),
    Case("array_2^63_string", lambda: one_pair(g.ARRAY, g.array(g.STRING, 2**63)), e.ArrayLengthError),
    Case("array_2^62_u32", lambda: one_pair(g.ARRAY, g.array(g.UINT32, 2**62)), e.ArrayLengthError),
    Case("array_5e7_u8", lambda: one_pair(g.ARRAY, g.array(g.UINT8, 50_000_000)), e.TruncatedFileError, "believable"),
    Case("array_5e7_string", lambda: one_pair(g.ARRAY, g.array(g.STRING, 50_000_000)), e.ArrayLengthError),
    Case("array_1e6_string", lambda: one_pair(g.ARRAY, g.array(g.STRING, 10**6)), e.TruncatedFileError, "believable"),
    Case("array_depth_2", lambda: one_pair(g.ARRAY, g.array(g.ARRAY, 1, g.array(g.UINT8, 0))), e.NestedArrayError),
    Case("array_depth_1e5", lambda: one_pair(g.ARRAY, g.array(g.ARRAY, 1) * 10**5), e.NestedArrayError),
    Case("array_element_99", lambda: one_pair(g.ARRAY, g.array(99, 1, bytes(8))), e.UnknownValueTypeError),
    Case("array_element_-1", lambda: one_pair(g.ARRAY, g.array(-1, 1, bytes(8))), e.UnknownValueTypeError),
    Case("array_empty", lambda: one_pair(g.ARRAY, g.array(g.UINT8, 0)), ACCEPT),
    Case("array_empty_string", lambda: one_pair(g.ARRAY, g.strings([])), ACCEPT),
    Case("array_empty_of_99", lambda: one_pair(g.ARRAY, g.array(99, 0)), e.UnknownValueTypeError, "even with no item"),
    Case("array_bool_7", lambda: one_pair(g.ARRAY, g.array(g.BOOL, 2, b"\1\7")), e.BoolValueError, "when asked for"),
    Case("array_not_utf8", lambda: one_pair(g.ARRAY, g.strings([b"\xff"])), e.StringEncodingError, "when asked for"),
    Case("array_string_ends", lambda: short_string_array(2), e.TruncatedFileError, "the file ends where item 2 should"),
    Case("array_string_whole", lambda: short_string_array(1), ACCEPT),
    Case("array_string_2^63", lambda: one_pair(g.ARRAY, g.array(g.STRING, 1, pack("<Q", 2**63))), e.StringLengthError),
    Case(
        "array_string_wraps",
        lambda: one_pair(g.ARRAY, g.array(g.STRING, 2, pack("<Q", 2**64 - 8) + g.string(""))),
        e.StringLengthError,
    ),
    Case("array_string_count", lambda: one_pair(g.ARRAY, g.array(g.STRING, 9, g.string("ab"))), e.StringLengthError),
]

SHAPE_KEY = "comfy.gguf.orig_shape.w"
ORIGINAL_SHAPE_CASES = [
    Case("orig_shape_i64", lambda: one_pair(g.ARRAY, g.array(g.INT64, 1, pack("<q", 16)), SHAPE_KEY), ACCEPT),
    Case("orig_shape_huge", lambda: one_pair(g.ARRAY, g.array(g.INT32, 2, b"\xff\xff\xff\x7f" * 2), SHAPE_KEY), ACCEPT),
    Case("orig_shape_negative", lambda: one_pair(g.ARRAY, g.array(g.INT32, 1, b"\xff" * 4), SHAPE_KEY), ACCEPT),
    Case("orig_shape_string", lambda: one_pair(g.STRING, g.string("16"), SHAPE_KEY), ACCEPT, "the loader's to judge"),
    Case("orig_shape_absent", lambda: one_pair(g.ARRAY, g.array(g.INT32, 1, bytes(4)), SHAPE_KEY + "x"), ACCEPT),
]

NAME_CASES = [
    Case("name_length_2^63", lambda: g.header([], [pack("<Q", 2**63)]), e.TensorNameError),
    Case("name_empty", lambda: named(""), e.TensorNameError),
    Case("name_64", lambda: named("n" * 64), ACCEPT, "llama.cpp stops at 63, the other converters at 127"),
    Case("name_127", lambda: named("n" * 127), ACCEPT),
    Case("name_128", lambda: named("n" * 128), ACCEPT),
    Case("name_65535", lambda: named("n" * 65_535), ACCEPT, "as long as a key, which may contain it"),
    Case("name_1MB", lambda: named("n" * 10**6), e.TensorNameError),
    Case("name_not_utf8", lambda: named(b"\xfe\xfe"), e.TensorNameError),
    Case("name_like_a_path", lambda: named("../../etc/passwd"), ACCEPT, "a key of a mapping, never a path"),
    Case("name_duplicate", lambda: g.file([], [g.info("w", (16,))] * 2, bytes(64)), e.DuplicateTensorError),
]

SHAPE_CASES = [
    Case("n_dims_0", lambda: one_tensor(()), ACCEPT, "a scalar"),
    Case("n_dims_0_of_blocks", lambda: one_tensor((), g.Q8_0), e.RowSizeError),
    Case("n_dims_5", lambda: one_tensor((2, 2, 2, 2, 1)), ACCEPT, "patch embeddings of video models"),
    Case("n_dims_6", lambda: one_tensor((1, 1, 1, 1, 1, 1)), e.DimensionCountError),
    Case("n_dims_9", lambda: one_tensor((1,) * 9), e.DimensionCountError),
    Case("n_dims_1e6", lambda: g.header([], [g.string("w") + pack("<I", 10**6)]), e.DimensionCountError),
    Case("n_dims_2^32-1", lambda: g.header([], [g.string("w") + pack("<I", 2**32 - 1)]), e.DimensionCountError),
    Case("dim_0", lambda: one_tensor((0,)), e.TensorShapeError, "no model has an empty weight; ggml accepts it"),
    Case("dim_0_of_2", lambda: one_tensor((16, 0)), e.TensorShapeError),
    Case("dim_0_hides_2^64", lambda: one_tensor((2**63, 2, 0)), e.TensorShapeError),
    Case("dim_negative", lambda: one_tensor((-16,)), e.TensorShapeError),
    Case("dim_2^62", lambda: one_tensor((2**62,)), e.TensorShapeError),
    Case("dims_wrap_to_4", lambda: one_tensor((2**62 + 1, 4)), e.TensorShapeError),
    Case("dims_2^32_x_2^32", lambda: one_tensor((2**32, 2**32)), e.TensorShapeError),
    Case("dims_int64_max_x_2", lambda: one_tensor((2**63 - 1, 2)), e.TensorShapeError),
    Case("nbytes_wraps_to_0", lambda: one_tensor((2**32, 2**30)), e.TensorShapeError),
    Case("padded_size_wraps", lambda: one_tensor((2**62 - 1,)), e.TensorShapeError),
    Case("dims_2^40", lambda: one_tensor((2**40,)), e.TensorShapeError),
    Case("dims_2^38", lambda: one_tensor((2**38,)), e.TruncatedFileError, "1 TiB is believable: a cut download"),
    Case("row_not_a_block", lambda: one_tensor((33,), g.Q8_0), e.RowSizeError),
    Case("row_shorter_than_a_block", lambda: one_tensor((16, 2), g.Q8_0), e.RowSizeError),
    Case("row_not_a_k_block", lambda: one_tensor((1000, 4), 12), e.RowSizeError),
    Case("type_Q4_2", lambda: one_tensor((256,), 4), e.UnsupportedTensorTypeError),
    Case("type_Q4_3", lambda: one_tensor((256,), 5), e.UnsupportedTensorTypeError),
    Case("type_Q8_1", lambda: one_tensor((256,), 9), e.UnsupportedTensorTypeError, "never in files; ggml accepts it"),
    Case("type_Q8_K", lambda: one_tensor((256,), 15), e.UnsupportedTensorTypeError, "never in files"),
    Case("type_Q4_0_4_4", lambda: one_tensor((256,), 31), e.UnsupportedTensorTypeError),
    Case("type_Q4_0_4_8", lambda: one_tensor((256,), 32), e.UnsupportedTensorTypeError),
    Case("type_Q4_0_8_8", lambda: one_tensor((256,), 33), e.UnsupportedTensorTypeError),
    Case("type_IQ4_NL_4_4", lambda: one_tensor((256,), 36), e.UnsupportedTensorTypeError),
    Case("type_IQ4_NL_4_8", lambda: one_tensor((256,), 37), e.UnsupportedTensorTypeError),
    Case("type_IQ4_NL_8_8", lambda: one_tensor((256,), 38), e.UnsupportedTensorTypeError),
    Case("type_Q1_0", lambda: one_tensor((256,), 41), e.UnsupportedTensorTypeError, "newer than what we decode"),
    Case("type_Q2_0", lambda: one_tensor((256,), 42), e.UnsupportedTensorTypeError, "newer than what we decode"),
    Case("type_43", lambda: one_tensor((256,), 43), e.UnknownTensorTypeError),
    Case("type_9999", lambda: one_tensor((256,), 9999), e.UnknownTensorTypeError),
    Case("type_-1", lambda: one_tensor((256,), -1), e.UnknownTensorTypeError),
]

PLACE_CASES = [
    Case("offset_unaligned", lambda: one_tensor(offset=4, data=bytes(96)), e.MisalignedOffsetError),
    Case("offset_past_end", lambda: one_tensor(offset=32 * 100), e.TruncatedFileError, "believable: a cut download"),
    Case("offset_-1", lambda: one_tensor(offset=-1), e.TensorOffsetError),
    Case("offset_wraps_into_header", lambda: one_tensor(offset=-64), e.TensorOffsetError),
    Case("offset_2^63", lambda: one_tensor(offset=2**63), e.TensorOffsetError),
    Case("overlap_same_place", lambda: two_tensors(0, 0, bytes(64)), e.OverlapError, "no writer ties weights"),
    Case("overlap_by_half", lambda: two_tensors(32, 0, bytes(96)), e.OverlapError),
    Case("out_of_order", lambda: two_tensors(64, 0, bytes(128)), ACCEPT, "llama.cpp refuses; editors write it"),
    Case("gap", lambda: two_tensors(0, 640, bytes(704)), ACCEPT, "llama.cpp refuses; editors write it"),
    Case("data_cut_by_1", lambda: one_tensor(data=bytes(63)), e.TruncatedFileError),
    Case("data_missing", lambda: one_tensor(data=b""), e.TruncatedFileError),
    Case("last_padding_missing", lambda: GOOD[:-12], ACCEPT, "no byte of a tensor is missing"),
    Case("trailing_junk", lambda: GOOD + b"junk" * 100, ACCEPT),
    Case("nan_and_inf_scales", lambda: one_tensor((32, 2), g.Q8_0, 0, b"\xff" * 34 + b"\0\x7c" + bytes(32)), ACCEPT),
]

SPLIT_CASES = [
    Case("lone_part_without_a_name", lambda: split_file(pack("<H", 0), pack("<H", 3)), e.ShardNameError),
    Case("lone_part_of_65535", lambda: split_file(pack("<H", 65_534), pack("<H", 65_535)), e.ShardNameError),
    Case("split_of_one", lambda: split_file(pack("<H", 0), pack("<H", 1)), ACCEPT),
    Case("split_of_none", lambda: split_file(pack("<H", 0), pack("<H", 0)), ACCEPT, "what gguf-split --merge leaves"),
    Case("split_count_string", lambda: one_pair(g.STRING, g.string("3"), "split.count"), e.ShardMismatchError),
]

CASES = [
    *HEADER_CASES,
    *KEY_CASES,
    *VALUE_CASES,
    *ARRAY_CASES,
    *ORIGINAL_SHAPE_CASES,
    *NAME_CASES,
    *SHAPE_CASES,
    *PLACE_CASES,
    *SPLIT_CASES,
]


def split_file(number: bytes, count: bytes) -> bytes:
    """A file that says it is a part."""
    pairs = [g.pair("split.no", g.UINT16, number), g.pair("split.count", g.UINT16, count)]
    return g.file(pairs, [g.info("w", (16,))], bytes(64))


def use_everything(path: Path) -> int:
    """Open a file, decode all its metadata and touch every byte of its tensors; the number of tensors."""
    with open_gguf(path) as gguf_file:
        dict(gguf_file.metadata)
        for name, info in gguf_file.tensors.items():
            assert gguf_file.read(name).sum() >= 0
            assert gguf_file.read(name).shape == (info.nbytes,)
        return len(gguf_file.tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_hostile_file(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(case.build())
    tracemalloc.start()
    started = time.perf_counter()
    try:
        if case.expected is ACCEPT:
            use_everything(path)
        else:
            with pytest.raises(GGUFError) as caught:
                use_everything(path)
            assert type(caught.value) is case.expected
            assert str(caught.value).startswith("hostile.gguf: ")
            assert len(str(caught.value)) < 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 1
    assert peak < 4 * path.stat().st_size + SPARE_BYTES


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)


def test_the_table_raises_every_kind_that_a_header_can_raise() -> None:
    kinds = {kind for family in (e.HeaderError, e.MetadataError, e.TensorError) for kind in family.__subclasses__()}
    assert kinds - {case.expected for case in CASES} == {e.MissingTensorError}


def rich_file() -> bytes:
    """A small file with every value type, three tensor types and gaps between them."""
    numbers = zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True)
    pairs = [g.pair(f"number.{kind}", kind, pack("<" + code, 7)) for kind, code in numbers]
    pairs += [
        g.pair("general.architecture", g.STRING, g.string("flux")),
        g.pair("flag", g.BOOL, b"\1"),
        g.pair("tokens", g.ARRAY, g.strings(["a", "bc", "", "\u00e9"])),
        g.pair("shape", g.ARRAY, g.array(g.INT32, 3, pack("<3i", 4, 5, 6))),
        g.pair("flags", g.ARRAY, g.array(g.BOOL, 2, b"\0\1")),
    ]
    tensors = {"a": ((32, 3), g.Q8_0, bytes(102)), "b": ((7,), g.F32, bytes(28)), "c": ((32, 1, 2), g.Q4_0, bytes(36))}
    return g.model(tensors, pairs)


def test_every_cut_is_a_truncated_download(tmp_path: Path) -> None:
    whole = rich_file()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole) - 28):
        path.write_bytes(whole[:size])
        with pytest.raises(e.TruncatedFileError) as caught:
            open_gguf(path)
        assert 0 < caught.value.missing_bytes <= len(whole) - size


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """`whole` with one to four bytes replaced, sometimes cut."""
    broken = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        broken[chance.randrange(len(broken))] = chance.choice((0, 1, 7, 127, 128, 255, chance.randrange(256)))
    return bytes(broken[: chance.randrange(len(broken))] if chance.random() < 0.2 else broken)


def test_random_damage_raises_named_errors_only(tmp_path: Path) -> None:
    whole = rich_file()
    chance = random.Random(20240817)
    path = tmp_path / "damaged.gguf"
    outcomes: dict[str, int] = {}
    for _ in range(2000):
        path.write_bytes(flipped(whole, chance))
        started = time.perf_counter()
        try:
            use_everything(path)
            outcome = "accepted"
        except GGUFError as error:
            outcome = type(error).__name__
        assert time.perf_counter() - started < 1
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["accepted"] > 100
    assert len(outcomes) > 15, outcomes
