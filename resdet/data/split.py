"""Hold out a part of a dataset's images, chosen by a hash of their files, so that nothing alike is on both sides.

An image's number in [0, 1) is a hash of its file (its size and both ends: 32 KiB are read) and the seed; below the
fraction it is held out. So neither names nor order nor other images decide. What belongs together is a group and goes
by its lowest hash:

* files with the same bytes or pixels, and near duplicates (``near_duplicates``),
* copies that Roboflow made of one image (``NAME_jpg.rf.HASH.jpg``),
* frames of a video, by name (``NAME_frame_12``, ``NAME_mp4-12``, and ``frame_12`` in a folder of its own); a video that
  holds more than the fraction of all images is cut into stretches of ``_STRETCH`` numbers.

Then whole groups change sides where a class would be on one side only, the rarest first, until ``_MORE`` times the
fraction is held out in addition. Files that cannot be read are trained on, where ``unreadable`` decides about them.
Results are the same on every machine and for every number of workers.

Cost: each image is decoded once, about as in one epoch, and the groups are kept in the cache of annotation tables until
a file changes. Above ``MAX_COMPARED`` images none is decoded, and near duplicates are not looked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resdet.data.annotations import AnnotationTable
from resdet.data.cache import cached_text
from resdet.data.image_facts import all_image_facts, default_num_workers, near_duplicates
from resdet.data.image_files import ImageFolder
from resdet.errors import DataError, UserError, name_some
from resdet.files import write_text
from resdet.types import Bools, Floats, Ints

logger = logging.getLogger(__name__)

MAX_COMPARED = 20_000
"""Images up to which near duplicates are looked for: all are decoded, and each is compared with each."""

TRAIN_LIST, VAL_LIST = "train_images.txt", "val_images.txt"
"""Files in a run's folder: the names of the images on either side, one a line."""

_VERSION = 1  # goes up whenever the same files would be told apart otherwise
_END = 16 << 10  # bytes read at each end of a file
_STRETCH = 100
_MORE = 0.5  # times the fraction: how much may be held out beyond it so that every class is
_ROBOFLOW = re.compile(r"\.rf\.[0-9a-zA-Z]{8,}$")
_FRAME = re.compile(
    r"^(?P<video>.*?[._](?:mp4|mov|avi|mkv|webm|m4v|mpe?g|wmv)|(?:.*[-_ .])?frame)[-_ .]*(?P<number>\d+)"
)


def held_out_images(table: AnnotationTable, root: Path, *, fraction: float, seed: int) -> tuple[Bools, list[str]]:
    """Return which images of a table are held out, bool ``[I]``, and what is to be said of it, one line each.

    ``root`` is the folder of the images.

    Raises:
        DataError: If all images belong together, so that none can be held out.
    """
    files = _File.all_of(table, Path(root))
    groups, videos = _groups(table, files, fraction)  # [I], 0..G - 1
    lowest = [""] * (int(groups.max(initial=-1)) + 1)
    for file, group in zip(files, groups.tolist(), strict=True):
        lowest[group] = min(lowest[group] or file.key, file.key)
    salt = seed.to_bytes(16, "little")
    hashes = (hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest() for key in lowest)
    numbers = np.array([int.from_bytes(digest, "big") / 2**64 for digest in hashes])  # [G]
    sizes = np.bincount(groups)  # [G]
    movable = np.bincount(groups, weights=[not file.is_readable for file in files]) == 0
    if (small := movable & (sizes <= max(fraction * len(groups), 1))).any():
        movable = small
    if len(sizes) < 2 or not movable.any():
        raise DataError(
            f"{table.name}: data.val.fraction cannot hold out any of its {table.num_images} images: they look alike, "
            "belong together or cannot be read; data.val must state other images"
        )
    boxes = table.trainable(use_difficult=True)
    pairs = np.stack([groups[table.image_of_box()[boxes]], table.labels[boxes]], axis=1)  # [N, 2]
    held_out = _sides(numbers, sizes, movable, np.unique(pairs, axis=0), fraction)[groups]
    return held_out, [*_told(table, held_out, sizes, fraction, seed), *videos]


@dataclass(frozen=True)
class _File:
    """What is known of an image's file."""

    key: str  # hash of what it holds
    alike: int  # the same for files that look alike
    is_readable: bool

    @staticmethod
    def all_of(table: AnnotationTable, root: Path) -> list[_File]:
        """Return what is known of a table's files, from the cache if none has changed."""
        folder = ImageFolder(root)
        paths = [os.path.join(root, folder.find(name) or name) for name in table.file_names]
        with ThreadPoolExecutor(8) as pool:
            state = [_VERSION, len(paths) <= MAX_COMPARED, *zip(paths, pool.map(_state, paths), strict=True)]
        text = cached_text(root.name, json.dumps(state), lambda: json.dumps(_read(table.name, paths)))
        return [_File(*row) for row in json.loads(text)]


def _state(path: str) -> list[int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(name: str, paths: list[str]) -> list[tuple[str, int, bool]]:
    """Look at image files and return the fields of ``_File`` for each."""
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(_key, paths))
    pairs, readable = _repeated(keys), [os.path.isfile(path) for path in paths]
    if len(paths) <= MAX_COMPARED:
        logger.info("%s: looking for what is alike among %d images, to hold out a part", name, len(paths))
        workers = min(default_num_workers(), len(paths) // 64)
        facts = all_image_facts([*dict.fromkeys(paths)], num_workers=workers, progress=False)
        each = [facts[path] for path in paths]
        readable = [of_file.header is not None for of_file in each]
        rows = [row for row, is_readable in enumerate(readable) if is_readable]
        pairs += [(rows[i], rows[j]) for i, j in _repeated([each[row].digest for row in rows])]
        pairs += [(rows[i], rows[j]) for i, j in near_duplicates([each[row] for row in rows])]
    return list(zip(keys, _joined(len(paths), pairs).tolist(), readable, strict=True))


def _key(path: str) -> str:
    """Return a hash of a file's size and both ends; of what cannot be read, one of its name."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_END)
            file.seek(max(_END, size - _END))
            data = b"%d " % size + head + file.read()
    except (OSError, ValueError):
        data = os.fsencode(os.path.basename(path))
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _repeated(values: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Return the pairs ``(first, i)`` of positions with equal values; None equals nothing."""
    first: dict[Hashable, int] = {}
    return [(first.setdefault(value, i), i) for i, value in enumerate(values) if value is not None]


def _joined(number: int, pairs: Iterable[tuple[int, int]]) -> Ints:
    """Return the group 0..G - 1 of each of ``number`` items if both of each pair are in one, int64 ``[number]``."""
    above = list(range(number))

    def top(item: int) -> int:
        while above[item] != item:
            above[item] = item = above[above[item]]
        return item

    for one, other in pairs:
        above[top(one)] = top(other)
    return np.unique([top(item) for item in range(number)], return_inverse=True)[1].astype(np.int64)


def _groups(table: AnnotationTable, files: Sequence[_File], fraction: float) -> tuple[Ints, list[str]]:
    """Return the group of each image, int64 ``[I]``, and what is to be said of videos."""
    names, frames = list[tuple[str, str]](), list[int]()
    for name in table.file_names:
        folder, stem = os.path.split(os.path.splitext(name)[0])
        stem = _ROBOFLOW.sub("", stem)
        frame = _FRAME.match(stem.lower())
        names.append((folder, frame["video"] if frame else stem))
        frames.append(int(frame["number"]) if frame else -1)
    counts = Counter(name for name, frame in zip(names, frames, strict=True) if frame >= 0)
    long = {name for name, count in counts.items() if count > fraction * len(names)}
    families = [(name, frame // _STRETCH if name in long else 0) for name, frame in zip(names, frames, strict=True)]
    told = [
        f"{table.name}: {counts[video]} images are frames of one video ({video[1]}), by their names: stretches of "
        f"{_STRETCH} frames are held out whole, and what lies next to them is nearly the same"
        for video in sorted(long)
    ]
    return _joined(len(names), [*_repeated(families), *_repeated(file.alike for file in files)]), told


def _sides(numbers: Floats, sizes: Ints, movable: Bools, pairs: Ints, fraction: float) -> Bools:
    """Return which groups are held out, bool ``[G]``; ``pairs`` ``[P, 2]`` are the groups and labels that occur."""
    held_out = movable & (numbers < fraction)
    most = sizes[held_out].sum() + max(_MORE * fraction * sizes.sum(), 1)
    groups_of: dict[int, list[int]] = defaultdict(list)
    labels_of: dict[int, list[int]] = defaultdict(list)
    for group, label in pairs.tolist():
        groups_of[label].append(group)
        labels_of[group].append(label)
    rarest_first = sorted(groups_of, key=lambda label: (len(groups_of[label]), label))
    for label in rarest_first:  # what is not trained on is never learned
        if held_out[groups_of[label]].all():
            held_out[max(groups_of[label], key=numbers.__getitem__)] = False
    for label in rarest_first:
        if held_out[groups_of[label]].any():
            continue
        for group in sorted(groups_of[label], key=numbers.__getitem__):
            is_trained_on = all((~held_out[groups_of[other]]).sum() > 1 for other in labels_of[group])
            if movable[group] and is_trained_on and sizes[held_out].sum() + sizes[group] <= most:
                held_out[group] = True
                break
    if not held_out.any():
        held_out[np.where(movable, numbers, 1).argmin()] = True
    return held_out


def _told(table: AnnotationTable, held_out: Bools, sizes: Ints, fraction: float, seed: int) -> Iterator[str]:
    share, several = held_out.mean(), sizes[sizes > 1]
    yield (
        f"{table.name}: {held_out.sum()} of {len(held_out)} images ({share:.1%}) are held out of training as data.val "
        f"(data.val.fraction {fraction:g}, data.val.seed {seed}), each by a hash of its file"
    )
    if len(several):
        groups = f"{several.sum()} images, in {len(several)} groups"
        yield f"{table.name}: images that look alike or belong together stay on one side: {groups}"
    if len(held_out) > MAX_COMPARED:
        yield f"{table.name}: has more than {MAX_COMPARED} images: near duplicates were not looked for (check does)"
    labels = table.labels[held_out[table.image_of_box()] & table.trainable(use_difficult=True)]
    absent = [repr(category.name) for category in table.categories if category.label not in labels]
    if absent:
        yield f"{table.name}: no box in data.val, and so no AP, for {name_some(absent, 8)}"


def write_lists(folder: Path, train: AnnotationTable, val: AnnotationTable) -> None:
    """Write the names of the images on either side into a run's folder."""
    for name, table in ((TRAIN_LIST, train), (VAL_LIST, val)):
        write_text(folder / name, "".join(f"{file_name}\n" for file_name in table.file_names))


def check_lists(folder: Path, train: AnnotationTable | None, val: AnnotationTable) -> None:
    """Raise a UserError if images of a run have changed sides since its lists were written; new images may be added.

    Without ``train``, only images that were trained on and are now evaluated are errors. A folder without lists passes.
    """
    moved = []
    for name, table, what in ((TRAIN_LIST, val, "were trained on"), (VAL_LIST, train, "were held out")):
        if table is not None and (folder / name).is_file():
            listed = set((folder / name).read_text(encoding="utf-8").splitlines())
            found = [one for one in table.file_names if one.encode("utf-8", "backslashreplace").decode() in listed]
            if found:
                moved.append(
                    f"{len(found)} images of data.{'val' if table is val else 'train'} {what} ({name_some(found, 3)})"
                )
    if moved:
        raise UserError(
            f"{folder}: {'; '.join(moved)}: the files, data.train or data.val have changed since the run began; undo "
            "that, or begin another run with another output_dir"
        )
