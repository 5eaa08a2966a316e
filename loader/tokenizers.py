"""A SentencePiece model rebuilt from the vocabulary in a GGUF file's metadata, where the host's tokenizer needs one.

It is written as protobuf by hand: the messages are ModelProto and its parts in `sentencepiece_model.proto`.
"""

import struct
from collections.abc import Mapping

import torch

from .errors import MissingTokenizerError

VARINT, LENGTH_DELIMITED, FIXED32 = 0, 2, 5
BYTE = 6  # tokenizer.ggml.token_type has SentencePiece's own numbers


def sentencepiece_model(file_name: str, metadata: Mapping[str, object]) -> torch.Tensor:
    """uint8 [bytes]: a serialized unigram ModelProto from tokenizer.ggml.{tokens,scores,token_type,...}.

    Raises MissingTokenizerError.
    """
    vocabulary = [metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if any(part is None for part in vocabulary):
        raise MissingTokenizerError(
            f"{file_name}: its metadata has no SentencePiece vocabulary (tokenizer.ggml.tokens, scores, token_type), "
            "which UMT5 needs. Use a file that llama.cpp's converter made, or the safetensors file."
        )
    tokens, scores, kinds = vocabulary
    pieces = (_delimited(1, _piece(*entry)) for entry in zip(tokens, scores, kinds, strict=True))
    model = b"".join((*pieces, _delimited(2, _trainer(kinds)), _delimited(3, _normalizer(metadata))))
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _delimited(1, text.encode()) + _tag(2, FIXED32) + struct.pack("<f", score) + _number(3, int(kind))


def _trainer(kinds) -> bytes:
    return _number(35, BYTE in kinds)  # byte_fallback


def _normalizer(metadata: Mapping[str, object]) -> bytes:
    charsmap = bytes(byte & 0xFF for byte in metadata.get("tokenizer.ggml.precompiled_charsmap", ()))
    add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    remove_extra_whitespaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", True)
    return _delimited(2, charsmap) + _number(3, add_dummy_prefix) + _number(4, remove_extra_whitespaces)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _tag(field, VARINT) + _varint(int(value))


def _delimited(field: int, content: bytes) -> bytes:
    return _tag(field, LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))
