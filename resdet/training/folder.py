"""A run's folder: which run may write into it, and which checkpoint in it to resume from.

The lock is POSIX's, not filelock's: that is flock, which belongs to the open file and so to forked workers too. A
worker that outlives a killed trainer would keep the folder locked; a POSIX lock ends with the process that took it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resdet.errors import UserError
from resdet.files import make_output_folder, remove_temporary
from resdet.training.checkpoint import BEST, LAST, PREVIOUS, newest_whole

LOCK, CONFIG, PLAN = ".lock", "config.yaml", "plan.json"
LOG, METRICS, REPORT = "metrics.jsonl", "metrics.json", "report.html"
EVENTS, PICTURES = "tensorboard", "pictures"  # folders


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, so that a second run that wants to write into it gets a UserError.

    A lock file left behind by a process that has ended locks nothing; its half-written files are removed. Without locks
    (Windows, some network file systems) the folder is not protected. A UserError is raised too if the folder cannot be
    written to, or if something in it has the name of one of a run's files but is of another kind.
    """
    make_output_folder(folder)
    _check_kinds(folder)
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / LOCK}: cannot be written to: {error.strerror}") from None
    with file:
        is_locked = False
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: another run is writing here ({file.read().strip()})") from None
        except OSError:
            pass  # a file system without locks
        if is_locked:
            for place in (folder, folder / PICTURES):
                remove_temporary(place)
        with suppress(OSError):  # a full disk: the text is for people
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _check_kinds(folder: Path) -> None:
    for name in (LOCK, CONFIG, PLAN, LOG, METRICS, LAST, PREVIOUS, BEST, REPORT):
        path = folder / name
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "something else"
            raise UserError(f"{path}: must be a file of the run, but {kind} has this name")
    for name in (EVENTS, PICTURES):
        path = folder / name
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: must be a folder of the run, but a file has this name")


def checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to resume from; None for a new run, whose folder must not hold another.

    ``resume`` is the configuration's: ``auto``, the path of a checkpoint, or None.
    """
    if resume == "auto":
        return newest_whole(folder)
    path = None if resume is None else Path(resume)
    is_of_folder = path is not None and path.parent.resolve().is_relative_to(folder.resolve())
    if not is_of_folder and ((folder / LAST).exists() or (folder / LOG).exists()):
        other = "" if path is None else f", and {path} is not of it"
        raise UserError(
            f"{folder}: already holds a run{other}; resume=auto continues it, output_dir=... starts another"
        )
    return path
