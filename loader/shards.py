"""The parts of a model that gguf-split has cut: name-00001-of-00003.gguf and its neighbours."""

import re
from collections.abc import Mapping
from pathlib import Path

from .errors import MissingShardError, NotFirstShardError, ShardMismatchError, ShardNameError

SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def shard_paths(path: Path, metadata: Mapping[str, object]) -> list[Path]:
    """All parts of the model that `path`, its first part, belongs to; a whole file is its own only part.

    Raises:
        ShardError: `path` is not the first part, is not named as a part, or a part is missing.
    """
    number, count = split_value(path, metadata, "split.no", 0), split_value(path, metadata, "split.count", 1)
    if count <= 1:
        return [path]
    name = SHARD_NAME.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[3])) != (number + 1, count):
        raise ShardNameError(
            f"{path.name}: this is part {number + 1} of {count} of a split model; its name must end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf. Give every part its original name again."
        )
    paths = [path.with_name(f"{name[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number != 0:
        raise NotFirstShardError(
            f"{path.name}: this is part {number + 1} of {count} of a split model. Open {paths[0].name} instead."
        )
    check_present(paths)
    return paths


def check_present(paths: list[Path]) -> None:
    """Every part is a file beside the first."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MissingShardError(
            f"{paths[0].name}: {len(missing)} of {len(paths)} parts are missing: {', '.join(missing[:5])}. "
            "Download them into the same folder."
        )


def check_shard(path: Path, metadata: Mapping[str, object], number: int, count: int) -> None:
    """`path` says itself that it is part `number` (from 0) of `count`."""
    got = split_value(path, metadata, "split.no", 0), split_value(path, metadata, "split.count", 1)
    if got != (number, count):
        raise ShardMismatchError(
            f"{path.name}: says it is part {got[0] + 1} of {got[1]}; expected part {number + 1} of {count}. "
            "The parts are of different models: download them again."
        )


def check_tensor_count(path: Path, metadata: Mapping[str, object], n_tensors: int) -> None:
    """All parts together hold as many tensors as the first one says."""
    expected = split_value(path, metadata, "split.tensors.count", n_tensors)
    if expected != n_tensors:
        raise ShardMismatchError(
            f"{path.name}: the parts hold {n_tensors} tensors together; 'split.tensors.count' says {expected}. "
            "The parts are of different models: download them again."
        )


def split_value(path: Path, metadata: Mapping[str, object], key: str, default: int) -> int:
    """The whole number under a `split.*` key."""
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise ShardMismatchError(f"{path.name}: key {key!r} is {value!r:.100}; it must be a whole number.")
    return value
