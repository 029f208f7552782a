"""Read COCO's instances json into an ``AnnotationTable``."""

from __future__ import annotations

import codecs
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from resdet.data.annotations import AnnotationTable, FileNames
from resdet.data.cache import cached_table
from resdet.data.coco_rules import (
    HOW_TO_FIX,
    MAX_SIDE,
    CocoRecords,
    Integers,
    Record,
    as_boxes,
    as_integers,
    as_numbers,
    file_name_in,
    load_records,
    record_problems,
    root_category,
    root_category_note,
)
from resdet.data.names import same_forms
from resdet.errors import DataError
from resdet.types import Bools, Category, Floats, Ints


def read_coco(annotations: Path, *, classes: Sequence[str] | None = None) -> AnnotationTable:
    """Read an annotation file in COCO's instances format.

    Labels are 1..K in the order of ascending ``category_id``; a missing ``iscrowd`` counts as 0 and a missing ``area``
    as width * height. Images without annotations, crowd regions and degenerate boxes stay in the table, so that
    evaluation sees what pycocotools sees; ``AnnotationTable.trainable`` leaves them out of training. Boxes are the
    file's numbers, not rounded. Names of classes are in Unicode's composed form, unless two would become one. Where
    ``file_name`` is missing, as in LVIS, it is the end of ``coco_url``, such as ``train2017/000000391895.jpg``. The
    root of the categories is no class if no box has it (``root_category``).

    Large files are read once and then taken from a cache, see ``resdet.data.cache``.

    Args:
        annotations: The json file. Its file names are relative to an image folder that it does not name.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.

    Raises:
        DataError: If the file is missing, is not json or not of this format, if an id is missing or given twice, if an
            annotation names an unknown image or category, if a size, box, area or crowd flag is not what it must be,
            or if ``classes`` names an unknown class. The message names the file and the id.

    Source: the data format at https://cocodataset.org/#format-data; order of images as in the file.
    """
    path = Path(annotations)
    if not os.path.exists(path):  # also where no file can have such a name
        load_records(path)  # raises a DataError that explains it
    try:
        table = cached_table(path, lambda data: _to_table(_read_plain(data) or _read_any(path), path))
    except OSError:
        load_records(path)
        raise
    return table if classes is None else table.select_classes(list(classes))


def usable_table(records: CocoRecords, name: str, *, difficult: bool = False) -> AnnotationTable:
    """Make a table of whatever obeys the format in records that may also break it.

    Of several images or categories with the same id the first is used. An annotation without an id gets -1, a category
    without a name is named after its id. With ``difficult``, annotations carry VOC's flag of that name.
    """
    return _to_table(_usable_columns(records, difficult=difficult), name)


def coco_document(table: AnnotationTable) -> Record:
    """Return a table as the plain values of a COCO json, whose reading gives the table again.

    Difficult objects, which COCO does not know, carry ``difficult: 1``, as VOC's records do.
    """
    of_image = (table.image_ids, *table.sizes.T)
    images = [
        {"id": image_id, "file_name": file_name, "height": height, "width": width}
        for image_id, height, width, file_name in zip(*(c.tolist() for c in of_image), table.file_names, strict=True)
    ]
    categories = [{"id": category.category_id, "name": category.name} for category in table.categories]
    image_of_box = table.image_ids[table.image_of_box()]
    of_box = (table.annotation_ids, image_of_box, table.labels, table.boxes_xywh, table.area, table.crowd)
    annotations: list[Record] = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": categories[label - 1]["id"],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, image_id, label, box, area, crowd in zip(*(column.tolist() for column in of_box), strict=True)
    ]
    for row in np.flatnonzero(table.difficult).tolist():
        annotations[row]["difficult"] = 1
    return {"images": images, "annotations": annotations, "categories": categories}


@dataclass(frozen=True)
class _Columns:
    """The file's values in its own order: ``I`` images, ``N`` annotations, ``K`` categories."""

    notes: tuple[str, ...]

    image_ids: Ints  # [I]
    file_names: list[str]  # [I]
    sizes: Ints  # [I, 2], (height, width)
    annotation_ids: Ints  # [N]
    image_id: Ints  # [N]
    category_id: Ints  # [N]
    boxes_xywh: Floats  # [N, 4]
    area: Floats  # [N], NaN where missing
    crowd: Bools  # [N]
    difficult: Bools  # [N]
    category_ids: Ints  # [K]
    category_names: list[str]  # [K]


def _to_table(columns: _Columns, name: str | Path) -> AnnotationTable:
    by_id = np.argsort(columns.category_ids)
    category_ids = columns.category_ids[by_id]  # [K], ascending
    image_order = np.argsort(columns.image_ids)
    image_index = image_order[np.searchsorted(columns.image_ids, columns.image_id, sorter=image_order)]  # [N]
    # Stable: within an image, boxes keep the order of the file, which decides ties in evaluation.
    order = np.argsort(image_index, kind="stable")
    counts = np.bincount(image_index, minlength=len(columns.image_ids))  # [I]
    boxes_xywh = columns.boxes_xywh[order]
    area = columns.area[order]
    return AnnotationTable(
        name=str(name),
        categories=tuple(
            Category(label, int(columns.category_ids[position]), columns.category_names[position])
            for label, position in enumerate(by_id, start=1)
        ),
        image_ids=columns.image_ids,
        file_names=FileNames(columns.file_names),
        sizes=columns.sizes.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=boxes_xywh,
        labels=np.searchsorted(category_ids, columns.category_id[order]).astype(np.int64) + 1,
        area=np.where(np.isnan(area), boxes_xywh[:, 2] * boxes_xywh[:, 3], area),
        crowd=columns.crowd[order],
        difficult=columns.difficult[order],
        annotation_ids=columns.annotation_ids[order],
        notes=columns.notes,
    )


def _read_any(path: Path) -> _Columns:
    """Read every file that obeys the rules of ``record_problems``; raise its first problem if it does not."""
    records = load_records(path)
    problems = list(record_problems(records))
    if problems:
        more = f" (and {len(problems) - 1} more: `resdet check` lists them)" if len(problems) > 1 else ""
        # A copy without images or classes would be refused too.
        fix = "" if problems[0].kind in ("no_images", "no_categories") else f"; {HOW_TO_FIX}"
        raise DataError(f"{problems[0]}{more}{fix}")
    return _usable_columns(records)


def _usable_columns(records: CocoRecords, *, difficult: bool = False) -> _Columns:
    categories, images, objects = (
        [record for record in section if isinstance(record, dict)]
        for section in (records.categories, records.images, records.annotations)
    )

    def integers(section: list[Record], key: str) -> Integers:
        return as_integers([record.get(key) for record in section])

    def flags(key: str) -> Bools:
        return np.array([record.get(key) == 1 for record in objects], dtype=np.bool_)

    category_ids, usable = integers(categories, "id")
    category_rows = _first_of_each(category_ids, usable)
    category_ids = category_ids[category_rows]  # [K]
    names = [categories[row].get("name") for row in category_rows]

    image_ids, usable = integers(images, "id")
    file_names = [record.get("file_name") for record in images]
    usable &= np.array([isinstance(name, str) and name != "" for name in file_names], dtype=np.bool_)
    sides = []
    for key in ("height", "width"):
        side, whole = integers(images, key)
        usable &= whole & (side >= 1) & (side <= MAX_SIDE)
        sides.append(side)
    image_rows = _first_of_each(image_ids, usable)
    image_ids = image_ids[image_rows]  # [I]

    image_id, has_image = integers(objects, "image_id")  # [N] each, like all that follows
    category_id, has_category = integers(objects, "category_id")
    boxes_xywh = as_boxes([record.get("bbox") for record in objects])  # [N, 4]
    keep = has_image & np.isin(image_id, image_ids) & has_category & np.isin(category_id, category_ids)
    keep &= ~np.isnan(boxes_xywh[:, 0])
    annotation_ids, has_id = integers(objects, "id")
    return _Columns(
        notes=(records.root_note,) if records.root_note else (),
        image_ids=image_ids,
        file_names=[str(file_names[row]) for row in image_rows],
        sizes=np.stack(sides, axis=1)[image_rows],
        annotation_ids=np.where(has_id, annotation_ids, -1)[keep],
        image_id=image_id[keep],
        category_id=category_id[keep],
        boxes_xywh=boxes_xywh[keep],
        area=as_numbers([record.get("area") for record in objects])[keep],
        crowd=flags("iscrowd")[keep],
        difficult=(flags("difficult") if difficult else np.zeros(len(objects), dtype=np.bool_))[keep],
        category_ids=category_ids,
        category_names=same_forms(
            name if isinstance(name, str) and name else f"category {category_id}"
            for name, category_id in zip(names, category_ids.tolist(), strict=True)
        ),
    )


def _first_of_each(ids: Ints, usable: Bools) -> Ints:
    """Return the first usable row of each id, in the order of the file."""
    _, first = np.unique(ids[usable], return_index=True)
    return np.flatnonzero(usable)[np.sort(first)]


class _Image(msgspec.Struct, gc=False):
    id: int
    height: int
    width: int
    file_name: str | None = None
    coco_url: str | None = None


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Literal[0, 1] | bool | None = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str
    supercategory: str | None = None


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def _read_plain(data: bytes) -> _Columns | None:
    """Read a file whose values have the expected types, many times faster than ``_read_any``; else return None.

    Typed decoding makes no objects of what the table does not keep: polygons are nine tenths of the file. It accepts
    less than json does (no ``640.0`` for an integer, no NaN), and what it accepts means the same, except that strings
    it skips are not decoded, hence the check for UTF-8.
    """
    pieces = (data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20))
    try:
        for _ in () if data.isascii() else codecs.iterdecode(pieces, "utf-8"):
            pass
        columns = _to_columns(msgspec.json.decode(data, type=_File))
    # OverflowError: numbers beyond int64.
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError):
        return None
    return columns if _is_sound(columns) else None


def _to_columns(file: _File) -> _Columns:
    images, objects, categories = file.images, file.annotations, file.categories
    notes: tuple[str, ...] = ()
    row = root_category([(one.id, one.name, one.supercategory) for one in categories])
    if row is not None and all(one.category_id != categories[row].id for one in objects):
        notes = (root_category_note(categories[row].id, categories[row].name),)
        categories = categories[:row] + categories[row + 1 :]

    def integers(records: Sequence[object], key: str) -> Ints:
        return np.fromiter(map(attrgetter(key), records), dtype=np.int64, count=len(records))

    numbers = itertools.chain.from_iterable(record.bbox for record in objects)
    return _Columns(
        notes=notes,
        image_ids=integers(images, "id"),
        file_names=[str(file_name_in(image.file_name, image.coco_url) or "") for image in images],
        sizes=np.stack([integers(images, "height"), integers(images, "width")], axis=1),
        annotation_ids=integers(objects, "id"),
        image_id=integers(objects, "image_id"),
        category_id=integers(objects, "category_id"),
        boxes_xywh=np.fromiter(numbers, dtype=np.float64, count=4 * len(objects)).reshape(-1, 4),
        area=np.array([record.area for record in objects], dtype=np.float64),
        crowd=np.array([bool(record.iscrowd) for record in objects], dtype=np.bool_),
        difficult=np.zeros(len(objects), dtype=np.bool_),
        category_ids=integers(categories, "id"),
        category_names=same_forms(category.name for category in categories),
    )


def _is_sound(columns: _Columns) -> bool:
    """Check the rules of ``record_problems`` that types alone do not ensure."""
    names = columns.category_names
    all_ids = (columns.image_ids, columns.category_ids, columns.annotation_ids)
    return bool(
        len(columns.image_ids)
        and len(columns.category_ids)
        and all(len(np.unique(ids)) == len(ids) for ids in all_ids)
        and np.isin(columns.image_id, columns.image_ids).all()
        and np.isin(columns.category_id, columns.category_ids).all()
        and ((columns.sizes >= 1) & (columns.sizes <= MAX_SIDE)).all()
        and all(name and "\0" not in name for name in columns.file_names)
        and all(names)
        and len(set(names)) == len(names)
    )
