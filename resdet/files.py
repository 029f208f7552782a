"""Check where output may go, and write files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from resdet.errors import UserError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\..+")  # written_whole's names, those of earlier versions too


@contextmanager
def written_whole(path: Path, companion: str | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` at the end, or remove it if anything fails.

    Contents reach the disk before the name does: after a crash the path holds the old file or the whole new one. A
    process that is killed leaves the temporary file behind; ``remove_temporary`` clears a folder of them.

    With ``companion`` the file is one of a pair, whose other half has the same name and this suffix. Both halves of the
    temporary pair must be written, and ``path`` is absent while they are exchanged: it never stands beside a half of
    another pair.

    Raises:
        UserError: If the directory does not exist, or ``path`` is a folder or a device.
        OSError: If the file cannot be written; it names ``path``.
    """
    # Not the whole name, which may fill the 255 bytes that a file system allows; torch.export looks at the suffix.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp{path.suffix}")
    moves = [(temporary, path)]
    if companion is not None:
        moves.insert(0, (temporary.with_suffix(companion), path.with_suffix(companion)))
    for _, target in moves:
        _check_file(target)
    try:
        yield temporary
        for source, _ in moves:
            with source.open("rb+") as file:
                os.fsync(file.fileno())
        if companion is not None:
            path.unlink(missing_ok=True)
        for source, target in moves:
            os.replace(source, target)
        # The new name reaches the disk with its directory (Windows has no such call).
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for source, _ in moves:
            source.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text so that the path holds the old file or the whole new one; raises as ``written_whole`` does.

    Bytes of a file name that are no UTF-8, which Python holds as halves of surrogate pairs, are written as escapes.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; only for one who alone writes there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(lock: Path, timeout: float) -> Iterator[None]:
    """Let one process at a time through, for at most ``timeout`` seconds of waiting.

    Where files cannot be locked, all pass at once: for work that is then merely done twice.
    """
    with ExitStack() as stack:
        # NotImplementedError: a file system without locks.
        with suppress(OSError, NotImplementedError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=timeout))
        yield


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check, before the work starts, that a file can be written to ``path``; as ``check_outputs``."""
    check_outputs([path], inputs)


def check_outputs(paths: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Check, before the work starts, that files can be written without overwriting an input.

    An input is recognised under any name: through links, and where a file system ignores case.

    Raises:
        UserError: If a path is a folder, a device, or one of ``inputs``, its directory does not exist or cannot be
            written to, or its name is too long.
    """
    paths = list(paths)
    existing: dict[tuple[int, int] | None, Path] = {identity: path for path in paths if (identity := _identity(path))}
    # Looked at only if needed: the inputs may be 118 000 images in a network.
    for source in inputs if existing else ():
        if path := existing.get(_identity(source)):
            raise UserError(f"{path}: the output would overwrite an input of this command; give another name")
    folders = set()
    for path in paths:
        _check_file(path)
        folders.add(path.parent)
    for folder in folders:
        _check_writable(folder)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what two names of one file have in common, or None where there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _check_file(path: Path) -> None:
    """Raise a UserError if ``path`` cannot be the name of a file: a new one, or one that may be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # a link that leads nowhere too
        if not path.parent.is_dir():
            raise UserError(f"{path}: its directory does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    else:
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: the output must be a file, but a folder has this name")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: the output must be a file, but a device or a pipe has this name")


def make_output_folder(folder: Path) -> None:
    """Create a folder, and its parents, for output, before the work starts.

    Raises:
        UserError: If a file has its name or that of a parent, or it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: the output must be a folder, but a file has this name or a parent's") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be written to: {error.strerror}") from None


def save_tensors(content: Any, path: Path) -> None:
    """Write a file as ``torch.save`` does.

    Raises:
        OSError: If it cannot be written.
    """
    with stream_errors(path):
        torch.save(content, path)


@contextmanager
def stream_errors(path: Path) -> Iterator[None]:
    """Raise an OSError where a C++ library cannot write to ``path``.

    torch's zip writer and OpenVINO report a full disk as RuntimeErrors that do not mention the disk.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("PytorchStreamWriter|inline_container|iostream", str(error)):
            raise
        raise OSError(errno.EIO, f"is the disk full? {str(error).splitlines()[0]}", str(path)) from error
