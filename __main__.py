"""The command line: `python -m gguf_native`, `gguf-native` where installed, or `python custom_nodes/THIS-FOLDER`."""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

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
    interrupts = note_interrupts()
    try:
        return chosen.run(chosen)
    except (KeyboardInterrupt, Exception) as error:
        # Within a lock of Python's own an interrupt may come out as another error.
        if interrupts:
            leave_interrupted()
        if not isinstance(error, errors_of_files(package)):
            raise
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


def note_interrupts() -> list[int]:
    """The numbers of the signals to end that come from now on; each raises KeyboardInterrupt, so that files go."""
    came = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # Not where a shell has it ignored, for what runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return came


def leave_interrupted() -> NoReturn:
    """At once: a thread of torch that waits for Python's lock would end the process with an abort while Python ends."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
