"""Keep annotation tables between runs, as safetensors files that all processes of all runs map.

Location: ``$RESDET_CACHE`` (``off`` for none), else the user's cache folder (``$XDG_CACHE_HOME/resdet`` or
``~/.cache/resdet`` on Linux); never next to the data. Each annotation file has one entry, named by its resolved path.

Validity: an entry is used if its version and checksum are right and the annotation file has the size, inode, mtime and
ctime (in nanoseconds) that it had. If these differ but the size does not, the file's SHA-256 decides; likewise if the
file had changed less than two seconds before it was cached, when another change could leave the times alone. What
remains undetected: contents swapped while the clock is set back or by writing past the file system; on Windows, where
ctime is the time of creation, also contents whose mtime is restored after writing.

Trust: a table's columns are used as they lie in the file, and a checksum is no signature. So the folder and the entry
must belong to the user and be closed to the writing of others, and every column must have the type, place, shape and
range that a reader gives it; any other entry is logged and made again. Users do not share entries.

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
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from safetensors.numpy import save

from resdet.data.annotations import AnnotationTable, Arrays
from resdet.data.sharing import header_of, is_private, map_file
from resdet.errors import UserError
from resdet.files import one_at_a_time, write_text, written_whole
from resdet.types import categories_from_plain, categories_to_plain

logger = logging.getLogger(__name__)

VERSION = 4
"""Goes up whenever the same annotation file would be read as another table."""

SMALLEST = 4 << 20
"""Bytes. Smaller files are read in less time than it takes to make sure that a cached copy is on the disk."""

MAX_UNUSED_DAYS = 30
MAX_TOTAL = 4 << 30
_LONGEST_WAIT = 600
_SETTLED_NS = 2_000_000_000
_SUFFIX, _TEXT = ".table", ".text"
_DTYPES = {"F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
# What each column is: its type in the file, how its rows are counted, and the length of a row (0: a number).
_COLUMNS = {
    "image_ids": ("I64", "images", 0),
    "sizes": ("I32", "images", 2),
    "offsets": ("I64", "offsets", 0),
    "boxes_xywh": ("F64", "boxes", 4),
    "labels": ("I64", "boxes", 0),
    "area": ("F64", "boxes", 0),
    "crowd": ("BOOL", "boxes", 0),
    "difficult": ("BOOL", "boxes", 0),
    "annotation_ids": ("I64", "boxes", 0),
    "file_names.utf8": ("U8", "characters", 0),
    "file_names.starts": ("I64", "images", 0),
    "file_names.ends": ("I64", "images", 0),
}


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
    if folder.exists() and not is_private(folder.stat()):
        _log_shared(folder)
        return read(source.read_bytes())
    real = os.path.realpath(source)
    entry = folder / f"{Path(real).stem[:64]}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}{_SUFFIX}"
    table = _find(entry, source, real)
    if table is not None:
        return table
    _make_folder(folder)
    with one_at_a_time(entry.with_suffix(".lock"), timeout=_LONGEST_WAIT):
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


def cached_text(name: str, state: str, make: Callable[[], str]) -> str:
    """Return what ``make`` returns from the cache if it was made for the same ``state``, or make and cache it.

    ``name`` begins the name of the entry. Processes that ask for the same text at once wait for the first to make it.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    if folder.exists() and not is_private(folder.stat()):
        _log_shared(folder)
        return make()
    entry = folder / f"{name[:64]}-{hashlib.sha256(state.encode(errors='surrogatepass')).hexdigest()[:32]}{_TEXT}"
    _make_folder(folder)
    with one_at_a_time(entry.with_suffix(".lock"), timeout=_LONGEST_WAIT):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            digest, _, text = entry.read_text(encoding="utf-8").partition("\n")
            if digest == hashlib.sha256(text.encode()).hexdigest():
                os.utime(entry)  # counts as used now
                return text
        text = make()
        try:
            write_text(entry, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            _prune(folder, keep=entry)
        except (OSError, UserError) as error:
            _log_unwritable(folder, str(error))
    return text


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
        _check_values(arrays, len(categories))
        table = AnnotationTable.from_arrays(arrays, str(source), categories, tuple(facts["notes"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # what was damaged or forged fails in whatever its bytes happen to mean
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
    memory. A file that is cut short, changed or forged raises a ValueError or another error.
    """
    file = map_file(path)
    header = header_of(file)
    specs = json.loads(header[8:])
    metadata = specs.pop("__metadata__")
    if specs.keys() != _COLUMNS.keys():
        raise ValueError("it has other columns than a table")
    contents = np.asarray(file)[len(header) :]
    arrays: Arrays = {}
    for name, (kind, _, width) in _COLUMNS.items():
        spec, dtype = specs[name], np.dtype(_DTYPES[kind])
        (start, end), shape = spec["data_offsets"], spec["shape"]
        row = shape[1:] == ([width] if width else [])
        numbers_are_sizes = all(type(number) is int and number >= 0 for number in (start, end, *shape))
        if spec["dtype"] != kind or not shape or not row or not numbers_are_sizes:
            raise ValueError(f"its column {name} is of another type or shape")
        if not start <= end <= len(contents) or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its column {name} is not where the file states")
        arrays[name] = contents[start:end].view(dtype).reshape(shape)
    if _checksum(arrays, metadata["facts"]) != metadata["sha256"]:
        raise ValueError("its checksum does not match: cut short or changed")
    return arrays, json.loads(metadata["facts"])


def _check_values(arrays: Arrays, num_classes: int) -> None:
    """Raise a ValueError unless columns fit each other and every number can be used as an index where it is one."""
    offsets, labels, sizes, utf8 = (arrays[name] for name in ("offsets", "labels", "sizes", "file_names.utf8"))
    starts, ends = arrays["file_names.starts"], arrays["file_names.ends"]
    lengths = {"images": len(sizes), "offsets": len(sizes) + 1, "boxes": len(labels), "characters": len(utf8)}
    if any(len(arrays[name]) != lengths[rows] for name, (_, rows, _) in _COLUMNS.items()):
        raise ValueError("its columns are of different lengths")
    if offsets[0] != 0 or offsets[-1] != len(labels) or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets do not rise from 0 to the number of boxes")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= num_classes:
        raise ValueError(f"its labels are not in 1..{num_classes}")
    if (sizes < 1).any() or any((arrays[name].view(np.uint8) > 1).any() for name in ("crowd", "difficult")):
        raise ValueError("its sizes or flags are out of range")
    utf8.tobytes().decode("utf-8", "surrogatepass")  # a UnicodeDecodeError is a ValueError
    begins = np.append((utf8 & 0xC0) != 0x80, True)  # whether a character begins at a place
    in_range = (starts >= 0) & (starts <= ends) & (ends <= len(utf8))
    if not in_range.all() or not begins[starts].all() or not begins[ends].all():
        raise ValueError("its file names are out of range")


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
        with written_whole(entry) as temporary:
            temporary.touch(mode=0o600)  # whatever the umask allows to others
            temporary.write_bytes(save(arrays, {"facts": facts, "sha256": _checksum(arrays, facts)}))
    except (OSError, UserError) as error:
        _log_unwritable(entry.parent, str(error))
        return False
    return True


def _make_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # reported when an entry cannot be written
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


@functools.cache
def _log_shared(folder: Path) -> None:
    logger.warning(
        "%s: annotations are not cached here, every start reads them anew: the folder must be yours and closed to the "
        "writing of others (chmod go-w), or RESDET_CACHE name one that is",
        folder,
    )


@functools.cache
def _log_unwritable(folder: Path, why: str) -> None:
    logger.warning("%s: annotations cannot be cached here, every start reads them anew (%s)", folder, why)


def _prune(folder: Path, *, keep: Path) -> None:
    now = time.time()
    total = 0
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    for used, size, path in sorted(found, reverse=True):
        days = (now - used) / 86400
        if path.suffix in (_SUFFIX, _TEXT) and not path.name.startswith("."):
            total += size
            remove = path != keep and (days > MAX_UNUSED_DAYS or total > MAX_TOTAL)
        else:
            # Unfinished files of a process that was killed, and locks, which only matter while a file is read.
            remove = days > 1 and (path.suffix in (".lock", _SUFFIX, _TEXT))
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()
