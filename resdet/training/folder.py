"""A run's folder: which run may write into it, and which checkpoint in it to resume from.

The lock is POSIX's, not filelock's: that is flock, which belongs to the open file and so to forked workers too. A
worker that outlives a killed trainer would keep the folder locked; a POSIX lock ends with the process that took it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resdet.errors import UserError
from resdet.training.checkpoint import LAST, newest_whole

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, so that a second run that wants to write into it gets a UserError.

    A lock file left behind by a process that has ended locks nothing. Without locks (Windows, some network file
    systems) the folder is not protected.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the run's folder must be writable: {error.strerror}") from None
    with file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: another run is writing here ({file.read().strip()})") from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint to resume from; None for a new run, whose folder must not hold another.

    ``resume`` is the configuration's: ``auto``, the path of a checkpoint, or None.
    """
    if resume == "auto":
        return newest_whole(folder)
    if resume is not None:
        return Path(resume)
    if (folder / LAST).exists() or (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: already holds a run; resume=auto continues it, output_dir=... starts another")
    return None
