"""Annotation tables kept between runs, as flat files that all processes of all runs map.

Where: ``$RESDET_CACHE`` (``off`` for none), else ``$XDG_CACHE_HOME/resdet``, else ``~/.cache/resdet``; never beside the
data. One file for each annotation file, found by its resolved path.

When it is taken: if version and checksum of the cached file are right and the annotation file has the size, inode,
mtime and ctime that it had (in nanoseconds). If these differ but the size does not, its SHA-256 decides; likewise if
the file had been changed less than two seconds before it was cached, when another change could leave the times alone.
What remains: whoever turns the clock back, or writes to the disk behind the file system, can swap the contents unseen;
on Windows, where ctime is the time of creation, whoever restores the mtime after writing.

When it goes: entries not used for 30 days, and the least recently used beyond 4 GiB, are removed when one is written.
Processes that map a removed file keep it.

VOC folders are not cached. The 17,125 files of VOC2012 take 1.6 seconds of CPU to parse, and a cache would have to ask
the file system for as many sizes and times before it could be trusted, which on a network costs what reading them does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resdet.data.annotations import AnnotationTable
from resdet.data.mapped import map_arrays, write_arrays
from resdet.files import written_whole
from resdet.types import categories_from_plain, categories_to_plain

logger = logging.getLogger(__name__)

VERSION = 1
"""Goes up whenever the same annotation file would be read as another table."""

SMALLEST = 4 << 20
"""Bytes. Smaller files are read in less time than it takes to make sure that a cached copy is on the disk."""

MAX_UNUSED_DAYS = 30
MAX_TOTAL = 4 << 30
_SETTLED_NS = 2_000_000_000
_SUFFIX = ".table"


def cache_folder() -> Path | None:
    """Give the folder for cached tables, which need not exist; None if there is to be none."""
    chosen = os.environ.get("RESDET_CACHE")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base) / "resdet" if base else Path.home() / ".cache" / "resdet"
    except RuntimeError:  # a user without a home
        return None


def cached_table(source: Path, read: Callable[[bytes], AnnotationTable]) -> AnnotationTable:
    """Give the table of an annotation file from the cache, or read it and put it there.

    Processes that ask for the same file at once wait for the first of them to read it. A cache that cannot be written
    or is damaged is said in the log, and costs no more than time.

    Args:
        source: The annotation file.
        read: Makes the table of the file's contents.

    Raises:
        OSError: If the annotation file cannot be read.
    """
    folder = cache_folder()
    if folder is None or os.stat(source).st_size < SMALLEST:
        return read(source.read_bytes())
    real = os.path.realpath(source)
    entry = folder / f"{Path(real).stem[:64]}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}{_SUFFIX}"
    table = _find(entry, source, real)
    if table is not None:
        return table
    with _alone(entry):
        table = _find(entry, source, real, said=True)
        if table is not None:
            return table
        with source.open("rb") as file:
            state = _State.of(file.fileno(), real)
            data = file.read()
        table = read(data)
        if _State.of(source, real).differs_from(state):
            logger.warning("%s: changed while it was read; not cached", source)
            return table
        digest = hashlib.sha256(data).hexdigest()
        del data
        if not _write(entry, table, state, digest):
            return table
        _prune(folder, keep=entry)
        logger.info("%s: read, and cached in %s", source, folder)
        return _find(entry, source, real, said=True) or table


@dataclass(frozen=True)
class _State:
    """What the file system says of an annotation file."""

    path: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    settled: bool

    @classmethod
    def of(cls, file: int | Path, real: str) -> _State:
        now = time.time_ns()
        stat = os.stat(file)
        settled = now - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
        return cls(real, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, settled)

    def differs_from(self, other: _State) -> bool:
        return asdict(self) | {"settled": None} != asdict(other) | {"settled": None}


def _find(entry: Path, source: Path, real: str, *, said: bool = False) -> AnnotationTable | None:
    """Give the cached table if it is what reading ``source`` would give; log why not, unless that has been said."""
    try:
        arrays, facts = map_arrays(entry)
        if facts["version"] != VERSION:
            raise ValueError("of another version")
        then = _State(**facts["source"])
        table = AnnotationTable.from_arrays(
            arrays, str(source), categories_from_plain(facts["categories"]), tuple(facts["notes"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not said:
            logger.warning("%s: its cached table %s cannot be used (%s); reading it again", source, entry, error)
        return None
    now = _State.of(source, real)
    if now.differs_from(then) or not then.settled:
        same = (now.path, now.size) == (then.path, then.size) and _digest(source) == facts["sha256"]
        # Whatever changed since the times were taken may have come after the digest.
        if not same or _State.of(source, real).differs_from(now):
            if not said:
                logger.info("%s: changed since it was cached; reading it again", source)
            return None
        if now.settled and _write(entry, table, now, facts["sha256"]):
            return _find(entry, source, real, said=said)
    with contextlib.suppress(OSError):
        os.utime(entry)
    if not said:
        logger.info("%s: from the cache, %s", source, entry)
    return table


def _digest(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum.update(part)
    return checksum.hexdigest()


def _write(entry: Path, table: AnnotationTable, state: _State, digest: str) -> bool:
    facts: dict[str, Any] = {
        "version": VERSION,
        "source": asdict(state),
        "sha256": digest,
        "categories": categories_to_plain(table.categories),
        "notes": table.notes,
    }
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(entry) as beside, beside.open("wb+") as file:
            write_arrays(file, table.to_arrays(), facts)
    except OSError as error:
        _say_unwritable(entry.parent, str(error))
        return False
    return True


@functools.cache
def _say_unwritable(folder: Path, why: str) -> None:
    logger.warning("%s: annotations cannot be cached here, every start reads them anew (%s)", folder, why)


@contextlib.contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """Let one process at a time through; all of them where files cannot be locked, which costs only time."""
    try:
        import fcntl

        entry.parent.mkdir(parents=True, exist_ok=True)
        file = entry.with_suffix(".lock").open("ab")
    except (ImportError, OSError):
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prune(folder: Path, *, keep: Path) -> None:
    now = time.time()
    total = 0
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    for used, size, path in sorted(found, reverse=True):
        days = (now - used) / 86400
        if path.suffix == _SUFFIX and not path.name.startswith("."):
            total += size
            gone = path != keep and (days > MAX_UNUSED_DAYS or total > MAX_TOTAL)
        else:
            # Unfinished files of a process that was killed, and locks, which only matter while a file is read.
            gone = days > 1 and (path.suffix == ".lock" or path.name.endswith(_SUFFIX))
        if gone:
            with contextlib.suppress(OSError):
                path.unlink()
