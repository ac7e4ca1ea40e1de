"""The command line. Each command is a module of this package with add_parser(subparsers) and run(args)."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import tokenfusion

COMMANDS = ("compare", "info")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="tokenfusion", description=tokenfusion.__doc__)
    parser.add_argument("--version", action="version", version=f"tokenfusion {tokenfusion.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    named = [argv[0]] if argv and argv[0] in COMMANDS else COMMANDS  # a command needs only its own imports
    modules = {name: importlib.import_module(f"tokenfusion.cli.{name}") for name in named}
    for module in modules.values():
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    return modules[args.command].run(args) or 0
