"""The command line: `python -m gguf_native`, `gguf-native` where installed, or `python custom_nodes/THIS-FOLDER`."""

import argparse
import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType

# Command -> its module in quantizer/, which has HELP, add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = {
    "quantize": "quantize_command",
    "inspect": "inspect_file",
    "verify": "verify",
    "recommend": "recommend",
    "doctor": "doctor",
}
PACKAGE = "gguf_native"
FAILED, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; what goes wrong with a file is one line on stderr."""
    package = __package__ or bind_folder()
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="gguf-native", description="GGUF models: make, look at and choose them.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Only the command that runs is imported; without one, all are, for their help.
    for name in [word for word in words[:1] if word in COMMANDS] or COMMANDS:
        module = importlib.import_module(f"{package}.quantizer.{COMMANDS[name]}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    chosen = parser.parse_args(words)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return chosen.run(chosen)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except errors_of_files(package) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED


def bind_folder() -> str:
    """Make the folder that Python runs importable as a package, whatever it is called."""
    folder = Path(__file__).resolve().parent
    # Python puts the folder itself in front: its `ops` and `nodes` would be found as modules of their own.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACKAGE])
    return PACKAGE


def errors_of_files(package: str) -> tuple[type[Exception], ...]:
    """What a user can do something about; anything else is a fault of ours and keeps its traceback."""

    def of(module: str) -> ModuleType:
        return importlib.import_module(f"{package}.{module}")

    return of("loader.errors").GGUFError, of("quantizer.errors").QuantizerError, of("config").ConfigError, OSError


def interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that temporary files go."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
