"""Shared by all commands: exit codes, logging, and help that shows how the command was started.

Exit codes: 0 success, 2 user error (the message says what to change), 1 internal error, 128 + the signal's number after
a signal stopped a run in good order.
"""

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from typing_extensions import Never

from resdet.commands import COMMANDS
from resdet.errors import InternalError, Interrupted, UserError, printable
from resdet.openmp import wait_briefly

AS_MODULE = "python -m resdet"
"""The program's name where it was started so."""

_SCRIPTS = {"check": "check_data"}  # tools/NAME.py where NAME is not the command's
_WITHOUT_SCRIPT = ("recipes", "weights", "config", "COMMAND")
_EXAMPLE = re.compile(rf"(--no-python )?\bresdet (COMMAND|{'|'.join(sorted(COMMANDS, reverse=True))})\b")


def command_parser(name: str, description: str, arguments: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of ``resdet NAME``.

    Examples in ``description`` read ``resdet NAME ...``; they are shown as ``python tools/NAME.py ...`` or ``python -m
    resdet NAME ...`` if that is how the command was started. ``arguments`` is what the usage line shows where argparse
    would not put it well.

    Parse with ``parse_intermixed_args``: ``parse_args`` refuses positional arguments after an option
    (``CONFIG --json out.json key=value``), though the usage line shows them there.
    """
    prog = f"resdet {name}".rstrip()
    if sys.argv[0] == AS_MODULE:
        prog = prog.replace("resdet", AS_MODULE, 1)
        description = _EXAMPLE.sub(lambda match: f"{'-m resdet' if match[1] else AS_MODULE} {match[2]}", description)
    elif sys.argv[0].endswith(".py"):
        prog = Path(sys.argv[0]).name
        description = _EXAMPLE.sub(_in_checkout, description)
    usage = None if arguments is None else f"%(prog)s {arguments}"
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=prog, usage=usage, description=description, formatter_class=formatter)


def checkpoint_in(source: str | Path) -> Path:
    """Return the file that an argument names: a checkpoint, a run's folder (its best.pt), a URL, a published detector.

    Call it when all options are parsed: it imports torch, and may download.
    """
    from resdet.weights.source import locate

    return locate(str(source))


def run_tool(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a command's ``main`` on the arguments after the program's name and exit with its code (None: 0)."""
    wait_briefly()
    # None is a stream that the shell has closed (`>&-`), which progress bars do not expect.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
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
        _complain(f"{program}: {error}")
        code = 2
    except InternalError as error:
        _complain(f"{program}: {error}")
        code = 1
    except Interrupted as interruption:
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # granted already
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":  # one process of a run is enough
            _complain(f"{program}: {interruption}")
        code = interruption.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of stdout has gone (`| head`)
        code = 0
    except OSError as error:  # a full disk, a folder without permission, a name that is too long
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{program}: {where}{error.strerror or error}")
        code = 2
    _drop_unwritten()
    sys.exit(code)


def show(text: str) -> None:
    """Print a text that may hold names from files; use it in place of ``print`` in every command.

    Call it when all files are written: what stdout cannot take (a full disk, a closed pipe) ends the command.
    """
    try:
        print(printable(text), flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr)


def _drop_unwritten() -> None:
    """Discard what the streams could not write: at exit Python would try again, and end with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        """Print a usage error, which may quote a file's name, and exit with code 2."""
        super().error(printable(message))


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _in_checkout(example: re.Match[str]) -> str:
    """Return how ``resdet NAME`` (after torchrun's ``--no-python``, perhaps) is started in a checkout."""
    of_torchrun, name = example.groups()
    if name in _WITHOUT_SCRIPT:
        return f"{AS_MODULE} {name}"
    script = f"tools/{_SCRIPTS.get(name, name).replace('-', '_')}.py"
    return script if of_torchrun else f"python {script}"
