"""Files that appear whole or not at all, and what fails while they are written."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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


def save_tensors(content: Any, path: Path) -> None:
    """Write what ``torch.save`` writes.

    Raises:
        OSError: If it cannot be written. ``torch.save`` reports a full disk as one of several RuntimeErrors of its zip
            writer, which nobody would know for what they are.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if not re.search("PytorchStreamWriter|inline_container|iostream", str(error)):
            raise
        raise OSError(errno.EIO, f"is the disk full? {str(error).splitlines()[0]}", str(path)) from error
