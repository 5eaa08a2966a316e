"""Whatever a user meets is documented: nodes, inputs, settings, formats, errors; and what the README says is true."""

import ast
import asyncio
import json
import re
from pathlib import Path

import gguf
import pytest
import samples
import torch
from gguf_bytes import F32, STRING, model, pair, string
from gguf_native import config
from gguf_native.loader import errors
from gguf_native.ops.formats import FORMATS
from host.environment import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP = ROOT / "web" / "docs"
NODES = {path.stem for path in HELP.glob("*.md")}
LOADER = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "loader").glob("*.py")}
MESSAGES_IN = [
    ROOT / "config.py",
    *(file for folder in ("loader", "nodes", "ops") for file in (ROOT / folder).rglob("*.py")),
]


def section(title: str) -> str:
    """The README's text under a heading."""
    return re.split(r"^## ", README, flags=re.MULTILINE)[titles().index(title) + 1].partition("\n")[2]


def titles() -> list[str]:
    return re.findall(r"^## (.*)", README, flags=re.MULTILINE)


def rows(title: str) -> dict[str, list[str]]:
    """The tables under a heading: first cell, without backticks -> the others."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first.strip("`"): others for first, *others in cells if first.startswith("`")}


def code(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def schemas(comfyui, host):
    """Node id -> what the node tells the host of itself."""
    with pytest.MonkeyPatch.context() as patch:
        # `nodes` is ComfyUI's, even where pytest has put this checkout on the path.
        patch.syspath_prepend(str(comfyui))
        from gguf_native.nodes import NODES, GGUFExtension
    asyncio.run(GGUFExtension().on_load())
    found = [node.GET_SCHEMA() for node in NODES]
    return {schema.node_id: schema for schema in found}


def test_every_node_has_a_help_page_and_a_row(schemas):
    assert schemas.keys() == NODES == rows("Nodes").keys()


@pytest.mark.parametrize("node", sorted(NODES))
def test_every_input_and_output_is_explained(schemas, node):
    schema = schemas[node]
    assert schema.description.endswith(".")
    assert schema.search_aliases
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip and part.tooltip.endswith("."), part


@pytest.mark.parametrize("node", sorted(NODES))
def test_help_page_and_row_name_every_input(schemas, node):
    page = (HELP / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schemas[node].display_name}\n")
    wanted = {f"`{part.id}`" for part in schemas[node].inputs}
    assert wanted <= set(re.findall(r"`\w+`", page))
    assert wanted <= set(re.findall(r"`\w+`", rows("Nodes")[node][1]))
    assert {f"`{part.io_type}`" for part in schemas[node].outputs} <= set(re.findall(r"`\w+`", page))


def test_no_other_settings_and_formats_are_in_the_tables():
    assert rows("Settings").keys() == config.SETTINGS.keys()
    assert rows("Formats").keys() == FORMATS.keys()


@pytest.mark.parametrize("name", config.SETTINGS)
def test_every_setting_has_its_row(name):
    setting = config.SETTINGS[name]
    default, allowed, effect, variable = rows("Settings")[name]
    assert default == f"`{json.dumps(setting.default)}`".replace('"', "")
    assert allowed in (setting.kind.allowed, setting.kind.allowed.partition(" (")[0])
    assert effect == setting.help
    assert config.VARIABLES[variable.strip("`")] is setting


def test_the_example_configuration_is_valid(tmp_path):
    (text,) = code("Settings", "json")
    (tmp_path / "config.json").write_text(text)
    read = config.load_settings(tmp_path / "config.json", {})
    assert {name: getattr(read, name) for name in json.loads(text)} == json.loads(text)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_row(name):
    bits, block_size, *_ = rows("Formats")[name]
    assert float(bits) == FORMATS[name].block_bytes * 8 / FORMATS[name].block_size
    assert int(block_size) == FORMATS[name].block_size


def error_kinds() -> dict[str, str]:
    """Class -> base, of every kind of GGUFError that the loader defines."""
    bases = {
        node.name: base.id
        for tree in LOADER.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    kinds = {"GGUFError"}
    while more := {name for name, base in bases.items() if base in kinds} - kinds:
        kinds |= more
    return {name: bases[name] for name in sorted(kinds - {"GGUFError"})}


KINDS = error_kinds()


def tree_of_errors() -> dict[str, str]:
    """Class -> parent, as the tree in the docstring of errors.py draws it."""
    path, tree = ["GGUFError"], {}
    for indent, name in re.findall(r"^([│├└─ ]+)(\w+)", errors.__doc__, flags=re.MULTILINE):
        del path[len(indent) // 4 :]
        tree[name] = path[-1]
        path.append(name)
    return tree


def used_errors() -> set[str]:
    """Names in `raise Name(...)`, or passed to a function that raises them."""
    used = set()
    for node in (node for tree in LOADER.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            used.add(getattr(node.exc.func, "id", None))
        elif isinstance(node, ast.Call):
            used |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
    return used


def test_the_tree_of_errors_is_complete():
    assert tree_of_errors() == KINDS


@pytest.mark.parametrize("name", sorted(KINDS.keys() - set(KINDS.values())))
def test_every_error_is_raised(name):
    assert name in used_errors()


def texts(file: Path) -> list[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_messages_under_troubleshooting_are_those_of_the_code():
    said = [text for file in MESSAGES_IN for text in texts(file)]
    fragments = list(rows("Troubleshooting"))
    assert fragments
    assert [fragment for fragment in fragments if not any(fragment in text for text in said)] == []


def test_library_examples_run(tmp_path, monkeypatch, capsys):
    blocks = samples.random_blocks("Q4_K", 6)
    tensors = {
        "blk.0.weight": ((512, 3), FORMATS["Q4_K"].number, blocks.numpy().tobytes()),
        "norm.weight": ((4,), F32, bytes(16)),
    }
    whole = model(tensors, [pair("general.architecture", STRING, string("flux"))])
    (tmp_path / "model.gguf").write_bytes(whole)
    (tmp_path / "broken.gguf").write_bytes(whole[:-20])
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code("As a library", "python"):
        exec(block, names)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_K).reshape(3, 512)
    assert torch.equal(names["weight"], torch.from_numpy(expected))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["flux", f"blk.0.weight Q4_K (3, 512) {blocks.numel()}"]
    assert printed[-1].startswith("TruncatedFileError broken.gguf: ")


def test_links_and_pictures_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).is_file(), f"{document.name}: {target}"


def test_the_figures_of_quality_are_those_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    measured = {row["type"]: row for row in measured if row["compute"] == "exact"}
    lines = [line for line in section("Quality, measured").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    shown = {first: others for first, *others in cells}
    for name, row in measured.items():
        assert shown[name] == [
            f"{row['bytes'] / 1e6:.2f}",
            f"{100 * row['scores']['all']:.1f}%",
            f"{row['points']:+.1f}",
            f"{row['latent_error']:.4f}",
            "same" if row["psnr"] is None else f"{row['psnr']:.1f}",
        ]
