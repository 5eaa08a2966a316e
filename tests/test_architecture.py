"""Who may import whom: the folders' order, where ComfyUI is met, and a public surface that needs torch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import samples
from gguf_bytes import model
from gguf_native.ops.formats import FORMATS, BlockFormat
from host.environment import ROOT

FOLDERS = ("ops", "loader", "quantizer", "nodes")
FILES = [
    ROOT / "config.py",
    ROOT / "__main__.py",
    *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))),
]

# Each imports only what stands before it.
FOLDER_MAY_IMPORT = {
    "config": set(),
    "__main__": set(),
    "ops": {"config"},
    "loader": {"config", "ops"},
    "quantizer": {"config", "ops", "loader"},
    "nodes": {"config", "ops", "loader", "quantizer"},
}
# A new module of ops finds its place here.
OPS_ORDER = (
    "formats",
    "kernels",
    "dequantize",
    "quantize",
    "encoder_process",
    "eight_bits",
    "layout",
    "low_rank",
    "cache",
    "matmul",
    "compute",
    "lora",
    "pinned_part",
    "ring",
    "streaming",
    "capture",
    "graph",
    "layers",
)

HOST = {"comfy", "comfy_aimdo", "comfy_api", "folder_paths", "nodes"}
MEETS_HOST = {
    "ops.layers",
    "ops.lora",
    "ops.pinned_part",
    "ops.streaming",
    "loader.diffusion_model",
    "loader.text_encoder",
    "loader.vae",
    "loader.lora",
    "loader.lora_files",
    "loader.lora_pages",
    "loader.file_streaming",
    "loader.graphs",
    "loader.load_order",
    "loader.packed_layers",
    "loader.model_patcher",
    "loader.out_of_memory",
    "loader.pinning",
    "loader.residency",
    "loader.state_dict",
}
MEETS_KITCHEN = {"ops.layout", "ops.low_rank", "ops.matmul", "ops.compute", "quantizer.scaled_formats"}
SHOWS_PROGRESS = {"quantizer.quantize_command"}


def module_name(file: Path) -> str:
    """Dotted, from the root of the pack; a package has the name of its folder."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is relative) of every import in a file; relative ones by their name in the pack."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, False
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            name = ".".join(part for part in base if part)
            for alias in node.names:
                longer = ".".join((name, alias.name)).lstrip(".")
                yield (longer if is_module(longer) else name), True


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def relative_imports(file: Path) -> set[str]:
    return {module for module, is_relative in imports(file) if is_relative}


def absolute_roots(file: Path) -> set[str]:
    return {module.partition(".")[0] for module, is_relative in imports(file) if not is_relative}


def meets_host(name: str) -> bool:
    return name in MEETS_HOST or name.partition(".")[0] == "nodes"


def allowed_roots(name: str) -> set[str]:
    """What a module may import from outside the pack, besides the standard library."""
    return {
        "torch",
        *(HOST if meets_host(name) else ()),
        *(("comfy_kitchen",) if name in MEETS_KITCHEN else ()),
        *(("tqdm",) if name in SHOWS_PROGRESS else ()),
        *(("triton",) if name.startswith("ops.kernels") else ()),
    }


def parametrize(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=module_name)


every_module = parametrize(FILES)
every_host_free_module = parametrize([file for file in FILES if not meets_host(module_name(file))])
every_module_of_ops = parametrize([file for file in FILES if module_name(file).startswith("ops.")])


def test_the_lists_name_modules_that_exist():
    names = {module_name(file) for file in FILES}
    assert names >= MEETS_HOST | MEETS_KITCHEN | SHOWS_PROGRESS
    assert len(FILES) > 30


@every_module
def test_folders_import_one_way(file):
    own = module_name(file).partition(".")[0]
    imported = {module.partition(".")[0] for module in relative_imports(file)}
    assert imported <= {own} | FOLDER_MAY_IMPORT[own]


@every_module_of_ops
def test_modules_of_ops_import_one_way(file):
    own = module_name(file).split(".")[1]
    before = set(OPS_ORDER[: OPS_ORDER.index(own) + 1])
    assert {module.split(".")[1] for module in relative_imports(file) if module.startswith("ops.")} <= before


@every_module
def test_outside_modules_are_those_allowed(file):
    roots = absolute_roots(file) - set(sys.stdlib_module_names)
    assert roots <= allowed_roots(module_name(file))


@every_host_free_module
def test_host_free_modules_import_no_module_that_meets_the_host(file):
    assert not {module for module in relative_imports(file) if meets_host(module)}


@every_module
def test_no_print_and_no_environment(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    reached = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "print" not in names
    assert file.name == "config.py" or not {"environ", "getenv"} & (reached | named)


def test_every_format_class_is_in_the_table():
    families = [BlockFormat, *BlockFormat.__subclasses__()]
    classes = {row for family in families for row in family.__subclasses__() if hasattr(row, "number")}
    assert {row.__name__: row for row in classes} == FORMATS


SURFACE = """
import sys, types
for name in ("comfy", "comfy_api", "comfy_kitchen", "folder_paths", "nodes", "triton"):
    sys.modules[name] = None
package = types.ModuleType("gguf_native")
package.__path__ = [sys.argv[1]]
sys.modules["gguf_native"] = package
from gguf_native.loader import GGUFError, open_gguf
from gguf_native.ops import dequantize
with open_gguf(sys.argv[2]) as file:
    info = file.tensors["a.weight"]
    print(list(dequantize(file.read("a.weight"), info.type, info.shape).shape))
try:
    open_gguf(sys.argv[1] + "/config.py")
except GGUFError as error:
    print(type(error).__name__)
"""


def test_the_public_surface_needs_no_comfyui(tmp_path):
    path = tmp_path / "model.gguf"
    blocks = samples.random_blocks("Q4_K", 6)
    path.write_bytes(model({"a.weight": ((512, 3), FORMATS["Q4_K"].number, blocks.numpy().tobytes())}))
    done = subprocess.run([sys.executable, "-c", SURFACE, ROOT, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["[3, 512]", "NotGGUFError"], done.stderr
