"""Write a copy of a dataset's annotations without the errors that a check found, and list every change."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from resdet.check.kinds import KINDS, OVERHANG
from resdet.check.report import Report
from resdet.check.splits import DataSplit
from resdet.data.annotations import MIN_TRAINABLE_SIDE
from resdet.data.coco_rules import (
    MAX_SIDE,
    CocoRecords,
    Record,
    as_boxes,
    as_integers,
    as_numbers,
    is_file_name,
    load_records,
    record_problems,
    show_value,
)
from resdet.data.image_files import ImageFolder
from resdet.data.images import read_image, read_orientation, read_size, size_tells, turned_boxes
from resdet.data.names import on_disk
from resdet.errors import DataError, UserError
from resdet.files import check_output, write_text

_REFUSED_FILES = ("missing_file", "unreadable_file", "size_mismatch", "bad_file_name")
_NOT_REPAIRABLE = ("unreadable_annotations", "boxes_are_corners", "boxes_are_fractions")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII)
_TRUTH = {"true": 1, "false": 0}


def write_fixed(split: DataSplit, report: Report, path: Path) -> list[str]:
    """Write a repaired copy of a split as a COCO json; return one line for every change.

    ``path`` must not be one of the split's own files, which are not changed. The copy's file names are relative to the
    split's image folder (VOC: its root).
    """
    check_output(path, split.input_files())
    document, changes = repaired(split, report)
    write_text(path, json.dumps(document))
    left = next(record_problems(load_records(path)), None)
    assert left is None, f"the copy is damaged too: {left}"
    return changes


def repaired(split: DataSplit, report: Report) -> tuple[Record, list[str]]:
    """Return a repaired COCO document and one line for every change; refuse damage that touches all records alike.

    What is right is kept: the order of records, keys that COCO does not define, segmentations, info, licenses.

    * Entries that are no objects are dropped; numbers written as strings become numbers, boxes included.
    * Categories: of several with the same id the first is kept; those with the same name are merged; a missing name is
      made up.
    * Images without an id are dropped, since no annotation can name them. Of several with the same id and file name the
      first is kept; if the names differ, their annotations are ambiguous, and all are dropped. Several ids of one file
      are merged. A missing size is read from the file. Images whose file is missing, unreadable or of another size are
      dropped with their annotations; but a missing file that has the image's size under a similar name is taken.
    * Annotations of unknown images or categories are dropped, and so are boxes that are not four numbers, have no
      extent or lie outside their image, and exact repetitions. Boxes that exceed their image by more than ``OVERHANG``
      are clipped; an area that was width times height follows. A missing or repeated id is replaced, a crowd flag that
      is neither 0 nor 1 becomes 0, an area that is not a number is removed.
    * Areas that contradict the boxes everywhere are removed.
    * VOC's difficult objects get ``iscrowd`` 1, COCO's only way to leave them out of training and scores.
    """
    if split.root is None:
        raise UserError(f"{split.source}: its pictures and boxes are generated; there is nothing to fix")
    refused: dict[int, str] = {}
    for finding in report.findings:
        if finding.split != split.name:
            continue
        if finding.kind in _NOT_REPAIRABLE:
            raise UserError(f"{split.source}: {finding.problems[0].message}: correct what writes the file")
        if finding.kind in _REFUSED_FILES:
            refused.update((image, problem.message) for problem in finding.problems for image in problem.image_ids)
    damaged = [
        problem for problem in split.problems if split.has_file_per_image and KINDS[problem.kind].severity == "error"
    ]
    changes = [f"{problem.file}: left out: {problem.message}" for problem in damaged]
    repair = _Repair(split.records, split.root, refused, changes)
    categories = repair.categories()
    images = repair.images()
    if not images or not categories:
        raise UserError(f"{split.source}: no {'category' if images else 'image'} would be left")
    annotations = repair.annotations()
    difficult = [record for record in annotations if split.one_based and record.get("difficult")]
    for record in difficult:
        record["iscrowd"] = 1
    if difficult:
        changes.append(f"{len(difficult)} difficult objects: iscrowd set to 1")
    if any((finding.split, finding.kind) == (split.name, "areas_contradict_boxes") for finding in report.findings):
        num_areas = sum(record.pop("area", None) is not None for record in annotations)
        changes.append(f"areas of {num_areas} annotations removed: width * height counts")
    if split.upright:
        changes += _as_stored(images, annotations, split.root)
    sections = {"images": images, "annotations": annotations, "categories": categories}
    return {**split.records.document, **sections}, changes


def _as_stored(images: list[Record], annotations: list[Record], root: Path) -> list[str]:
    """Turn the boxes of images that readers of COCO take as stored, though their EXIF orientation says otherwise."""
    boxes_of = defaultdict(list)
    for record in annotations:
        boxes_of[record["image_id"]].append(record)
    changes = []
    for image in images:
        size, orientation = (image["height"], image["width"]), read_orientation(on_disk(root / image["file_name"]))
        if orientation == 1 or size_tells(orientation, size):
            continue
        for record in boxes_of[image["id"]]:
            record["bbox"] = turned_boxes(as_boxes([record["bbox"]]), size, orientation, back=True)[0].tolist()
        changes.append(f"image {image['id']} ({image['file_name']}): boxes turned as its pixels are stored")
    return changes


class _Repair:
    """Repairs the sections of a file one after the other; later ones follow the changes of earlier ones."""

    def __init__(self, records: CocoRecords, root: Path, refused: dict[int, str], changes: list[str]) -> None:
        self._records = records
        self._root = root
        self._folder = ImageFolder(root)
        self._refused = refused
        self._changes = changes
        self._category_of: dict[int, int] = {}
        self._image_of: dict[int, int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}

    def categories(self) -> list[Record]:
        kept: dict[int, Record] = {}
        id_of_name: dict[str, int] = {}
        for record in self._objects("categories", ("id",)):
            category_id, name = _integer(record.get("id")), record.get("name")
            if category_id is None:
                self._changes.append(
                    f"category {show_value(name)}: dropped: its id {show_value(record.get('id'))} is not an integer"
                )
                continue
            if category_id in self._category_of:
                self._changes.append(
                    f"category {category_id} ({show_value(name)}): dropped: an earlier one has the same id"
                )
                continue
            if not isinstance(name, str) or not name:
                self._changes.append(f"category {category_id}: name {show_value(name)} -> 'category {category_id}'")
                record["name"] = name = f"category {category_id}"
            first = self._category_of[category_id] = id_of_name.setdefault(name, category_id)
            if first == category_id:
                kept[category_id] = record
            else:
                self._changes.append(f"category {category_id} ({show_value(name)}): merged with category {first}")
        return list(kept.values())

    def images(self) -> list[Record]:
        records = self._objects("images", ("id", "height", "width"))
        names_of_id: dict[int | None, set[str]] = defaultdict(set)
        for record in records:
            names_of_id[_integer(record.get("id"))].add(str(record.get("file_name")))
        kept: dict[int, Record] = {}
        id_of_file: dict[str, int] = {}
        for record in records:
            image_id, name, stated = _integer(record.get("id")), record.get("file_name"), _stated_size(record)
            subject = f"image {image_id} ({name})"
            if image_id is None:
                self._changes.append(
                    f"image {show_value(name)}: dropped: its id {show_value(record.get('id'))} is not an integer"
                )
            elif len(names_of_id[image_id]) > 1:
                self._drop_image(subject, "other files have the same id")
            elif image_id in self._image_of:
                self._changes.append(f"{subject}: dropped: an earlier entry has the same id")
            elif image_id in self._refused and not self._rename(record, subject, stated):
                why = self._refused[image_id].removeprefix(f"{subject}: ").removeprefix(f"image {image_id}: ")
                self._drop_image(subject, why)
            elif (size := self._size(record, subject, stated)) is not None:
                first = id_of_file.setdefault(os.path.normpath(str(record["file_name"])), image_id)
                if first == image_id:
                    self._image_of[image_id] = image_id
                    self._sizes[image_id] = size
                    kept[image_id] = record
                elif self._sizes[first] == size:
                    self._image_of[image_id] = first
                    self._changes.append(f"{subject}: merged with image {first}, the same file")
                else:
                    self._drop_image(subject, f"image {first} is the same file, of another size")
        return list(kept.values())

    def _rename(self, record: Record, subject: str, size: tuple[int, int] | None) -> bool:
        """Name the file that was probably meant by a missing one, unless it has another size than the stated one."""
        name = record.get("file_name")
        if not is_file_name(name):
            return False
        try:
            meant = None if self._folder.find(name) else self._folder.meant(name)
            if meant is None or meant.path != self._root / meant.name or size not in (None, read_size(meant.path)):
                return False
        except DataError:
            return False
        record["file_name"] = meant.name
        self._changes.append(f"{subject}: file_name -> {meant.name} ({meant.difference})")
        return True

    def _drop_image(self, subject: str, why: str) -> None:
        self._changes.append(f"{subject}: dropped with its annotations: {why}")

    def annotations(self) -> list[Record]:
        records = self._objects("annotations", ("id", "image_id", "category_id", "area", "iscrowd", "bbox"))
        taken: set[int] = set()
        next_id = max((_integer(record.get("id")) or 0 for record in records), default=0) + 1
        boxes_seen: set[tuple[Any, ...]] = set()
        kept = []
        for record in records:
            own_id = _integer(record.get("id"))
            subject = f"annotation {show_value(own_id if own_id is not None else record.get('id'))}"
            why = self._unusable(record)
            if why is None:
                self._clip(record, subject)
                self._repair_values(record, subject)
                key = (record["image_id"], record["category_id"], *record["bbox"])
                if key in boxes_seen and not record.get("iscrowd"):
                    why = f"the same box and class as another one of image {record['image_id']}"
                elif not record.get("iscrowd"):
                    boxes_seen.add(key)
            if why is not None:
                self._changes.append(f"{subject}: dropped: {why}")
                continue
            if own_id is None or own_id in taken:
                self._changes.append(f"{subject} of image {record['image_id']}: id -> {next_id}")
                record["id"] = own_id = next_id
                next_id += 1
            taken.add(own_id)
            kept.append(record)
        return kept

    def _objects(self, key: str, numbers: tuple[str, ...]) -> list[Record]:
        """Return copies of a section's objects, with numbers that were strings made numbers."""
        objects = []
        for position, entry in enumerate(getattr(self._records, key)):
            if not isinstance(entry, dict):
                self._changes.append(f"{key}[{position}]: dropped: not an object")
                continue
            record = dict(entry)
            for name in numbers:
                value = record.get(name)
                changed = _box_of_texts(value) if name == "bbox" else _number_of_text(value)
                if changed is not value:
                    record[name] = changed
                    self._changes.append(f"{key}[{position}]: {name} {show_value(value)} -> {changed}")
            objects.append(record)
        return objects

    def _size(self, record: Record, subject: str, stated: tuple[int, int] | None) -> tuple[int, int] | None:
        """Return an image's size, from its file if none is stated, or None to drop the image."""
        # Images without a size are not in the report's table, so their names are checked here.
        if stated is None:
            self._rename(record, subject, stated)
        name = record.get("file_name")
        if not is_file_name(name) or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            self._drop_image(subject, f"file_name {show_value(name)} is not a file in the folder")
            return None
        if stated is not None:
            return stated
        try:
            height, width = read_image(self._root / (self._folder.find(name) or name)).shape[:2]
        except DataError as error:
            self._drop_image(subject, f"no size, and {error}")
            return None
        self._changes.append(f"{subject}: height and width -> {height} and {width}, from the file")
        record.update(height=height, width=width)
        return height, width

    def _unusable(self, record: Record) -> str | None:
        """Return why an annotation must be dropped, if so; make it follow an image or category that was merged."""
        for what, known in (("image", self._image_of), ("category", self._category_of)):
            key = f"{what}_id"
            value = _integer(record.get(key))
            if value is None or value not in known:
                return f"its {what} {show_value(record.get(key))} does not exist"
            if known[value] != value:  # 3.0 stays as it is
                record[key] = known[value]
        x, y, w, h = as_boxes([record.get("bbox")])[0].tolist()
        if x != x:  # NaN
            return f"its bbox {show_value(record.get('bbox'))} is not four finite numbers"
        height, width = self._sizes[record["image_id"]]
        sides = (min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0))
        if w < MIN_TRAINABLE_SIDE or h < MIN_TRAINABLE_SIDE:
            return f"box {record['bbox']} of image {record['image_id']} has no extent"
        if min(sides) < MIN_TRAINABLE_SIDE:
            return f"box {record['bbox']} lies outside image {record['image_id']} of {width}x{height} pixels"
        return None

    def _clip(self, record: Record, subject: str) -> None:
        x, y, w, h = record["bbox"]
        height, width = self._sizes[record["image_id"]]
        if max(-x, -y, x + w - width, y + h - height) <= OVERHANG:
            return
        left, top = max(x, 0), max(y, 0)
        clipped = [left, top, min(x + w, width) - left, min(y + h, height) - top]
        self._changes.append(f"{subject} of image {record['image_id']}: clipped {record['bbox']} -> {clipped}")
        record["bbox"] = clipped
        area = record.get("area")
        if isinstance(area, (int, float)) and np.isclose(area, w * h):
            record["area"] = clipped[2] * clipped[3]

    def _repair_values(self, record: Record, subject: str) -> None:
        crowd = record.get("iscrowd")
        if (crowd or 0) not in (0, 1):
            self._changes.append(f"{subject}: iscrowd {show_value(crowd)} -> 0")
            record["iscrowd"] = 0
        area = record.get("area")
        if area is not None and np.isnan(as_numbers([area])[0]):
            self._changes.append(f"{subject}: area {show_value(area)} removed")
            del record["area"]


def _integer(value: object) -> int | None:
    return next(iter(as_integers([value]).at(0)), None)


def _stated_size(record: Record) -> tuple[int, int] | None:
    height, width = (_integer(record.get(key)) for key in ("height", "width"))
    return (height, width) if height and width and 0 < min(height, width) <= max(height, width) <= MAX_SIDE else None


def _number_of_text(value: object) -> object:
    """Return the number that a string holds (``" 3 "``, ``"12.5"``, ``"true"``), or the value as it is."""
    if not isinstance(value, str) or len(value) > 40:
        return value
    text = value.strip().lower()
    if text in _TRUTH:
        return _TRUTH[text]
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        return value
    return int(text) if "." not in text and "e" not in text else float(text)


def _box_of_texts(value: object) -> object:
    """Return a box whose numbers are strings, or which is one string, with numbers; any other value as it is."""
    parts = re.split(r"[\s,;]+", value.strip(" \t\n[]()")) if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 4 or not any(isinstance(part, str) for part in parts):
        return value
    box = [_number_of_text(part) for part in parts]
    return value if np.isnan(as_boxes([box])).any() else box
