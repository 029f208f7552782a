"""Read the records of a COCO instances json as they are in the file, and check them against every rule of the format.

``read_coco`` refuses a file at its first problem; ``resdet.check`` lists them all. Both use ``record_problems``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from resdet.data.names import similar_path
from resdet.errors import DataError, shortened
from resdet.types import Bools, Floats, Ints

HOW_TO_GET_COCO = (
    "COCO 2017 is three archives from https://cocodataset.org/#download: train2017.zip, val2017.zip and "
    "annotations_trainval2017.zip, unpacked side by side into one folder, which then holds train2017/, val2017/ and "
    "annotations/instances_{train,val}2017.json"
)

HOW_TO_FIX = "`resdet check CONFIG --fix OUT.json` writes a mended copy, and lists every change"

Record = dict[str, Any]
SECTIONS = ("images", "annotations", "categories")
MAX_SIDE = 2**31 - 1
"""Pixels: an image's sides are kept in 32 bits."""

_KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}
_Ids = tuple[int, ...]


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
    num_named_by_url: int = 0  # images without file_name, which has been taken from their coco_url
    root_note: str = ""  # what was left out of the categories, if any (root_category)


def load_records(path: Path) -> CocoRecords:
    """Read a COCO json without checking its records; raise a DataError if it does not hold the three lists."""
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"{shortened(path)}: no such annotation file{similar_path(path) or f'. {HOW_TO_GET_COCO}'}")
    if os.path.isdir(path):
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
    if not isinstance(data, dict):
        what = f"got a json {type(data).__name__}"
        if isinstance(data, list) and data and isinstance(data[0], dict) and "score" in data[0]:
            what = "these are detection results; the ground truth they were scored against is needed"
        raise DataError(f"{path}: not a COCO annotation file: {what}")
    for key in SECTIONS:
        if key not in data:
            hint = {
                "annotations": " (COCO's image_info files have none)",
                "categories": " (COCO's captions files have none; instances_*.json is needed)",
            }.get(key, "")
            raise DataError(f"{path}: not a COCO annotation file: no {key!r}{hint}; its keys are {sorted(data)[:8]}")
        if not isinstance(data[key], list):
            raise DataError(f"{path}: {key!r} must be a list, got {show_value(data[key])}")
    nameless = [record for record in data["images"] if isinstance(record, dict) and record.get("file_name") is None]
    num_named = 0
    for record in nameless:
        if name := file_name_in(None, record.get("coco_url")):
            record["file_name"] = name
            num_named += 1
    categories, note = data["categories"], ""
    plain = [(row.get("id"), row.get("name"), row.get("supercategory")) for row in categories if isinstance(row, dict)]
    row = root_category(plain) if len(plain) == len(categories) else None
    used = (record.get("category_id") for record in data["annotations"] if isinstance(record, dict))
    if row is not None and plain[row][0] not in used:
        categories, note = categories[:row] + categories[row + 1 :], root_category_note(*plain[row][:2])
    return CocoRecords(path, data, data["images"], data["annotations"], categories, num_named, note)


def root_category(categories: Sequence[tuple[object, object, object]]) -> int | None:
    """Return the position of the one category that all others name as their supercategory, None if there is none.

    ``categories`` are ``(id, name, supercategory)``. Without annotations it is no class: Roboflow puts such a root, the
    project's name with the supercategory "none", before the classes of every COCO export.
    """
    roots = [row for row, (_, _, above) in enumerate(categories) if above in (None, "", "none")]
    if len(categories) < 2 or len(roots) != 1 or not isinstance(name := categories[roots[0]][1], str):
        return None
    others = (above for row, (_, _, above) in enumerate(categories) if row != roots[0])
    return roots[0] if all(above == name for above in others) else None


def root_category_note(category_id: object, name: object) -> str:
    """Return the note that the root of the categories is no class."""
    return (
        f"category {show_value(category_id)} {show_value(name)} is no class: no box has it, and all others lie below it"
    )


def file_name_in(file_name: object, coco_url: object) -> object:
    """Return an image's ``file_name``; LVIS gives none, and its ``coco_url`` ends with ``train2017/000000391895.jpg``.

    Source: https://www.lvisdataset.org/dataset: images come from several folders of COCO's.
    """
    if file_name is not None or not isinstance(coco_url, str):
        return file_name
    return "/".join(coco_url.partition("?")[0].split("/")[-2:]).strip("/")


def record_problems(records: CocoRecords) -> Iterator[Problem]:
    """Yield every violation of the format, whatever else is wrong; a file with any is refused.

    The order: entries that are no objects, empty sections, then categories, images and annotations, each rule in the
    order of the file. Values are checked column by column, so a sound file of 860,000 annotations takes a second;
    records are checked one by one only where a column is not sound.
    """
    images, objects, categories = (_Section(records, key) for key in SECTIONS)
    for section in (images, objects, categories):
        for position, entry in enumerate(section.entries):
            if not isinstance(entry, dict):
                message = f"{section.key!r}[{position}] must be an object, got {show_value(entry)}"
                yield section.problem("not_an_object", message)
    for section in (images, categories):
        if not section.entries:
            yield section.problem(f"no_{section.key}", f"{section.key!r} is empty")
    yield from _id_problems(categories)
    yield from _category_name_problems(categories)
    yield from _id_problems(images)
    for row, name in enumerate(images.column("file_name")):
        if not is_file_name(name):
            what = "a string" if not isinstance(name, str) or not name else "a name that files can have"
            yield images.problem_at(row, "bad_file_name", f"file_name must be {what}, got {show_value(name)}")
    for key in ("height", "width"):
        values = images.column(key)
        sides, whole = as_integers(values)
        for row in np.flatnonzero(~whole | (sides < 1) | (sides > MAX_SIDE)).tolist():
            what = f"{key} must be a whole number of pixels > 0, got {show_value(values[row])}"
            yield images.problem_at(row, "bad_image_size", what)
    yield from _id_problems(objects)
    yield from _reference_problems(objects, objects.image_ids, images)
    yield from _reference_problems(objects, as_integers(objects.column("category_id")), categories)
    yield from _value_problems(objects)


class Integers(NamedTuple):
    """Values of which not all need be integers."""

    values: Ints  # [V], 0 where not an integer
    valid: Bools  # [V]

    def at(self, row: int) -> tuple[int, ...]:
        """Return one value, or nothing if it is not an integer."""
        return (int(self.values[row]),) if self.valid[row] else ()

    def among(self, rows: Ints) -> Ints:
        """Return the integers in some rows."""
        return self.values[rows][self.valid[rows]]


class _Section:
    """The ``R`` objects of a section, and the form of what is reported about them."""

    def __init__(self, file: CocoRecords, key: str) -> None:
        self.file, self.key, self.kind = str(file.path), key, _KINDS[key]
        self.entries: list[Any] = getattr(file, key)
        self.numbers = [n for n, entry in enumerate(self.entries, start=1) if isinstance(entry, dict)]  # [R], from 1
        self.records: list[Record] = [self.entries[number - 1] for number in self.numbers]  # [R]
        self.ids = as_integers(self.column("id"))  # [R]
        self.image_ids = self.ids if key == "images" else as_integers(self.column("image_id"))  # [R]

    def column(self, key: str) -> list[Any]:
        """Return one value of each record."""
        return [record.get(key) for record in self.records]

    def name(self, row: int) -> str:
        """Name a record in a message: by its id, or its position in the file if it has none."""
        valid, ids = self.ids.valid, self.ids.values
        return f"{self.kind} {ids[row]}" if valid[row] else f"{self.kind} number {self.numbers[row]}"

    def problem(self, kind: str, message: str, image_ids: _Ids = (), annotation_ids: _Ids = ()) -> Problem:
        # All annotations of unknown images, or of unknown categories, are one problem.
        return Problem(kind, message, image_ids, annotation_ids, self.file, max(len(annotation_ids), 1))

    def problem_at(self, row: int, kind: str, what: str) -> Problem:
        """Make a problem of an image or an annotation."""
        annotation_ids = self.ids.at(row) if self.key == "annotations" else ()
        return self.problem(kind, f"{self.name(row)}: {what}", self.image_ids.at(row), annotation_ids)


def _id_problems(section: _Section) -> Iterator[Problem]:
    kind, ids = section.kind, section.ids
    for row in np.flatnonzero(~ids.valid).tolist():
        got = show_value(section.records[row].get("id"))
        yield section.problem(f"bad_{kind}_id", f"{section.name(row)}: id must be an integer, got {got}")
    unique, first, counts = np.unique(ids.values[ids.valid], return_index=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    for i in repeated[np.argsort(first[repeated])].tolist():  # in the order of the file
        message, own = f"{kind} id {unique[i]} is given {counts[i]} times", (int(unique[i]),)
        image_ids, annotation_ids = own if kind == "image" else (), own if kind == "annotation" else ()
        yield section.problem(f"duplicate_{kind}_id", message, image_ids, annotation_ids)


def _category_name_problems(categories: _Section) -> Iterator[Problem]:
    id_of: dict[str, int] = {}
    # Of a category id given twice, which is a problem of its own, only the first record is checked.
    ids, valid = categories.ids
    _, first = np.unique(ids[valid], return_index=True)
    for row in np.flatnonzero(valid)[first].tolist():
        name = categories.records[row].get("name")
        if not isinstance(name, str) or not name:
            message = f"category {ids[row]}: name must be a string, got {show_value(name)}"
            yield categories.problem("bad_category_name", message)
        elif id_of.setdefault(name, ids[row]) != ids[row]:
            message = f"categories {id_of[name]} and {ids[row]} have the same name {name!r}"
            yield categories.problem("duplicate_category_name", message)


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


def _reference_problems(objects: _Section, wanted: Integers, known: _Section) -> Iterator[Problem]:
    key = f"{known.kind}_id"
    for row in np.flatnonzero(~wanted.valid).tolist():
        what = f"{key} must be an integer, got {show_value(objects.records[row].get(key))}"
        yield objects.problem_at(row, f"bad_{known.kind}_reference", what)
    unknown = np.flatnonzero(wanted.valid & ~np.isin(wanted.values, known.ids.values[known.ids.valid]))
    if len(unknown):
        more = f" ({len(unknown)} annotations of this kind)" if len(unknown) > 1 else ""
        first = int(unknown[0])
        message = f"{objects.name(first)}: {key} {wanted.values[first]} is not among its {known.key!r}{more}"
        images = tuple(np.unique(objects.image_ids.among(unknown)).tolist())
        yield objects.problem(f"unknown_{known.kind}", message, images, tuple(objects.ids.among(unknown).tolist()))


def _value_problems(objects: _Section) -> Iterator[Problem]:
    boxes = objects.column("bbox")
    for row in np.flatnonzero(np.isnan(as_boxes(boxes)[:, 0])).tolist():
        image_id = show_value(objects.records[row].get("image_id"))
        what = f"bbox must be 4 finite numbers [x, y, width, height], got {show_value(boxes[row])}"
        message = f"{objects.name(row)} of image {image_id}: {what}"
        yield objects.problem("bad_box", message, objects.image_ids.at(row), objects.ids.at(row))
    for row, value in enumerate(objects.column("iscrowd")):
        if (value or 0) not in (0, 1):
            yield objects.problem_at(row, "bad_iscrowd", f"iscrowd must be 0 or 1, got {show_value(value)}")
    for row, value in enumerate(objects.column("area")):
        if value is not None and not _is_finite(value):
            yield objects.problem_at(row, "bad_area", f"area must be a finite number, got {show_value(value)}")


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


def _integer_column(values: Sequence[Any]) -> Ints | None:
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


def as_boxes(values: Sequence[Any]) -> Floats:
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


def as_numbers(values: Sequence[Any]) -> Floats:
    """Convert values to float64 ``[V]``, NaN where one is not a finite number."""
    return np.array([float(value) if _is_finite(value) else np.nan for value in values], dtype=np.float64)


def show_value(value: object) -> str:
    """Format a value for a message, short and on one line."""
    try:
        text = "nothing" if value is None else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
