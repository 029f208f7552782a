"""Read label files of YOLO into an ``AnnotationTable``."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resdet.data.annotations import AnnotationTable, FileNames
from resdet.data.coco_rules import HOW_TO_FIX, Problem
from resdet.data.image_files import ImageFolder
from resdet.data.images import read_upright_size
from resdet.data.names import SPLITS, list_folder, on_disk, read_text
from resdet.data.yolo_layout import NAME_FILES, YoloLayout, find_layout, image_paths, label_folder
from resdet.errors import DataError, UnreadableImageError, name_some, shortened
from resdet.types import Category

TOLERANCE = 0.01
"""Share of the image's side by which a coordinate may leave it, as in Ultralytics."""

NOT_ERRORS = ("missing_label_file", "shared_label_file", "label_without_image")
"""The kinds of problems with which a data set is read all the same."""

_Report = Callable[[Problem], None]


class LabelFileError(Exception):
    """Tells what is wrong with a label file, without its name."""


def read_yolo(
    root: Path, split: str | None, *, classes: Sequence[str] | None = None, skip_unreadable: bool = False
) -> tuple[AnnotationTable, Path]:
    """Read a split of a data set in YOLO's layout; return its table and the folder that file names are relative to.

    The layout is found by ``find_layout``, and the labels of an image by ``label_folder``. Images are in the order of
    their paths, with the ids 1..I; the class at position k of the names has the label and the category id k + 1.

    A line of a label file is ``class x y width height``, the box's centre and size as shares of the image's sides; or a
    class and the corners of a polygon (7, 9, ... columns, oriented boxes among them), which gives its bounding box and
    area; or, where data.yaml has ``kpt_shape``, a box and keypoints, which are not used. Columns are separated by
    blanks or tabs. An image whose file is empty or missing has no objects; the table's notes count the missing ones.
    Lines that are repeated within a file are left out, as in Ultralytics, and counted.

    Shares refer to the image as it is seen, turned upright by its EXIF orientation; so do the table's sizes
    (``FolderImages(..., upright=True)``). Sizes are read from the image files.

    Args:
        root: The folder, or its data.yaml.
        split: ``"train"``, ``"val"`` or ``"test"``; None for all images.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.
        skip_unreadable: Leave out images whose size cannot be read, with a note, instead of raising an error.

    Raises:
        DataError: If the layout is not understood, a split is missing or has no labels at all, an image is listed
            twice, or a label file is damaged: other columns, no numbers, a class without a name, or coordinates that
            leave the image by more than ``TOLERANCE``. The message names the file and the line.

    Source: ``check_det_dataset`` and ``verify_image_label`` of ultralytics/ultralytics. Deviations: Ultralytics leaves
    an image out where this raises an error, and takes all lines of a file for polygons if one is.
    """
    unreadable: list[str] = []
    missing: list[str] = []

    def refuse(problem: Problem) -> None:
        if problem.kind == "unreadable_file" and skip_unreadable:
            unreadable.append(os.path.basename(problem.file))
        elif problem.kind == "missing_label_file":
            missing.append(os.path.basename(problem.file))
        elif problem.kind == "unreadable_file":
            raise UnreadableImageError(str(problem))
        elif problem.kind not in NOT_ERRORS:
            raise DataError(f"{problem}; {HOW_TO_FIX}")

    read = _read_files(find_layout(root), split, refuse)
    table, repeated = _without_repeated(read.table)
    notes = [*read.notes]
    for what, names in (
        (f"of {table.num_images} images have no label file, taken for images without objects", missing),
        ("images cannot be read and are left out", unreadable),
    ):
        notes += [f"{len(names)} {what}: {name_some(names)}"] if names else []
    notes += [f"{repeated} lines that repeat another of their file left out"] if repeated else []
    table = replace(table, notes=tuple(notes))
    return (table if classes is None else table.select_classes(list(classes))), read.root


@dataclass(frozen=True)
class YoloFiles:
    """What was read of a split, whatever is wrong with some of its files."""

    table: AnnotationTable
    root: Path  # of the table's file names
    files: tuple[Path, ...]  # data.yaml and the label files
    notes: tuple[str, ...]  # what was guessed about the layout


def yolo_files(root: Path, split: str | None) -> tuple[YoloFiles, list[Problem]]:
    """Read a split as ``read_yolo`` does, but continue after damaged files, and keep repeated lines.

    The images of damaged label files are left out, as in Ultralytics, with a problem for each. A missing folder or
    split raises a DataError all the same.
    """
    problems: list[Problem] = []
    return _read_files(find_layout(root), split, problems.append), problems


def parse_labels(text: str, num_classes: int, keypoints: int = 0) -> list[tuple[float, ...]]:
    """Read a label file: its rows are ``(class, x, y, width, height, area)``, all but the class as shares.

    ``x`` and ``y`` are those of the upper left corner. ``keypoints`` is the number of columns after a box.

    Raises:
        LabelFileError: With the first wrong line and their number.
    """
    rows, wrong = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if columns := line.split():
            try:
                rows.append(_parse_line(columns, num_classes, keypoints))
            except LabelFileError as error:
                wrong.append(f"line {number}: {error}")
    if wrong:
        more = f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""
        raise LabelFileError(f"{wrong[0]}{more}")
    return rows


def _parse_line(columns: list[str], num_classes: int, keypoints: int) -> tuple[float, ...]:
    values = [_number(column) for column in columns]
    if not all(math.isfinite(value) for value in values):
        got = next(column for column, value in zip(columns, values, strict=True) if not math.isfinite(value))
        if "," in got or ";" in got:
            raise LabelFileError(
                f"columns must be separated by blanks and numbers have a point, got {shortened(got, 80)!r}"
            )
        what = "the class must be its position among the names" if got is columns[0] else "columns must be numbers"
        raise LabelFileError(f"{what}, got {shortened(got, 80)!r}")
    if values[0] != int(values[0]) or not 0 <= values[0] < num_classes:
        raise LabelFileError(f"the class must be one of 0 to {num_classes - 1}, got {columns[0]}")
    num = len(columns)
    has_points = keypoints > 0 and num == 5 + keypoints
    if num == 6 and not has_points:
        raise LabelFileError("6 columns: a sixth is the confidence of a detection; labels are class x y width height")
    if num != 5 and not has_points:
        if num < 7 or num % 2 == 0 or keypoints or _are_keypoints(values):
            raise LabelFileError(_columns_needed(num, keypoints))
        corners = values[1:]
    else:
        corners = values[1:5]
    outside = next((value for value in corners if not -TOLERANCE <= value <= 1 + TOLERANCE), None)
    if outside is not None:
        raise LabelFileError(f"coordinates must be shares of the image's sides, from 0 to 1, got {outside:g}")
    if len(corners) == 4:
        x, y, width, height = corners
        return values[0], x - width / 2, y - height / 2, width, height, width * height
    xs, ys = corners[0::2], corners[1::2]
    cross = (x * ys[i - 1] - xs[i - 1] * y for i, (x, y) in enumerate(zip(xs, ys, strict=True)))  # the shoelace formula
    return values[0], min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys), abs(math.fsum(cross)) / 2


def _number(text: str) -> float:
    try:
        # float() alone would read "1_0" too.
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _are_keypoints(values: list[float]) -> bool:
    """Check for points ``x y visibility`` after a box: a polygon would hardly have 0 or 1 in each third column."""
    return len(values) >= 11 and len(values) % 3 == 2 and set(values[7::3]) <= {0, 1, 2}


def _columns_needed(num: int, keypoints: int) -> str:
    if keypoints:
        return f"{num} columns: by kpt_shape a line has {5 + keypoints}, or 5 without keypoints"
    kinds = "5 for class x y width height, or 7, 9, ... for a class and the corners of a polygon"
    return f"{num} columns: a line has {kinds}; keypoints need kpt_shape in data.yaml"


def _read_files(layout: YoloLayout, split: str | None, report: _Report) -> YoloFiles:
    """Read the images of a split; whatever is wrong with a file is reported, and the image left out if that returns."""
    sources = layout.sources(split)
    name = f"{layout.config or layout.root} ({split or 'all images'})"
    listed: dict[str, Path] = {}
    for path, source in image_paths(sources):
        if path in listed:
            where = f"listed twice, in {listed[path].name} and {source.name}"
            report(Problem("listed_twice", where, file=path))
        listed.setdefault(path, source)
    if not listed:
        raise DataError(f"{name}: no images in {name_some(map(str, sources))}")
    labels, label_of = _Labels(), {}
    paths, sizes, rows = [], [], []
    for path in sorted(listed):
        try:
            label_of[path] = label = labels.find(path)
            real = str(on_disk(Path(path)))
            size = read_upright_size(Path(real))
            text = "" if label is None else read_text(Path(label))
            of_image = parse_labels(text, len(layout.names), layout.keypoints)
        except UnreadableImageError as error:
            report(Problem("unreadable_file", str(error).removeprefix(f"{real}: "), file=real))
            continue
        except (LabelFileError, DataError) as error:
            report(Problem("bad_annotation_file", str(error).removeprefix(f"{label}: "), file=str(label)))
            continue
        paths.append(real)
        sizes.append(size)
        rows.append(np.array(of_image, dtype=np.float64).reshape(-1, 6))
    found = [label for label in label_of.values() if label is not None]
    if not found:
        where = os.path.join(label_folder(os.path.dirname(next(iter(label_of)))), "*.txt")
        raise DataError(f"{name}: none of the {len(label_of)} images has a label file; looked for {where}")
    for path, label in label_of.items():
        if label is None:
            report(Problem("missing_label_file", "no label file", file=path))
    _report_labels(label_of, labels, report)
    root = _common_folder(layout.root, paths)
    names = FileNames(Path(os.path.relpath(path, root)).as_posix() for path in paths)
    table = _table(name, layout.names, names, sizes, rows)
    notes = (*layout.notes, *(layout.notes_on[source] for source in sources if source in layout.notes_on))
    config = () if layout.config is None else (layout.config,)
    return YoloFiles(table, root, (*config, *map(Path, dict.fromkeys(found))), notes)


class _Labels:
    """Finds label files; each folder is listed once."""

    def __init__(self) -> None:
        self.folder = functools.cache(label_folder)
        self.files = functools.cache(lambda folder: ImageFolder(Path(folder), (".txt",)))

    def find(self, image: str) -> str | None:
        """Return the label file of an image, None where it has none."""
        folder, name = os.path.split(image)
        labels = self.folder(folder)
        found = self.files(labels).find(os.path.splitext(name)[0])
        return None if found is None else os.path.join(labels, found)


def _report_labels(label_of: dict[str, str | None], labels: _Labels, report: _Report) -> None:
    """Report label files that two images share, and those without an image."""
    image_of: dict[str, str] = {}
    for path, label in label_of.items():
        if label is not None and (other := image_of.setdefault(label, path)) != path:
            what = f"the labels of both {os.path.basename(other)} and {os.path.basename(path)}"
            report(Problem("shared_label_file", what, file=label))
    lists = {name for names in SPLITS.values() for name in names}  # train.txt, which darknet may have beside images
    for folder in dict.fromkeys(map(os.path.dirname, label_of)):
        # Of the whole folder: a list may name a part of its images.
        stems = {os.path.splitext(name)[0] for name in list_folder(Path(folder)) if not name.endswith(".txt")}
        for name in labels.files(labels.folder(folder)).files():
            path = os.path.join(labels.folder(folder), name)
            if path not in image_of and os.path.splitext(name)[0] not in stems | lists and name not in NAME_FILES:
                report(Problem("label_without_image", f"no image of this name in {folder}", file=path))


def _common_folder(root: Path, paths: list[str]) -> Path:
    """Return the data set's folder if all images lie in it, else the innermost folder that they share."""
    start = os.path.join(os.path.abspath(root), "")
    if all(os.path.abspath(path).startswith(start) for path in paths):
        return root
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths]))


def _table(
    name: str, class_names: Sequence[str], names: FileNames, sizes: list[tuple[int, int]], rows: list[np.ndarray]
) -> AnnotationTable:
    counts = np.array([len(of_image) for of_image in rows], dtype=np.int64)  # [I]
    columns = np.concatenate([np.zeros((0, 6)), *rows])  # [N, 6], as parse_labels returns them
    side = np.array(sizes, dtype=np.int32).reshape(-1, 2)  # [I, 2]
    height, width = np.repeat(side, counts, axis=0).T.astype(np.float64)  # [N] each
    return AnnotationTable(
        name=name,
        categories=tuple(Category(label, label, own) for label, own in enumerate(class_names, start=1)),
        image_ids=np.arange(1, len(side) + 1, dtype=np.int64),
        file_names=names,
        sizes=side,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=columns[:, 1:5] * np.stack([width, height, width, height], axis=1),
        labels=columns[:, 0].astype(np.int64) + 1,
        area=columns[:, 5] * width * height,
        crowd=np.zeros(len(columns), dtype=np.bool_),
        difficult=np.zeros(len(columns), dtype=np.bool_),
        annotation_ids=np.arange(1, len(columns) + 1, dtype=np.int64),
    )


def _without_repeated(table: AnnotationTable) -> tuple[AnnotationTable, int]:
    """Return the table without boxes that another of the same image and class equals, and how many there were."""
    columns = np.column_stack([table.image_of_box(), table.labels, table.boxes_xywh, table.area])  # [N, 7]
    _, first = np.unique(columns, axis=0, return_index=True)
    keep = np.zeros(table.num_boxes, dtype=np.bool_)
    keep[first] = True
    return table.select_boxes(keep), table.num_boxes - len(first)
