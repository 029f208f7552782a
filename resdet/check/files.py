"""Check image files: which exist, what they hold when they are decoded, and which no annotation names."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from resdet.check.splits import DataSplit
from resdet.data.annotations import AnnotationTable
from resdet.data.coco_rules import Problem, is_file_name
from resdet.data.image_facts import ImageFacts
from resdet.data.image_files import ImageFolder, name_fault
from resdet.data.names import IMAGE_SUFFIXES, list_folder, same_form
from resdet.data.yolo_layout import label_folder
from resdet.errors import DataError


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

    In VOC's layout and in YOLO's a list may name a part of a folder, so files with an annotation count as named.
    """
    entries = (record.get("file_name") for one in sharing for record in one.records.images if isinstance(record, dict))
    names = [name for name in entries if is_file_name(name) and not os.path.normpath(name).startswith(("..", "/"))]
    listed = {same_form(os.path.normpath(name)) for name in names}
    for folder in sorted({os.path.dirname(name) for name in names}):
        annotated: set[str] = set()
        if sharing[0].one_based:
            beside = (root / folder, root / Path(folder).parent / "Annotations")
            texts = (name for place in beside for name in list_folder(place) if name.lower().endswith(".xml"))
            annotated = {same_form(Path(name).stem) for name in texts}
        elif sharing[0].upright:
            labels = label_folder(os.path.join(root, folder))
            annotated = {same_form(Path(name).stem) for name in list_folder(Path(labels)) if name.endswith(".txt")}
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
    table: AnnotationTable, paths: Mapping[int, str], facts: Mapping[str, ImageFacts], *, upright: bool = False
) -> Iterator[Problem]:
    """Yield what is wrong with decoded images (``paths`` by image index), or does not fit their annotations.

    With ``upright``, these mean images as their EXIF orientation shows them.
    """
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
        on_side = header.orientation >= 5
        turned = header.orientation != 1 if upright else on_side and header.size != size
        if header.size != (size[::-1] if turned and on_side else size):
            what = f"the file has {header.size[1]}x{header.size[0]} pixels, the annotations say {width}x{height}"
            yield image_problem("size_mismatch", table, index, what, path)
        elif header.orientation != 1:
            what = f"EXIF orientation {header.orientation}"
            yield image_problem("exif_turned" if turned else "exif_rotation", table, index, what, path)
    for mode, ids in modes.items():
        yield Problem("not_rgb", f"{len(ids)} images of mode {mode}", tuple(ids), count=len(ids))
