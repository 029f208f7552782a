"""Keep annotation tables between runs, as safetensors files that all processes of all runs map.

Location: ``$RESDET_CACHE`` (``off`` for none), else the user's cache folder (``$XDG_CACHE_HOME/resdet`` or
``~/.cache/resdet`` on Linux); never next to the data. Each annotation file has one entry, named by its resolved path.

Validity: an entry is used if its version and checksum are right and the annotation file has the size, inode, mtime and
ctime (in nanoseconds) that it had. If these differ but the size does not, the file's SHA-256 decides; likewise if the
file had changed less than two seconds before it was cached, when another change could leave the times alone. What
remains undetected: contents swapped while the clock is set back or by writing past the file system; on Windows, where
ctime is the time of creation, also contents whose mtime is restored after writing.

Removal: writing an entry removes those not used for 30 days, and the least recently used beyond 4 GiB. Processes that
map a removed file keep it.

VOC folders are not cached. The 17,125 files of VOC2012 take 1.6 seconds of CPU to parse; to trust a cache of them, one
would have to query as many sizes and times, which on a network costs what reading the files does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors.numpy import save

from resdet.data.annotations import AnnotationTable, Arrays
from resdet.data.sharing import header_of, map_file
from resdet.files import written_whole
from resdet.types import categories_from_plain, categories_to_plain

logger = logging.getLogger(__name__)

VERSION = 3
"""Goes up whenever the same annotation file would be read as another table."""

SMALLEST = 4 << 20
"""Bytes. Smaller files are read in less time than it takes to make sure that a cached copy is on the disk."""

MAX_UNUSED_DAYS = 30
MAX_TOTAL = 4 << 30
_LONGEST_WAIT = 600
_SETTLED_NS = 2_000_000_000
_SUFFIX = ".table"
_DTYPES = {"F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def cache_folder() -> Path | None:
    """Return the folder for cached tables, which need not exist, or None if there is to be no cache."""
    chosen = os.environ.get("RESDET_CACHE")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    folder = user_cache_path("resdet", appauthor=False)
    return folder if folder.is_absolute() else None  # relative for a user without a home


def cached_table(source: Path, read: Callable[[bytes], AnnotationTable]) -> AnnotationTable:
    """Return the table of an annotation file from the cache, or read it and cache it.

    ``read`` makes the table from the file's contents. Processes that ask for the same file at once wait for the first
    of them to read it. A cache that is damaged or cannot be written is logged and costs only time; an annotation file
    that cannot be read raises an OSError.
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
        table = _find(entry, source, real, logged=True)
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
        # The mapped table takes the place of the one in this process's own memory.
        return _find(entry, source, real, logged=True) or table


@dataclass(frozen=True)
class _State:
    """What the file system tells about an annotation file."""

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
        return replace(self, settled=other.settled) != other


def _find(entry: Path, source: Path, real: str, *, logged: bool = False) -> AnnotationTable | None:
    """Return the cached table if it is what reading ``source`` would give; log why not, unless already ``logged``."""
    try:
        arrays, facts = _map_arrays(entry)
        if facts["version"] != VERSION:
            raise ValueError("of another version")
        then = _State(**facts["source"])
        categories = categories_from_plain(facts["categories"])
        table = AnnotationTable.from_arrays(arrays, str(source), categories, tuple(facts["notes"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not logged:
            logger.warning("%s: its cached table %s cannot be used (%s); reading it again", source, entry, error)
        return None
    now = _State.of(source, real)
    if now.differs_from(then) or not then.settled:
        same = (now.path, now.size) == (then.path, then.size) and _digest(source) == facts["sha256"]
        # Whatever changed since the times were taken may have come after the digest.
        if not same or _State.of(source, real).differs_from(now):
            if not logged:
                logger.info("%s: changed since it was cached; reading it again", source)
            return None
        if now.settled and _write(entry, table, now, facts["sha256"]):
            return _find(entry, source, real, logged=logged)
    with contextlib.suppress(OSError):
        os.utime(entry)  # counts as used now
    if not logged:
        logger.info("%s: from the cache, %s", source, entry)
    return table


def _digest(path: Path) -> str:
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum.update(part)
    return checksum.hexdigest()


def _map_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Map an entry and return its arrays, which are read-only, and the facts about them.

    safetensors would copy the arrays. The checksum reads the file once (50 MB in 0.04 s) and brings its pages into
    memory. A file that is cut short or changed raises a ValueError, one of another kind also LookupError or TypeError.
    """
    file = map_file(path)
    header = header_of(file)
    specs = json.loads(header[8:])
    metadata = specs.pop("__metadata__")
    contents = np.asarray(file)[len(header) :]
    arrays: Arrays = {}
    for name, spec in specs.items():
        start, end = spec["data_offsets"]
        arrays[name] = contents[start:end].view(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
    if _checksum(arrays, metadata["facts"]) != metadata["sha256"]:
        raise ValueError("its checksum does not match: cut short or changed")
    return arrays, json.loads(metadata["facts"])


def _checksum(arrays: Arrays, facts: str) -> str:
    checksum = hashlib.sha256(facts.encode())
    for name, array in sorted(arrays.items()):
        checksum.update(f"{name} {array.dtype} {array.shape}".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).data)
    return checksum.hexdigest()


def _write(entry: Path, table: AnnotationTable, state: _State, digest: str) -> bool:
    contents = {"sha256": digest, "categories": categories_to_plain(table.categories), "notes": table.notes}
    facts = json.dumps({"version": VERSION, "source": asdict(state), **contents})
    arrays = {name: np.ascontiguousarray(array) for name, array in table.to_arrays().items()}
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(entry) as temporary:
            # safetensors' save_file would make it unreadable for other users of a shared cache.
            temporary.write_bytes(save(arrays, {"facts": facts, "sha256": _checksum(arrays, facts)}))
    except OSError as error:
        _log_unwritable(entry.parent, str(error))
        return False
    return True


@functools.cache
def _log_unwritable(folder: Path, why: str) -> None:
    logger.warning("%s: annotations cannot be cached here, every start reads them anew (%s)", folder, why)


@contextlib.contextmanager
def _alone(entry: Path) -> Iterator[None]:
    """Let one process at a time through; all of them where files cannot be locked, which costs only time."""
    with contextlib.ExitStack() as stack:
        # NotImplementedError: a file system without locks.
        with contextlib.suppress(OSError, NotImplementedError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(entry.with_suffix(".lock"), timeout=_LONGEST_WAIT))
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
            remove = path != keep and (days > MAX_UNUSED_DAYS or total > MAX_TOTAL)
        else:
            # Unfinished files of a process that was killed, and locks, which only matter while a file is read.
            remove = days > 1 and (path.suffix == ".lock" or path.name.endswith(_SUFFIX))
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()
