"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resdet.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, which becomes ``path`` at the end, or is removed if anything fails.

    The contents are on the disk before the name is: after a crash the path holds the old file or the whole new one.

    Raises:
        UserError: If the directory does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: its directory does not exist")
    beside = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # suffixes mean something to torch.export
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        # The new name is on the disk only when the directory is (no such thing on Windows).
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        beside.unlink(missing_ok=True)
