"""Check image files: which exist, what they hold when they are decoded, and which no annotation names."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from resdet.check.splits import DataSplit
from resdet.data.annotations import AnnotationTable, same_form
from resdet.data.coco_rules import Problem, is_file_name
from resdet.data.image_files import IMAGE_SUFFIXES, ImageFolder, list_folder, name_fault
from resdet.data.images import ImageHeader, read_header, read_image
from resdet.errors import DataError

THUMBNAIL_SIZE = (16, 17)
"""``(height, width)``: each row has 16 pairs of neighbours."""

_CHUNK = 16  # images that a process takes at a time


def image_problem(kind: str, table: AnnotationTable, index: int, what: str, file: str = "") -> Problem:
    """Make a problem that concerns one image of a table."""
    image_id = int(table.image_ids[index])
    return Problem(kind, f"image {image_id} ({table.file_names[index]}): {what}", (image_id,), file=file)


def name_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Yield file names that several images have."""
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(table.file_names):
        by_name[os.path.normpath(name)].append(index)
    for name, indices in by_name.items():
        if len(indices) > 1:
            ids = tuple(int(table.image_ids[index]) for index in indices)
            message = f"images {', '.join(map(str, ids))} have the same file_name {name!r}"
            yield Problem("duplicate_file_name", message, ids, count=len(indices) - 1)


def find_files(table: AnnotationTable, root: Path) -> tuple[dict[int, str], list[Problem]]:
    """Return the paths of a table's files that exist, by image index, and a problem for each of the others.

    Problems of missing files name the one that was probably meant; names in another Unicode form are problems too.
    """
    problems, paths, folder = [], {}, ImageFolder(root)
    for index, name in enumerate(table.file_names):
        if fault := name_fault(name):
            image_id = int(table.image_ids[index])
            problems.append(Problem("bad_file_name", f"image {image_id}: {fault}{folder.hint(name)}", (image_id,)))
            continue
        try:
            found, what = folder.find(name), "no such file in the image folder"
        except DataError as error:
            found, what = None, str(error)
        if found is None:
            what += folder.hint(name)
            problems.append(image_problem("missing_file", table, index, what, os.path.join(root, name)))
            continue
        paths[index] = os.path.join(root, found)
        if os.path.normpath(found) != os.path.normpath(name):
            what = f"the annotations have {name!a}, the disk {found!a}"
            problems.append(image_problem("other_unicode_form", table, index, what, paths[index]))
    return paths, problems


def unlisted_files(root: Path, sharing: Sequence[DataSplit]) -> Iterator[Problem]:
    """Yield the image files that none of the splits in one folder names.

    In VOC's layout a list names a part of a folder, so files with an annotation count as named.
    """
    entries = (record.get("file_name") for one in sharing for record in one.records.images if isinstance(record, dict))
    names = [name for name in entries if is_file_name(name) and not os.path.normpath(name).startswith(("..", "/"))]
    listed = {same_form(os.path.normpath(name)) for name in names}
    for folder in sorted({os.path.dirname(name) for name in names}):
        annotated: set[str] = set()
        if sharing[0].one_based:
            annotated = {same_form(Path(name).stem) for name in list_folder(root / Path(folder).parent / "Annotations")}
        for name in sorted(list_folder(root / folder)):
            path = os.path.join(folder, name)
            stem, suffix = os.path.splitext(same_form(name))
            known = same_form(os.path.normpath(path)) in listed or stem in annotated
            if suffix.lower() in IMAGE_SUFFIXES and not known:
                yield Problem("unlisted_file", "in no annotation", file=str(root / path))


def shared_files(tables: Mapping[str, AnnotationTable], paths: Mapping[str, Mapping[int, str]]) -> Iterator[Problem]:
    """Yield the files that are in both splits."""
    if len(paths) < 2:
        return
    (first, own), (second, other) = paths.items()
    index_of = {os.path.realpath(path): index for index, path in other.items()}
    for index, path in own.items():
        if (match := index_of.get(os.path.realpath(path))) is not None:
            ids = (int(tables[first].image_ids[index]), int(tables[second].image_ids[match]))
            message = f"{path}: image {ids[0]} of {first}, image {ids[1]} of {second}"
            yield Problem("train_val_overlap", message, ids, file=path)


def decoded_problems(
    table: AnnotationTable, paths: Mapping[int, str], facts: Mapping[str, ImageFacts]
) -> Iterator[Problem]:
    """Yield what is wrong with decoded images (``paths`` by image index), or does not fit their annotations."""
    modes: dict[str, list[int]] = defaultdict(list)
    for index, path in paths.items():
        found = facts[path]
        header = found.header
        if header is None:
            yield image_problem("unreadable_file", table, index, found.error.removeprefix(f"{path}: "), path)
            continue
        height, width = size = tuple(table.sizes[index].tolist())
        if header.mode != "RGB":
            modes[header.mode].append(int(table.image_ids[index]))
        orientation = f"EXIF orientation {header.orientation}"
        if header.size == size:
            if header.orientation != 1:
                yield image_problem("exif_rotation", table, index, orientation, path)
        elif header.size == size[::-1] and header.orientation >= 5:
            yield image_problem("exif_turned", table, index, orientation, path)
        else:
            what = f"the file has {header.size[1]}x{header.size[0]} pixels, the annotations say {width}x{height}"
            yield image_problem("size_mismatch", table, index, what, path)
    for mode, ids in modes.items():
        yield Problem("not_rgb", f"{len(ids)} images of mode {mode}", tuple(ids), count=len(ids))


@dataclass(frozen=True)
class ImageFacts:
    """What decoding an image file gave: an error, or all but that."""

    path: str
    error: str = ""
    header: ImageHeader | None = None
    digest: bytes = b""  # of the decoded pixels and their shape
    thumbnail: bytes = b""  # gray levels, THUMBNAIL_SIZE


def image_facts(path: str) -> ImageFacts:
    """Decode an image file as training does; an exception becomes ``error``."""
    try:
        header = read_header(Path(path))
        pixels = read_image(Path(path))
    except DataError as error:
        return ImageFacts(path, error=str(error))
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    gray = Image.fromarray(pixels).convert("L")
    thumbnail = gray.resize(THUMBNAIL_SIZE[::-1], Image.Resampling.BOX)
    return ImageFacts(path, "", header, digest.digest(), thumbnail.tobytes())


def all_image_facts(paths: Sequence[str], *, num_workers: int, progress: bool) -> dict[str, ImageFacts]:
    """Decode image files in ``num_workers`` processes (0: in this one), and return what was found by path."""
    found = _in_processes(paths, num_workers) if num_workers else map(image_facts, paths)
    bar = tqdm(found, total=len(paths), desc="images", unit="image", disable=not progress, leave=False)
    return {facts.path: facts for facts in bar}


def _in_processes(paths: Sequence[str], num_workers: int) -> Iterator[ImageFacts]:
    num_done = 0
    try:
        with ProcessPoolExecutor(num_workers) as pool:
            for found in pool.map(image_facts, paths, chunksize=_CHUNK):
                num_done += 1
                yield found
        return
    except BrokenProcessPool:
        suspects = paths[num_done : num_done + _CHUNK * (2 * num_workers + 1)]
    # A decoder has crashed its process. One process for each image finds which image it was.
    for path in suspects:
        try:
            with ProcessPoolExecutor(1) as pool:
                yield pool.submit(image_facts, path).result()
        except BrokenProcessPool:
            yield ImageFacts(path, error=f"{path}: cannot be decoded: the decoder crashes")
    yield from _in_processes(paths[num_done + len(suspects) :], num_workers)


def default_num_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
