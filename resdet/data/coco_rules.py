"""Read the records of a COCO instances json as they are in the file, and check them against every rule of the format.

``read_coco`` refuses a file at its first problem; ``resdet.check`` lists them all. Both use ``record_problems``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from resdet.errors import DataError

HOW_TO_GET_COCO = (
    "COCO 2017 is three archives from https://cocodataset.org/#download: train2017.zip, val2017.zip and "
    "annotations_trainval2017.zip, unpacked side by side into one folder, which then holds train2017/, val2017/ and "
    "annotations/instances_{train,val}2017.json"
)

Record = dict[str, Any]
SECTIONS = ("images", "annotations", "categories")
MAX_SIDE = 2**31 - 1
"""Pixels: an image's sides are kept in 32 bits."""

_KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True)
class Problem:
    """Something about a dataset that its owner should know, with the ids and the file concerned."""

    kind: str  # explained in resdet.check.kinds
    message: str  # one line: what must hold, what was found, and in which record
    image_ids: tuple[int, ...] = ()
    annotation_ids: tuple[int, ...] = ()
    file: str = ""
    count: int = 1  # records, files or pairs that it stands for

    def __str__(self) -> str:
        return f"{self.file}: {self.message}" if self.file else self.message


@dataclass(frozen=True)
class CocoRecords:
    """A COCO json: three lists, whose entries may be anything."""

    path: Path
    document: Record  # the whole file; the three lists are among its entries
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


def load_records(path: Path) -> CocoRecords:
    """Read a COCO json without checking its records.

    Raises:
        DataError: If the file is missing, is not json, or does not hold the three lists. The message names the file.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such annotation file. {HOW_TO_GET_COCO}")
    if path.is_dir():
        raise DataError(f"{path}: an annotation file (.json) is needed, got a folder")
    try:
        with path.open("rb") as file:
            data = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a COCO annotation file: nested too deeply") from error
    # Not json, not text, or a number of thousands of digits, which Python refuses to parse.
    except ValueError as error:
        raise DataError(f"{path}: not a json file, or cut short ({path.stat().st_size} bytes): {error}") from error
    return _sections_of(data, path)


def _sections_of(data: object, path: Path) -> CocoRecords:
    if isinstance(data, list):
        if data and isinstance(data[0], dict) and "score" in data[0]:
            what = "these are detection results; the ground truth they were scored against is needed"
        else:
            what = "got a json list"
        raise DataError(f"{path}: not a COCO annotation file: {what}")
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a COCO annotation file: got a json {type(data).__name__}")
    for key in SECTIONS:
        if key not in data:
            hint = {
                "annotations": " (COCO's image_info files have none)",
                "categories": " (COCO's captions files have none; instances_*.json is needed)",
            }.get(key, "")
            raise DataError(f"{path}: not a COCO annotation file: no {key!r}{hint}; its keys are {sorted(data)[:8]}")
        if not isinstance(data[key], list):
            raise DataError(f"{path}: {key!r} must be a list, got {_show(data[key])}")
    return CocoRecords(path, data, *(data[key] for key in SECTIONS))


def record_problems(records: CocoRecords) -> Iterator[Problem]:
    """Yield every violation of the format, whatever else is wrong; a file with any is refused.

    The order: entries that are no objects, empty sections, then categories, images and annotations, each rule in the
    order of the file. Values are checked column by column, so a sound file of 860,000 annotations takes a second;
    records are checked one by one only where a column is not sound.
    """
    sections = {key: _Section.of(key, getattr(records, key)) for key in SECTIONS}
    problems = _problems(records, sections)
    file = str(records.path)
    for kind, message, image_ids, annotation_ids in problems:
        # All annotations of unknown images, or of unknown categories, are one problem.
        count = max(len(annotation_ids), 1)
        yield Problem(kind, message, image_ids, annotation_ids, file, count)


class Integers(NamedTuple):
    """Values of which not all need be integers."""

    values: npt.NDArray[np.int64]  # [V], 0 where not an integer
    valid: npt.NDArray[np.bool_]  # [V]

    def at(self, row: int) -> tuple[int, ...]:
        """Return one value, or nothing if it is not an integer."""
        return (int(self.values[row]),) if self.valid[row] else ()

    def among(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the integers in some rows."""
        return self.values[rows][self.valid[rows]]


_Found = tuple[str, str, tuple[int, ...], tuple[int, ...]]
"""Kind, message, image ids and annotation ids."""


@dataclass(frozen=True)
class _Section:
    """The ``R`` objects of a section."""

    kind: str
    records: list[Record]
    numbers: npt.NDArray[np.int64]  # [R], positions in the file from 1
    ids: Integers  # [R]

    @classmethod
    def of(cls, key: str, entries: list[Any]) -> _Section:
        numbers = np.array([n for n, entry in enumerate(entries, start=1) if isinstance(entry, dict)], dtype=np.int64)
        objects = entries if len(numbers) == len(entries) else [entries[n - 1] for n in numbers]
        return cls(_KINDS[key], objects, numbers, as_integers([record.get("id") for record in objects]))

    def name(self, row: int) -> str:
        """Name a record in a message: by its id, or its position in the file if it has none."""
        valid, ids = self.ids.valid, self.ids.values
        return f"{self.kind} {ids[row]}" if valid[row] else f"{self.kind} number {self.numbers[row]}"

    def column(self, key: str) -> list[Any]:
        """Return one value of each record."""
        return [record.get(key) for record in self.records]


def _problems(records: CocoRecords, sections: dict[str, _Section]) -> Iterator[_Found]:
    for key in SECTIONS:
        entries = getattr(records, key)
        if len(sections[key].records) < len(entries):
            for position, entry in enumerate(entries):
                if not isinstance(entry, dict):
                    yield "not_an_object", f"{key!r}[{position}] must be an object, got {_show(entry)}", (), ()
    for key in ("images", "categories"):
        if not getattr(records, key):
            yield f"no_{key}", f"{key!r} is empty", (), ()
    categories, images, objects = (sections[key] for key in ("categories", "images", "annotations"))
    yield from _id_problems(categories)
    yield from _category_name_problems(categories)
    yield from _id_problems(images)
    yield from _file_name_problems(images)
    for key in ("height", "width"):
        yield from _side_problems(images, key)
    yield from _id_problems(objects)
    image_ids = as_integers(objects.column("image_id"))
    yield from _reference_problems(objects, image_ids, "image_id", images, "images")
    yield from _reference_problems(objects, image_ids, "category_id", categories, "categories")
    for kind, row, message in _value_problems(objects):
        yield kind, message, image_ids.at(row), objects.ids.at(row)


def _id_problems(section: _Section) -> Iterator[_Found]:
    kind = section.kind
    for row in np.flatnonzero(~section.ids.valid).tolist():
        got = _show(section.records[row].get("id"))
        yield f"bad_{kind}_id", f"{kind} number {section.numbers[row]}: id must be an integer, got {got}", (), ()
    ids = section.ids.values[section.ids.valid]
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    for i in repeated[np.argsort(first[repeated])].tolist():  # in the order of the file
        message = f"{kind} id {unique[i]} is given {counts[i]} times"
        concerned = (int(unique[i]),)
        image_ids, annotation_ids = concerned if kind == "image" else (), concerned if kind == "annotation" else ()
        yield f"duplicate_{kind}_id", message, image_ids, annotation_ids


def _category_name_problems(categories: _Section) -> Iterator[_Found]:
    name_of: dict[str, str] = {}
    # Of a category id given twice, which is a problem of its own, only the first record is checked.
    ids, valid = categories.ids
    _, first = np.unique(ids[valid], return_index=True)
    for row in np.flatnonzero(valid)[first].tolist():
        name = categories.records[row].get("name")
        category_id = str(ids[row])
        if not isinstance(name, str) or not name:
            yield "bad_category_name", f"category {category_id}: name must be a string, got {_show(name)}", (), ()
        elif name in name_of:
            message = f"categories {name_of[name]} and {category_id} have the same name {name!r}"
            yield "duplicate_category_name", message, (), ()
        else:
            name_of[name] = category_id


def _file_name_problems(images: _Section) -> Iterator[_Found]:
    for row, name in enumerate(images.column("file_name")):
        if is_file_name(name):
            continue
        what = "a string" if not isinstance(name, str) or not name else "a name that files can have"
        message = f"{images.name(row)}: file_name must be {what}, got {_show(name)}"
        yield "bad_file_name", message, images.ids.at(row), ()


def is_file_name(name: object) -> TypeGuard[str]:
    """Check that a value is a string that can name a file."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    try:
        # Half of a surrogate pair, which json allows, cannot be encoded.
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _side_problems(images: _Section, key: str) -> Iterator[_Found]:
    values = images.column(key)
    sides, whole = as_integers(values)
    for row in np.flatnonzero(~whole | (sides < 1) | (sides > MAX_SIDE)).tolist():
        message = f"{images.name(row)}: {key} must be a whole number of pixels > 0, got {_show(values[row])}"
        yield "bad_image_size", message, images.ids.at(row), ()


def _reference_problems(
    objects: _Section, image_ids: Integers, key: str, known: _Section, known_name: str
) -> Iterator[_Found]:
    values = objects.column(key)
    wanted, valid = image_ids if key == "image_id" else as_integers(values)
    for row in np.flatnonzero(~valid).tolist():
        message = f"{objects.name(row)}: {key} must be an integer, got {_show(values[row])}"
        yield f"bad_{known.kind}_reference", message, image_ids.at(row), objects.ids.at(row)
    unknown = np.flatnonzero(valid & ~np.isin(wanted, known.ids.values[known.ids.valid]))
    if len(unknown):
        more = f" ({len(unknown)} annotations of this kind)" if len(unknown) > 1 else ""
        first = int(unknown[0])
        message = f"{objects.name(first)}: {key} {wanted[first]} is not among its {known_name!r}{more}"
        concerned = tuple(np.unique(image_ids.among(unknown)).tolist())
        yield f"unknown_{known.kind}", message, concerned, tuple(objects.ids.among(unknown).tolist())


def _value_problems(objects: _Section) -> Iterator[tuple[str, int, str]]:
    """Yield kind, row and message of what is wrong with boxes, crowd flags and areas."""
    boxes = objects.column("bbox")
    for row in np.flatnonzero(np.isnan(as_boxes(boxes)[:, 0])).tolist():
        image_id = _show(objects.records[row].get("image_id"))
        message = f"bbox must be 4 finite numbers [x, y, width, height], got {_show(boxes[row])}"
        yield "bad_box", row, f"{objects.name(row)} of image {image_id}: {message}"
    for row, value in enumerate(objects.column("iscrowd")):
        if (value or 0) not in (0, 1):
            yield "bad_iscrowd", row, f"{objects.name(row)}: iscrowd must be 0 or 1, got {_show(value)}"
    for row, value in enumerate(objects.column("area")):
        if value is not None and not _is_finite(value):
            yield "bad_area", row, f"{objects.name(row)}: area must be a finite number, got {_show(value)}"


def _is_finite(value: object) -> TypeGuard[float]:
    # Compared without conversion: an integer of 400 digits has no float.
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def as_integers(values: Sequence[Any]) -> Integers:
    """Convert values to integers as far as they are.

    ``640.0`` is an integer, because JSON writers of some languages have no others; ``"640"`` is not.
    """
    column = _integer_column(values)
    if column is not None:
        return Integers(column, np.ones(len(values), dtype=np.bool_))
    singles = [_integer_column([value]) for value in values]
    whole = np.array([single is not None for single in singles], dtype=np.bool_)
    return Integers(np.array([0 if single is None else single[0] for single in singles], dtype=np.int64), whole)


def _integer_column(values: Sequence[Any]) -> npt.NDArray[np.int64] | None:
    """Return int64 ``[V]``, or None unless all of them are seen to be integers at once."""
    if not values:
        return np.zeros(0, dtype=np.int64)
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        return None
    if array.dtype.kind != "i" and not (np.abs(array) < 2**53).all():
        return None
    whole = array.astype(np.int64)
    return whole if (whole == array).all() else None


def as_boxes(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Convert boxes to float64 ``[V, 4]``, NaN where one is not a list of 4 finite numbers."""
    # Checked before conversion: NumPy would turn the strings ["1", "2", "3", "4"] into numbers.
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.zeros(0)
    if array.shape == (len(values), 4) and array.dtype.kind in "iuf" and np.isfinite(array).all():
        return array.astype(np.float64)
    rows = [value if isinstance(value, list) and len(value) == 4 else [None] * 4 for value in values]
    boxes = as_numbers([number for row in rows for number in row]).reshape(-1, 4)
    boxes[np.isnan(boxes).any(axis=1)] = np.nan
    return boxes


def as_numbers(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Convert values to float64 ``[V]``, NaN where one is not a finite number."""
    return np.array([float(value) if _is_finite(value) else np.nan for value in values], dtype=np.float64)


def _show(value: object) -> str:
    """Format a value for a message, short and on one line."""
    try:
        text = "nothing" if value is None else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
