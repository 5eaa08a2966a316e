"""Every setting of the pack: its default, what it may be, and the places that may change it.

Node input > environment (`GGUF_NATIVE_<KEY>`) > `config.json` beside this file > `OPTIMIZATION_PROFILE` below.
"""

import difflib
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Yours to edit; config.json does the same and survives an update of the pack.
OPTIMIZATION_PROFILE = {
    "enable_cuda_graph": True,
    "streaming_loading": True,
    "quant_cache_size": 256,
    "max_parallel_models": 2,
    "max_loras": 2,
    "preload_loras": 512,
    "compute": "exact",
}

CONFIG_JSON = Path(__file__).with_name("config.json")
ENVIRONMENT_PREFIX = "GGUF_NATIVE_"


class ConfigError(ValueError):
    """A setting that is unknown or has a bad value; the message says where it was found and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """The settings in force, one field per entry of `SETTINGS`, which says what each means."""

    enable_cuda_graph: bool
    streaming_loading: bool
    quant_cache_size: int
    max_parallel_models: int
    max_loras: int
    preload_loras: int
    compute: str
    memory_mode: str
    vae_slicing: bool
    sequential_processing: bool


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have; `from_text` leaves text that it cannot read as it is, so it is refused."""

    allowed: str
    accepts: Callable[[object], bool]
    from_text: Callable[[str], object]


@dataclass(frozen=True)
class Setting:
    """One row of the table: `help` gives unit and effect."""

    name: str
    kind: Kind
    default: bool | int | str
    help: str


def whole_number(minimum: int, unit: str) -> Kind:
    """Integers from `minimum` up; True and 2.0 are not integers here."""
    return Kind(
        f"a whole number of {unit}, {minimum} or more",
        lambda value: type(value) is int and value >= minimum,
        lambda text: int(text) if text.isascii() and text.isdigit() else text,
    )


def one_of(*choices: str) -> Kind:
    """Exactly one of the given words."""
    return Kind("one of " + ", ".join(f"'{choice}'" for choice in choices), lambda value: value in choices, str)


BOOLEAN_WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
ON_OR_OFF = Kind(
    "true or false (in the environment also 1, yes, on, 0, no, off)",
    lambda value: isinstance(value, bool),
    lambda text: BOOLEAN_WORDS.get(text.lower(), text),
)

TABLE = (
    Setting(
        "enable_cuda_graph",
        ON_OR_OFF,
        True,
        "Record the diffusion forward once per input shape and replay it where that is faster: at small pictures.",
    ),
    Setting(
        "streaming_loading",
        ON_OR_OFF,
        True,
        "Leave weights in the file until a layer needs them; off, or a GPU without DynamicVRAM: read all at loading.",
    ),
    Setting(
        "quant_cache_size",
        whole_number(0, "megabytes"),
        256,
        "Megabytes of decoded weights that a model keeps while it samples, if all its weights fit; 0 keeps none.",
    ),
    Setting(
        "max_parallel_models",
        whole_number(1, "models"),
        2,
        "How many diffusion models and text encoders of this pack stay loaded; the least recently used leaves first.",
    ),
    Setting(
        "max_loras",
        whole_number(1, "LoRAs"),
        2,
        "How many LoRAs a LoraLoaderGGUF node shows; with more on one model, from any nodes, a warning says the cost.",
    ),
    Setting(
        "preload_loras",
        whole_number(0, "megabytes"),
        512,
        "Megabytes of LoRA files kept in memory, pinned beside a GPU; the least recently used leaves; 0 keeps none.",
    ),
    Setting(
        "compute",
        one_of("exact", "fp8", "int8", "auto"),
        "exact",
        "How layers multiply: exact; faster in 8-bit floats or integers; auto: by layer the fastest that does no harm.",
    ),
    Setting(
        "memory_mode",
        one_of("conservative", "balanced", "aggressive"),
        "balanced",
        "conservative: ignore max_parallel_models; aggressive: as sequential_processing, and unload after sampling.",
    ),
    Setting(
        "vae_slicing",
        ON_OR_OFF,
        False,
        "Decode one picture of a batch at a time, in pieces if one does not fit: slower, less memory; GGUF VAEs only.",
    ),
    Setting(
        "sequential_processing",
        ON_OR_OFF,
        False,
        "Never a text encoder and a diffusion model of this pack together: one leaves before the other loads.",
    ),
)
SETTINGS = {setting.name: setting for setting in TABLE}
VARIABLES = {ENVIRONMENT_PREFIX + name.upper(): setting for name, setting in SETTINGS.items()}


def load_settings(
    path: Path = CONFIG_JSON, environ: Mapping[str, str] = os.environ, **node_inputs: bool | int | str | None
) -> Settings:
    """Read every source and return the settings in force; a node input of None counts as not given.

    Raises ConfigError for an unknown key, a bad value, or a `path` that is not a JSON object; no file is no error.
    """
    values = {name: setting.default for name, setting in SETTINGS.items()}
    values |= _accepted("config.py, OPTIMIZATION_PROFILE", SETTINGS, OPTIMIZATION_PROFILE)
    values |= _accepted(str(path), SETTINGS, _read_json_object(path) if path.exists() else {})
    values |= _accepted("environment", VARIABLES, _read_environment(environ))
    values |= _accepted("node input", SETTINGS, {key: value for key, value in node_inputs.items() if value is not None})
    return Settings(**values)


@functools.cache
def settings() -> Settings:
    """The settings of this process, without node inputs, read at the first call."""
    return load_settings()


def _accepted(source: str, known: Mapping[str, Setting], given: Mapping[str, object]) -> dict[str, object]:
    accepted = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown setting '{key}'. {_what_is_known(key, known)}.")
        setting = known[key]
        if not setting.kind.accepts(value):
            raise ConfigError(f"{source}: '{key}' is {value!r}; allowed is {setting.kind.allowed}.")
        accepted[setting.name] = value
    return accepted


def _what_is_known(key: str, known: Mapping[str, Setting]) -> str:
    spelling = {setting.name: written for written, setting in known.items()}
    nearest = difflib.get_close_matches(key.removeprefix(ENVIRONMENT_PREFIX).lower(), spelling, n=1)
    question = "".join(f"Did you mean '{spelling[name]}'? " for name in nearest)
    return f"{question}Known: {', '.join(known)}"


def _read_environment(environ: Mapping[str, str]) -> dict[str, object]:
    texts = {key: text.strip() for key, text in environ.items() if key.startswith(ENVIRONMENT_PREFIX)}
    return {key: VARIABLES[key].kind.from_text(text) if key in VARIABLES else text for key, text in texts.items()}


def _read_json_object(path: Path) -> dict[str, object]:
    try:
        text = path.read_text("utf-8-sig")
        values = json.loads(text)
        if not isinstance(values, dict):
            start = len(text) - len(text.lstrip())
            raise json.JSONDecodeError('Expecting one object such as {"max_loras": 2}', text, start)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: bad JSON at line {error.lineno} column {error.colno}: {error.msg}.") from None
    return values
