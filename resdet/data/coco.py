"""COCO's instances json -> ``AnnotationTable``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError
from resdet.types import Category

HOW_TO_GET_COCO = (
    "COCO 2017 is three archives from https://cocodataset.org/#download: train2017.zip, val2017.zip and "
    "annotations_trainval2017.zip, unpacked side by side into one folder, which then holds train2017/, val2017/ and "
    "annotations/instances_{train,val}2017.json"
)

_Record = dict[str, Any]


def read_coco(annotations: Path, *, classes: Sequence[str] | None = None) -> AnnotationTable:
    """Read an annotation file in COCO's instances format.

    Labels are 1..K in the order of ascending ``category_id``; a missing ``iscrowd`` counts as 0 and a missing ``area``
    as width * height. Images without annotations, crowd regions and degenerate boxes stay in the table, so that
    evaluation sees what pycocotools sees; ``AnnotationTable.trainable`` leaves them out of training. Boxes are the
    file's numbers, unrounded.

    Args:
        annotations: The json file; images are found relative to a folder that the file does not name.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.

    Raises:
        DataError: If the file is missing, is not json or not of this format, if an id is missing or given twice, if an
            annotation names an unknown image or category, if a size, box, area or crowd flag is not what it must be,
            or if ``classes`` names an unknown class. The message names the file and the id.

    Source: the data format at https://cocodataset.org/#format-data; order of images as in the file.
    """
    path = Path(annotations)
    images, objects, categories = _load_sections(path)

    table_categories, category_ids = _read_categories(categories, path)

    image_ids = _ids(images, "image", path)
    file_names = _file_names(images, image_ids, path)
    sizes = np.stack([_sides(images, image_ids, key, path) for key in ("height", "width")], axis=1)

    annotation_ids = _ids(objects, "annotation", path)
    image_index = _lookup(objects, annotation_ids, "image_id", image_ids, path)
    category_index = _lookup(objects, annotation_ids, "category_id", category_ids, path)
    boxes_xywh = _boxes(objects, annotation_ids, path)
    crowd = _crowd(objects, annotation_ids, path)
    area = _area(objects, annotation_ids, boxes_xywh, path)

    # Stable: within an image, boxes keep the order of the file, which decides ties in evaluation.
    order = np.argsort(image_index, kind="stable")
    counts = np.bincount(image_index, minlength=len(image_ids))
    table = AnnotationTable(
        name=str(path),
        categories=table_categories,
        image_ids=image_ids,
        file_names=file_names,
        sizes=sizes.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=boxes_xywh[order],
        labels=category_index[order] + 1,
        area=area[order],
        crowd=crowd[order],
        difficult=np.zeros(len(objects), dtype=np.bool_),
        annotation_ids=annotation_ids[order],
    )
    return table if classes is None else table.select_classes(list(classes))


def _load_sections(path: Path) -> tuple[list[_Record], list[_Record], list[_Record]]:
    if not path.exists():
        raise DataError(f"{path}: no such annotation file. {HOW_TO_GET_COCO}")
    if path.is_dir():
        raise DataError(f"{path}: an annotation file (.json) is needed, got a folder")
    try:
        with path.open("rb") as file:
            data = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a json file, or cut short ({path.stat().st_size} bytes): {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a COCO annotation file: nested too deeply") from error

    if isinstance(data, list):
        if data and isinstance(data[0], dict) and "score" in data[0]:
            what = "these are detection results; the ground truth they were scored against is needed"
        else:
            what = "got a json list"
        raise DataError(f"{path}: not a COCO annotation file: {what}")
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a COCO annotation file: got a json {type(data).__name__}")
    sections = []
    for key in ("images", "annotations", "categories"):
        if key not in data:
            hint = {
                "annotations": " (COCO's image_info files have none)",
                "categories": " (COCO's captions files have none; instances_*.json is needed)",
            }.get(key, "")
            raise DataError(f"{path}: not a COCO annotation file: no {key!r}{hint}; its keys are {sorted(data)[:8]}")
        section = data[key]
        if not isinstance(section, list):
            raise DataError(f"{path}: {key!r} must be a list, got {_show(section)}")
        for position, record in enumerate(section):
            if not isinstance(record, dict):
                raise DataError(f"{path}: {key!r}[{position}] must be an object, got {_show(record)}")
        sections.append(section)
    images, objects, categories = sections
    for key, section in (("images", images), ("categories", categories)):
        if not section:
            raise DataError(f"{path}: {key!r} is empty")
    return images, objects, categories


def _read_categories(records: list[_Record], path: Path) -> tuple[tuple[Category, ...], npt.NDArray[np.int64]]:
    ids = _ids(records, "category", path)
    order = np.argsort(ids)
    categories = []
    id_of_name: dict[str, int] = {}
    for label, position in enumerate(order, start=1):
        category_id, name = int(ids[position]), records[position].get("name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: category {category_id}: name must be a text, got {_show(name)}")
        if name in id_of_name:
            raise DataError(f"{path}: categories {id_of_name[name]} and {category_id} have the same name {name!r}")
        id_of_name[name] = category_id
        categories.append(Category(label, category_id, name))
    return tuple(categories), ids[order]


def _show(value: object) -> str:
    """Give a value for a message, short and on one line."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_integers(values: list[Any]) -> npt.NDArray[np.int64] | None:
    """Give int64 ``[len(values)]``, or None if some value is not a whole number."""
    if not values:
        return np.zeros(0, dtype=np.int64)
    try:
        array = np.array(values)
    except ValueError:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        return None
    # JSON writers of some languages have no integers: 640.0 is a width.
    if array.dtype.kind != "i" and not (np.abs(array) < 2**53).all():
        return None
    whole = array.astype(np.int64)
    return whole if (whole == array).all() else None


def _ids(records: list[_Record], kind: str, path: Path) -> npt.NDArray[np.int64]:
    values = [record.get("id") for record in records]
    ids = _as_integers(values)
    if ids is None:
        position = next(i for i, value in enumerate(values) if _as_integers([value]) is None)
        raise DataError(f"{path}: {kind} number {position + 1}: id must be an integer, got {_show(values[position])}")
    unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if len(unique) < len(ids):
        repeated = counts > 1
        duplicate = unique[repeated][np.argmin(first[repeated])]
        raise DataError(f"{path}: {kind} id {duplicate} is given {counts[unique == duplicate][0]} times")
    return ids


def _file_names(records: list[_Record], ids: npt.NDArray[np.int64], path: Path) -> npt.NDArray[np.str_]:
    names = [record.get("file_name") for record in records]
    for image_id, name in zip(ids, names, strict=True):
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {image_id}: file_name must be a text, got {_show(name)}")
    return np.array(names, dtype=np.str_)


def _sides(records: list[_Record], ids: npt.NDArray[np.int64], key: str, path: Path) -> npt.NDArray[np.int64]:
    values = [record.get(key) for record in records]
    sides = _as_integers(values)
    if sides is None or (sides < 1).any() or (sides >= 2**31).any():
        for image_id, value in zip(ids, values, strict=True):
            side = _as_integers([value])
            if side is None or not 1 <= side[0] < 2**31:
                message = f"{key} must be a whole number of pixels > 0, got {_show(value)}"
                raise DataError(f"{path}: image {image_id}: {message}")
    assert sides is not None
    return sides


def _lookup(
    records: list[_Record], ids: npt.NDArray[np.int64], key: str, known: npt.NDArray[np.int64], path: Path
) -> npt.NDArray[np.int64]:
    """Give the position in ``known`` of each annotation's ``key``."""
    values = [record.get(key) for record in records]
    wanted = _as_integers(values)
    if wanted is None:
        position = next(i for i, value in enumerate(values) if _as_integers([value]) is None)
        message = f"{key} must be an integer, got {_show(values[position])}"
        raise DataError(f"{path}: annotation {ids[position]}: {message}")
    order = np.argsort(known)
    found = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    unknown = np.flatnonzero(known[found] != wanted)
    if len(unknown):
        section = {"image_id": "images", "category_id": "categories"}[key]
        more = f" ({len(unknown)} annotations of this kind)" if len(unknown) > 1 else ""
        first = unknown[0]
        raise DataError(f"{path}: annotation {ids[first]}: {key} {wanted[first]} is not among its {section!r}{more}")
    return found.astype(np.int64)


def _boxes(records: list[_Record], ids: npt.NDArray[np.int64], path: Path) -> npt.NDArray[np.float64]:
    if not records:
        return np.zeros((0, 4))
    values = [record.get("bbox") for record in records]
    # Checked before conversion: NumPy would turn the texts ["1", "2", "3", "4"] into numbers.
    try:
        array = np.array(values)
    except ValueError:
        array = np.zeros(0)
    if array.shape == (len(values), 4) and array.dtype.kind in "iuf" and np.isfinite(array).all():
        return array.astype(np.float64)
    for annotation_id, image_id, box in zip(ids, (r.get("image_id") for r in records), values, strict=True):
        numbers = box if isinstance(box, list) else []
        if len(numbers) != 4 or not all(isinstance(v, (int, float)) and abs(v) < math.inf for v in numbers):
            message = f"bbox must be 4 finite numbers [x, y, width, height], got {_show(box)}"
            raise DataError(f"{path}: annotation {annotation_id} of image {image_id}: {message}")
    return np.array(values, dtype=np.float64)


def _crowd(records: list[_Record], ids: npt.NDArray[np.int64], path: Path) -> npt.NDArray[np.bool_]:
    values = [record.get("iscrowd") or 0 for record in records]
    for annotation_id, value in zip(ids, values, strict=True):
        if value not in (0, 1):
            raise DataError(f"{path}: annotation {annotation_id}: iscrowd must be 0 or 1, got {_show(value)}")
    return np.array(values, dtype=np.bool_)


def _area(
    records: list[_Record], ids: npt.NDArray[np.int64], boxes_xywh: npt.NDArray[np.float64], path: Path
) -> npt.NDArray[np.float64]:
    area = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    for row, record in enumerate(records):
        value = record.get("area")
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise DataError(f"{path}: annotation {ids[row]}: area must be a finite number, got {_show(value)}")
        area[row] = value
    return area
