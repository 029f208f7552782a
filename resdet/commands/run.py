"""Shared by all commands: exit codes, logging, and help that shows how the command was started.

Exit codes: 0 success, 2 user error (the message says what to change), 1 internal error, 128 + the signal's number after
a signal stopped a run in good order.
"""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from resdet.errors import Interrupted, UserError, printable

_SCRIPTS = {"check": "check_data"}  # tools/NAME.py where NAME is not the command's


def command_parser(name: str, description: str, arguments: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of ``resdet NAME``.

    Examples in ``description`` read ``resdet NAME ...``; they are shown as ``python tools/NAME.py ...`` if that is how
    the command was started. ``arguments`` is what the usage line shows where argparse would not put it well.

    Parse with ``parse_intermixed_args``: ``parse_args`` refuses positional arguments after an option
    (``CONFIG --json out.json key=value``), though the usage line shows them there.
    """
    prog = f"resdet {name}"
    if sys.argv[0].endswith(".py"):
        prog = Path(sys.argv[0]).name
        description = re.sub(r"--no-python resdet (\w+)", lambda match: _script(match[1]), description)
        description = re.sub(r"\bresdet (\w+)", lambda match: f"python {_script(match[1])}", description)
    usage = None if arguments is None else f"%(prog)s {arguments}"
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, usage=usage, description=description, formatter_class=formatter)


def run_tool(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command's ``main`` on the arguments after the program's name and exit with its code (None: 0)."""
    for stream in (sys.stdout, sys.stderr):
        # A class name that the terminal's encoding lacks must not cost the work that was done before it is printed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("resdet").setLevel(logging.INFO)
    program = os.path.basename(sys.argv[0])
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(printable(f"{program}: {error}"), file=sys.stderr)
        code = 2
    except Interrupted as interruption:
        if os.environ.get("RANK", "0") == "0":  # one process of a run is enough
            print(f"{program}: {interruption}", file=sys.stderr)
        code = interruption.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`); closing stdout would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a folder without permission, a name that is too long
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"{program}: {where}{error.strerror or error}"), file=sys.stderr)
        code = 2
    sys.exit(code)


def show(text: str) -> None:
    """Print a text that may hold names from files; use it in place of ``print`` in every command."""
    print(printable(text))


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _script(name: str) -> str:
    return f"tools/{_SCRIPTS.get(name, name)}.py"
