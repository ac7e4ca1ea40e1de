"""The command line. Each command is a module of this package with add_parser(subparsers) and run(args)."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import tokenfusion
from tokenfusion.cli.errors import UsageError

COMMANDS = ("compare", "info", "tune", "verify")
_FAILED, _MISUSED, _INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns where CUDA is without a GPU
    name = " ".join(["tokenfusion", *(command for command in argv[:1] if command in COMMANDS)])
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character gets its number
        status = _run(argv)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _say(f"{name}: error: {error}", _MISUSED)
    except KeyboardInterrupt:
        return _say(f"{name}: interrupted", _INTERRUPTED)
    except OSError as error:  # of standard output: a full disk, or a reader that has seen enough
        _drop_output()
        return _FAILED if isinstance(error, BrokenPipeError) else _say(f"{name}: error: {error}", _FAILED)


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenfusion", description=tokenfusion.__doc__)
    parser.add_argument("--version", action="version", version=f"tokenfusion {tokenfusion.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"tokenfusion.cli.{name}") for name in COMMANDS}
    for module in modules.values():
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    return modules[args.command].run(args) or 0


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def _drop_output() -> None:
    """Else the interpreter tries again as it ends, and complains."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
