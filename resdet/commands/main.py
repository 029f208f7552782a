"""The command ``resdet``: find the subcommand and leave the rest to its module."""

import difflib
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resdet.commands import COMMANDS
from resdet.commands.run import command_parser, run_tool, show
from resdet.errors import UserError, first_line
from resdet.version import VERSION

_HELP = """Fine-tune Faster R-CNN on your own images, evaluate it, and use the detector elsewhere.

A first detector, on generated images: minutes on a CPU, nothing to download.

    resdet train quickstart

On your own images: what is wrong with the data; training in the minutes you have, with settings chosen for your data;
numbers and pictures. `resdet recipes` lists what else can be trained.

    resdet check FOLDER
    resdet train finetune data=FOLDER minutes=30 output_dir=runs/mine
    resdet eval runs/mine
    resdet predict runs/mine photo.jpg

commands (resdet COMMAND --help documents each):
"""


def start() -> None:
    """Run ``resdet`` with the arguments of this process, and exit."""
    run_tool(main)


def main(arguments: Sequence[str]) -> int | None:
    """Run ``resdet``: one of its subcommands, or what its own options ask for.

    Raises:
        UserError: If there is no such subcommand.
    """
    if not arguments or arguments[0].startswith("-"):
        return _options(arguments)
    name, *rest = arguments
    if name in COMMANDS:
        code: int | None = _module(name).main(rest)
        return code
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"no such command: {name!r}; {hint}`resdet --help` lists them")


def _options(arguments: Sequence[str]) -> int:
    lines = [f"  {name:15}  {(_module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    parser = command_parser("", "\n".join([_HELP.rstrip("\n"), *lines]), arguments="[-h] [--version] COMMAND ...")
    parser.add_argument("--version", action="store_true", help="versions and device, as a bug report needs them")
    if not parser.parse_intermixed_args(arguments).version:
        parser.print_help(sys.stderr)
        return 2
    show(_versions())
    return 0


def _module(name: str) -> Any:
    return importlib.import_module(f"resdet.commands.{name.replace('-', '_')}")


def _versions() -> str:
    """Return what a bug report needs to say of the machine, also where torch cannot be imported."""
    package = Path(__file__).resolve().parents[1]
    lines = [f"resdet {VERSION} ({package})", f"Python {platform.python_version()} on {platform.platform()}"]
    try:
        from resdet.machine import describe_machine, machine_text

        lines.append(machine_text(describe_machine()))
    except Exception as error:  # the very thing that a bug report is about
        lines.append(f"torch or torchvision cannot be imported: {type(error).__name__}: {first_line(error)}")
    return "\n".join(lines)
