"""Write files that appear whole or not at all."""

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
    """Yield a temporary path in the same folder; rename it to ``path`` at the end, or remove it if anything fails.

    Contents reach the disk before the name does: after a crash the path holds the old file or the whole new one.

    Raises:
        UserError: If the directory does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: its directory does not exist")
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # keeps the suffix: torch.export looks at it
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # The new name reaches the disk with its directory (Windows has no such call).
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(content: Any, path: Path) -> None:
    """Write a file as ``torch.save`` does.

    Raises:
        OSError: If it cannot be written. ``torch.save`` reports a full disk as one of several RuntimeErrors of its zip
            writer, which do not mention the disk.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if not re.search("PytorchStreamWriter|inline_container|iostream", str(error)):
            raise
        raise OSError(errno.EIO, f"is the disk full? {str(error).splitlines()[0]}", str(path)) from error
