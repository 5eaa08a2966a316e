"""Settings: who wins, and what is refused and in which words."""

import ast
import dataclasses
import inspect
import json
import logging
from pathlib import Path

import pytest
from gguf_native import config
from gguf_native.config import OPTIMIZATION_PROFILE, SETTINGS, ConfigError, load_settings

SHIPPED = {
    "enable_cuda_graph": True,
    "streaming_loading": True,
    "quant_cache_size": 256,
    "max_parallel_models": 2,
    "max_loras": 2,
    "preload_loras": 512,
    "compute": "exact",
    "memory_mode": "balanced",
    "vae_slicing": False,
    "sequential_processing": False,
}

# key: one value for each source, weakest first, each different from the one before it
LAYERS = {
    "enable_cuda_graph": (False, True, False, True),
    "streaming_loading": (False, True, False, True),
    "quant_cache_size": (1, 0, 3, 4),
    "max_parallel_models": (3, 4, 5, 1),
    "max_loras": (3, 4, 5, 1),
    "preload_loras": (1, 0, 3, 4),
    "compute": ("fp8", "int8", "auto", "exact"),
    "memory_mode": ("aggressive", "conservative", "balanced", "aggressive"),
    "vae_slicing": (True, False, True, False),
    "sequential_processing": (True, False, True, False),
}

BAD_VALUES = {
    "enable_cuda_graph": (1, "true", None),
    "streaming_loading": (0, "on", []),
    "quant_cache_size": (-1, 256.0, True, "256", None),
    "max_parallel_models": (0, 1.5, True, "2"),
    "max_loras": (0, False, {}),
    "preload_loras": (-1, 1.5, True, "512", ["style.safetensors"]),
    "compute": ("FP8", "fast", 8, None),
    "memory_mode": ("Aggressive", "low", 1, ["balanced"]),
    "vae_slicing": (1, "yes"),
    "sequential_processing": (1, "yes"),
}
BAD_TEXTS = {
    "enable_cuda_graph": ("2", "", "y"),
    "streaming_loading": ("enabled",),
    "quant_cache_size": ("-1", "256MB", "2.0", "", "²"),
    "max_parallel_models": ("-1", "true"),
    "max_loras": ("two",),
    "preload_loras": ("-1", "512MB", "style.safetensors"),
    "compute": ("fp16", ""),
    "memory_mode": ("Aggressive", ""),
    "vae_slicing": ("maybe",),
    "sequential_processing": ("maybe",),
}
ALLOWED = {
    "quant_cache_size": "a whole number of megabytes, 0 or more",
    "max_parallel_models": "a whole number of models, 1 or more",
    "max_loras": "a whole number of LoRAs, 1 or more",
    "preload_loras": "a whole number of megabytes, 0 or more",
    "compute": "one of 'exact', 'fp8', 'int8', 'auto'",
    "memory_mode": "one of 'conservative', 'balanced', 'aggressive'",
}
ON_OR_OFF = "true or false (in the environment also 1, yes, on, 0, no, off)"


def pairs(table: dict) -> list:
    return [pytest.param(key, value, id=f"{key}-{value!r}") for key, values in table.items() for value in values]


def variable(key: str) -> str:
    return f"GGUF_NATIVE_{key.upper()}"


@pytest.fixture
def config_json(tmp_path) -> Path:
    return tmp_path / "config.json"


@pytest.fixture(autouse=True)
def fresh_process():
    config.settings.cache_clear()
    yield
    config.settings.cache_clear()


def refusal(path: Path, environ: dict[str, str], **node_inputs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ, **node_inputs)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_defaults_without_any_source(config_json):
    assert dataclasses.asdict(load_settings(config_json, {})) == SHIPPED


def test_profile_and_table_ship_the_same_defaults():
    table = {name: setting.default for name, setting in SETTINGS.items()}
    assert table == SHIPPED
    assert {key: SHIPPED[key] for key in list(SHIPPED)[:7]} == OPTIMIZATION_PROFILE
    assert [field.name for field in dataclasses.fields(config.Settings)] == list(SETTINGS)


@pytest.mark.parametrize("key", SETTINGS)
def test_each_source_overrides_the_weaker_ones(key, config_json, monkeypatch):
    in_profile, in_file, in_environment, in_node = LAYERS[key]

    monkeypatch.setitem(OPTIMIZATION_PROFILE, key, in_profile)
    assert getattr(load_settings(config_json, {}), key) == in_profile

    config_json.write_text(json.dumps({key: in_file}))
    assert getattr(load_settings(config_json, {}), key) == in_file

    environ = {variable(key): str(in_environment)}
    assert getattr(load_settings(config_json, environ), key) == in_environment
    assert getattr(load_settings(config_json, environ, **{key: None}), key) == in_environment

    expected = SHIPPED | {key: in_node}
    assert dataclasses.asdict(load_settings(config_json, environ, **{key: in_node})) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" on ", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("off", False),
    ],
)
def test_words_for_true_and_false_in_the_environment(text, value, config_json):
    assert load_settings(config_json, {"GGUF_NATIVE_STREAMING_LOADING": text}).streaming_loading is value


def test_other_variables_are_left_alone(config_json):
    environ = {"PATH": "/bin", "GGUF": "1", "COMFYUI_PATH": "x"}
    assert dataclasses.asdict(load_settings(config_json, environ)) == SHIPPED


@pytest.mark.parametrize(("key", "value"), pairs(BAD_VALUES))
def test_bad_value_in_config_json(key, value, config_json):
    config_json.write_text(json.dumps({key: value}))
    assert refusal(config_json, {}) == f"{config_json}: '{key}' is {value!r}; allowed is {ALLOWED.get(key, ON_OR_OFF)}."


@pytest.mark.parametrize(("key", "text"), pairs(BAD_TEXTS))
def test_bad_value_in_the_environment(key, text, config_json):
    message = refusal(config_json, {variable(key): text})
    assert message == f"environment: '{variable(key)}' is {text!r}; allowed is {ALLOWED.get(key, ON_OR_OFF)}."


def test_number_below_the_minimum_in_the_environment(config_json):
    message = refusal(config_json, {"GGUF_NATIVE_MAX_LORAS": "0"})
    assert message == "environment: 'GGUF_NATIVE_MAX_LORAS' is 0; allowed is a whole number of LoRAs, 1 or more."


@pytest.mark.parametrize(("key", "value"), [pair for pair in pairs(BAD_VALUES) if pair.values[1] is not None])
def test_bad_node_input(key, value, config_json):
    message = refusal(config_json, {}, **{key: value})
    assert message == f"node input: '{key}' is {value!r}; allowed is {ALLOWED.get(key, ON_OR_OFF)}."


def test_bad_value_and_unknown_key_in_the_profile(config_json, monkeypatch):
    monkeypatch.setitem(OPTIMIZATION_PROFILE, "max_loras", "2")
    assert refusal(config_json, {}).startswith(
        "config.py, OPTIMIZATION_PROFILE: 'max_loras' is '2'; allowed is a whole"
    )
    monkeypatch.setitem(OPTIMIZATION_PROFILE, "max_loras", 2)
    monkeypatch.setitem(OPTIMIZATION_PROFILE, "max_lora", 2)
    assert refusal(config_json, {}).startswith("config.py, OPTIMIZATION_PROFILE: unknown setting 'max_lora'. Did you")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("max_lora", "max_loras"),
        ("Memory-Mode", "memory_mode"),
        ("cuda_graph", "enable_cuda_graph"),
        ("vae_slice", "vae_slicing"),
    ],
)
def test_unknown_key_that_looks_like_a_known_one(typo, meant, config_json):
    known = ", ".join(SETTINGS)
    config_json.write_text(json.dumps({typo: 1}))
    assert (
        refusal(config_json, {}) == f"{config_json}: unknown setting '{typo}'. Did you mean '{meant}'? Known: {known}."
    )

    config_json.unlink()
    assert refusal(config_json, {}, **{typo: 1}).startswith(
        f"node input: unknown setting '{typo}'. Did you mean '{meant}'?"
    )
    message = refusal(config_json, {variable(typo): "1"})
    assert message.startswith(
        f"environment: unknown setting '{variable(typo)}'. Did you mean '{variable(meant)}'? Known:"
    )
    assert all(variable(key) in message for key in SETTINGS)


def test_unknown_key_that_looks_like_nothing(config_json):
    config_json.write_text('{"xyz": 1}')
    assert refusal(config_json, {}) == f"{config_json}: unknown setting 'xyz'. Known: {', '.join(SETTINGS)}."


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "bad JSON at line 1 column 1: Expecting value."),
        (b'{\n  "max_loras": 2,,\n}', "bad JSON at line 2 column 18: Expecting property name"),
        (b'{\n  "max_loras" 2\n}', "bad JSON at line 2 column 15: Expecting ':' delimiter."),
        (b"{'max_loras': 2}", "bad JSON at line 1 column 2: Expecting property name enclosed in double quotes."),
        (b'\n\n  ["max_loras"]', 'bad JSON at line 3 column 3: Expecting one object such as {"max_loras": 2}.'),
        (b"null", 'bad JSON at line 1 column 1: Expecting one object such as {"max_loras": 2}.'),
        (b'{"memory_mode": "\xff"}', "byte 17 is not UTF-8 text; save the file as UTF-8."),
        ('{"max_loras": 2}'.encode("utf-16"), "byte 0 is not UTF-8 text; save the file as UTF-8."),
    ],
)
def test_config_json_that_cannot_be_read(content, fault, config_json):
    config_json.write_bytes(content)
    assert refusal(config_json, {}).startswith(f"{config_json}: {fault}")


def test_config_json_with_a_byte_order_mark(config_json):
    config_json.write_bytes(b'\xef\xbb\xbf{"max_loras": 3}')
    assert load_settings(config_json, {}).max_loras == 3


def test_nothing_is_logged(config_json, caplog):
    others = {key: values[0] for key, values in LAYERS.items()}
    with caplog.at_level(logging.DEBUG, logger="gguf_native"):
        assert dataclasses.asdict(load_settings(config_json, {}, **others)) == SHIPPED | others
    assert caplog.messages == []


def test_a_config_json_that_cannot_be_read_is_named(config_json):
    config_json.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_settings(config_json, {})


def test_process_settings_are_read_once(monkeypatch):
    monkeypatch.setitem(OPTIMIZATION_PROFILE, "max_parallel_models", 7)
    first = config.settings()
    monkeypatch.setitem(OPTIMIZATION_PROFILE, "max_parallel_models", 9)
    assert config.settings() is first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.max_loras = 1


def test_default_path_is_beside_config_py():
    assert Path(config.__file__).with_name("config.json") == config.CONFIG_JSON


@pytest.mark.parametrize("key", SETTINGS)
def test_each_setting_has_a_sentence_for_the_readme(key):
    setting = SETTINGS[key]
    assert setting.name == key
    assert setting.kind.allowed == ALLOWED.get(key, ON_OR_OFF)
    assert len(setting.help) > 40 and setting.help.endswith(".") and "|" not in setting.help + setting.kind.allowed


def test_config_imports_the_standard_library_only():
    nodes = list(ast.walk(ast.parse(inspect.getsource(config))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"difflib", "functools", "json", "os", "collections.abc", "dataclasses", "pathlib"}
