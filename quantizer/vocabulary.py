"""The SentencePiece model that a UMT5 file carries as a tensor, as the metadata keys that GGUF has for it.

The inverse of loader/tokenizers.py; the messages are ModelProto and its parts in `sentencepiece_model.proto`.
"""

import struct
from collections.abc import Iterator

from .errors import SourceError
from .writer import Pairs

TENSOR = "spiece_model"
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
NORMAL = 1
# Fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, KIND = 1, 2, 3
CHARSMAP, DUMMY_PREFIX, EXTRA_WHITESPACES = 2, 3, 4
# Name in GGUF -> field of TrainerSpec and its default; -1 is written as the largest number of 64 bits.
NO_TOKEN = 1 << 63
SPECIAL_TOKENS = {"unknown": (40, 0), "eos": (42, 2), "padding": (43, NO_TOKEN)}


def vocabulary_pairs(model: bytes, file: str) -> Pairs:
    """tokenizer.ggml.* of a serialized ModelProto. Raises SourceError if it is none."""
    try:
        parts = list(fields(model))
        pieces = [dict(fields(content)) for number, content in parts if number == PIECES]
        trainer, normalizer = (
            dict(fields(next((content for number, content in parts if number == wanted), b"")))
            for wanted in (TRAINER, NORMALIZER)
        )
        tokens = [piece[TEXT].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(SCORE, bytes(4)))[0] for piece in pieces]
    except (struct.error, IndexError, KeyError, ValueError):
        raise SourceError(f"{file}: tensor '{TENSOR}' is no SentencePiece model; the file is damaged.") from None
    return {
        "tokenizer.ggml.model": ("STRING", "t5"),
        "tokenizer.ggml.tokens": ("[STRING]", tokens),
        "tokenizer.ggml.scores": ("[FLOAT32]", scores),
        "tokenizer.ggml.token_type": ("[INT32]", [piece.get(KIND, NORMAL) for piece in pieces]),
        "tokenizer.ggml.precompiled_charsmap": ("[UINT8]", list(normalizer.get(CHARSMAP, b""))),
        "tokenizer.ggml.add_space_prefix": ("BOOL", bool(normalizer.get(DUMMY_PREFIX, 1))),
        "tokenizer.ggml.remove_extra_whitespaces": ("BOOL", bool(normalizer.get(EXTRA_WHITESPACES, 1))),
    } | {
        f"tokenizer.ggml.{name}_token_id": ("UINT32", trainer.get(number, default))
        for name, (number, default) in SPECIAL_TOKENS.items()
        if trainer.get(number, default) < NO_TOKEN
    }


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        wire_type = tag & 7
        if wire_type == VARINT:
            value, at = varint(message, at)
            yield tag >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire_type)
        if wire_type == LENGTH_DELIMITED:
            size, at = varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("no protobuf message")
        yield tag >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, where the next field starts) of seven bits a byte, lowest first."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
