"""What is wrong with a dataset, all of it, before training finds out."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resdet.check.anchor_coverage import IOU_REACHED, AnchorLayout, Coverage, anchor_coverage
from resdet.check.image_facts import ImageFacts, all_image_facts, near_duplicates
from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.data.coco_rules import (
    MAX_SIDE,
    CocoRecords,
    Problem,
    Severity,
    as_boxes,
    as_integers,
    is_file_name,
    load_records,
    record_problems,
)
from resdet.data.images import IMAGE_SUFFIXES, FolderImages
from resdet.data.voc import voc_records
from resdet.errors import DataError
from resdet.types import Category

OVERHANG = 0.5
"""Pixels by which a box may leave its image without a word: rounding."""

TINY_SIDE = 2.0
"""Pixels of the stored image; thinner boxes are called tiny."""

EXTREME_ASPECT = 20.0
"""Longer over shorter side from which a box is called extreme."""

IMBALANCE = 100.0
"""Boxes of the most frequent class over those of the rarest from which classes are called imbalanced."""

UNREACHED = 0.25
"""Share of training's boxes that no anchor reaches from which anchors are called unfit. The default anchors miss about
17 % of COCO's boxes."""

_MIN_EVIDENCE = 5

MEANINGS = {
    "unreadable_annotations": "the annotation file cannot be used at all",
    "not_an_object": "refused when read: every entry must be an object with named values",
    "no_images": "refused when read",
    "no_categories": "refused when read",
    "bad_image_id": "refused when read",
    "bad_annotation_id": "refused when read",
    "bad_category_id": "refused when read",
    "duplicate_image_id": "refused when read: nobody can tell whose the boxes are",
    "duplicate_annotation_id": "refused when read: evaluation counts matches by id",
    "duplicate_category_id": "refused when read",
    "bad_category_name": "refused when read",
    "duplicate_category_name": "refused when read: two classes that nothing tells apart",
    "bad_file_name": "refused when read",
    "bad_image_size": "refused when read",
    "bad_image_reference": "refused when read",
    "unknown_image": "refused when read: annotations without an image",
    "bad_category_reference": "refused when read",
    "unknown_category": "refused when read: annotations of a class that is not there",
    "bad_box": "refused when read: NaN, infinite or missing numbers",
    "bad_iscrowd": "refused when read",
    "bad_area": "refused when read",
    "bad_annotation_file": "refused when read",
    "listed_twice": "refused when read",
    "unknown_class": "refused when read: the configuration names a class that is not there",
    "different_classes": "train and val must have the same classes, or evaluation is refused",
    "nothing_to_train_on": "training is refused",
    "missing_file": "training is refused",
    "unreadable_file": "refused when the image is read, or skipped where the configuration says so",
    "size_mismatch": "refused when the image is read: its boxes are those of another size",
    "negative_box": "left out of training, so its object is taken for background",
    "zero_box": "left out of training, so its object is taken for background",
    "box_outside_image": "left out of training, so its object is taken for background",
    "duplicate_file_name": "each entry lacks the boxes of the other, whose objects are taken for background",
    "boxes_are_corners": "COCO's boxes are [x, y, width, height]; these look like [x1, y1, x2, y2]",
    "boxes_are_fractions": "boxes must be in pixels; these look like fractions of the image",
    "box_partly_outside": f"reaches out by more than {OVERHANG:g} px; clipped to the image in training",
    "one_based_corners": "boxes pile up at 1 and none begins at 0: converted from VOC without subtracting 1?",
    "zero_based_corners": "VOC counts pixels from 1; corners at 0 hint that all of them are one pixel off",
    "short_boxes": "boxes pile up one pixel before the far border and none reaches it: xmax - xmin without the + 1?",
    "repeated_box": "the same box and class again",
    "train_val_overlap": "the same picture in train and val: what is measured on val is no proof",
    "duplicate_image": "the same pixels under several names",
    "near_duplicate_image": "the same picture at another scale or compression",
    "exif_rotation": "boxes are taken to be those of the stored pixels, unturned; size cannot tell",
    "unused_category": "a class without a box is never learned",
    "unfit_anchors": "learned worse; model.anchor_sizes and model.aspect_ratios, or model.min_size, may fit better",
    "tiny_box": f"a side below {TINY_SIDE:g} px",
    "extreme_aspect": f"one side {EXTREME_ASPECT:g} times the other or more",
    "class_imbalance": "rare classes are learned late, or not at all",
    "image_without_boxes": "trained on as background; right, if there is nothing on them",
    "unlisted_file": "in the image folder, and in no annotation",
    "not_rgb": "converted to 8-bit RGB when read",
    "exif_turned": "turned upright when read, as the size in the annotations says",
}
"""What each kind of problem means; a kind has one severity."""

_ORDER: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class DataSplit:
    """A dataset to be checked, as it stands in its files.

    Attributes:
        name: ``"train"`` or ``"val"``.
        source: Where it came from, for messages.
        records: Its images, annotations and categories, good and bad alike.
        root: Folder of its images; None for pictures that are drawn.
        classes: Names of the classes that are used; all if None.
        one_based: Whether its files count pixels from 1, as VOC does.
        problems: What was wrong with the files themselves.
    """

    name: str
    source: str
    records: CocoRecords
    root: Path | None
    classes: tuple[str, ...] | None = None
    one_based: bool = False
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Finding:
    """All problems of one kind in one split.

    Attributes:
        split: ``"train"``, ``"val"``, or ``"train and val"`` for what concerns both.
        kind: A key of ``MEANINGS``.
        problems: One or more, in the order of the data.
    """

    split: str
    kind: str
    problems: tuple[Problem, ...]

    @property
    def severity(self) -> Severity:
        """The severity of the kind."""
        return self.problems[0].severity

    @property
    def count(self) -> int:
        """How many records, files or pairs are concerned."""
        return sum(problem.count for problem in self.problems)


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds.

    Attributes:
        name: ``"train"`` or ``"val"``.
        source: Where it came from.
        num_images: Images that can be used, as far as annotations tell.
        boxes_per_class: Boxes of each class that training uses, difficult ones included, in label order.
        coverage: How many boxes the anchors reach; None where no anchors were given.
        num_files: Image files that were decoded.
    """

    name: str
    source: str
    num_images: int
    boxes_per_class: dict[str, int]
    coverage: Coverage | None
    num_files: int


@dataclass(frozen=True)
class Report:
    """What ``check_dataset`` found.

    Attributes:
        splits: What each split holds.
        findings: Errors first, then warnings, then infos; train before val.
    """

    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> bool:
        """Whether the data are refused, or training on them would be wrong."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Give everything as plain values for a json file, every id included."""
        return {
            "wrong": self.wrong,
            "splits": [
                {
                    "split": split.name,
                    "source": split.source,
                    "num_images": split.num_images,
                    "num_files_decoded": split.num_files,
                    "boxes_per_class": split.boxes_per_class,
                    "no_anchor_reaches": None
                    if split.coverage is None
                    else {
                        size: {"num_boxes": count, "share": None if count == 0 else split.coverage.unreached[size]}
                        for size, count in split.coverage.num_boxes.items()
                    },
                }
                for split in self.splits
            ],
            "findings": [
                {
                    "split": finding.split,
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "count": finding.count,
                    "meaning": MEANINGS[finding.kind],
                    "problems": [
                        {
                            "message": problem.message,
                            "image_ids": list(problem.image_ids),
                            "annotation_ids": list(problem.annotation_ids),
                            "file": problem.file,
                        }
                        for problem in finding.problems
                    ],
                }
                for finding in self.findings
            ],
        }


def coco_split(name: str, images: Path, annotations: Path, classes: Sequence[str] | None = None) -> DataSplit:
    """Read a COCO json and everything that is wrong with its records.

    Raises:
        DataError: If the annotation file or the image folder is not there.
    """
    images, annotations = Path(images), Path(annotations)
    wanted = None if classes is None else tuple(classes)
    if not images.is_dir():
        raise DataError(f"{images}: no such image folder (the images of {annotations})")
    try:
        records = load_records(annotations)
    except DataError as error:
        if not annotations.is_file():
            raise
        problem = Problem("unreadable_annotations", str(error).removeprefix(f"{annotations}: "), file=str(annotations))
        nothing = CocoRecords(annotations, {}, [], [], [])
        return DataSplit(name, str(annotations), nothing, images, wanted, problems=(problem,))
    return DataSplit(name, str(annotations), records, images, wanted, problems=tuple(record_problems(records)))


def voc_split(name: str, root: Path, split: str | Sequence[str], classes: Sequence[str] | None = None) -> DataSplit:
    """Read a split of Pascal VOC and everything that is wrong with its files.

    Raises:
        DataError: If a folder or the split is not there.
    """
    records, problems = voc_records(root, split)
    source = f"{root} ({split if isinstance(split, str) else ', '.join(split)})"
    wanted = None if classes is None else tuple(classes)
    return DataSplit(name, source, records, Path(root), wanted, one_based=True, problems=tuple(problems))


def table_split(name: str, table: AnnotationTable, classes: Sequence[str] | None = None) -> DataSplit:
    """Take a table whose pictures are drawn, not read."""
    images: list[Any] = [
        {"id": image_id, "file_name": file_name, "height": height, "width": width}
        for image_id, file_name, (height, width) in zip(
            table.image_ids.tolist(), table.file_names, table.sizes.tolist(), strict=True
        )
    ]
    category_id = {category.label: category.category_id for category in table.categories}
    annotations: list[Any] = [
        {"id": number, "image_id": images[image]["id"], "category_id": category_id[label], "bbox": box}
        for number, image, label, box in zip(
            table.annotation_ids.tolist(),
            table.image_of_box().tolist(),
            table.labels.tolist(),
            table.boxes_xywh.tolist(),
            strict=True,
        )
    ]
    categories: list[Any] = [{"id": c.category_id, "name": c.name} for c in table.categories]
    records = CocoRecords(Path(table.name), {}, images, annotations, categories)
    return DataSplit(name, table.name, records, None, None if classes is None else tuple(classes))


def check_dataset(
    splits: Sequence[DataSplit],
    *,
    anchors: AnchorLayout | None = None,
    decode: bool = True,
    num_workers: int = 0,
    progress: bool = False,
) -> Report:
    """Look for everything that would make training or evaluation wrong, refused, or worse than it could be.

    Args:
        splits: Training data, named ``"train"``, and validation data, or one of them.
        anchors: The detector's; without them, nothing is said about what they reach.
        decode: Decode every image file. Otherwise only their being there is looked at.
        num_workers: Processes that decode; 0 does it in this one.
        progress: Show a bar on stderr.
    """
    tables = {split.name: _usable_table(split) for split in splits}
    found: dict[str, list[Problem]] = {split.name: list(split.problems) for split in splits}
    paths: dict[str, dict[int, str]] = {}
    for split in splits:
        problems = found[split.name]
        table = tables[split.name]
        if split.classes is not None:
            try:
                table = tables[split.name] = table.select_classes(list(split.classes))
            except DataError as error:
                problems.append(Problem("unknown_class", str(error).removeprefix(f"{table.name}: "), file=table.name))
        problems.extend(_table_problems(table, split))
        if split.root is not None:
            paths[split.name], file_problems = _file_problems(table, split)
            problems.extend(file_problems)
    for split in splits:
        # Splits often share a folder: what the other one lists is listed, and what none does is said once.
        sharing = [other for other in splits if other.root == split.root]
        if split.root is not None and sharing[0] is split:
            found[split.name].extend(_unlisted_files(split, sharing))
    shared = list(_different_classes(tables))
    shared.extend(_shared_files(tables, paths))
    facts: dict[str, ImageFacts] = {}
    if decode:
        every = list(dict.fromkeys(path for of_split in paths.values() for path in of_split.values()))
        facts = all_image_facts(every, num_workers=num_workers, progress=progress)
        for split in splits:
            found[split.name].extend(_image_problems(tables[split.name], paths.get(split.name, {}), facts))
        _add_duplicates(tables, paths, facts, found, shared)
    summaries = []
    for split in splits:
        table = tables[split.name]
        counts = np.bincount(table.labels[table.trainable(use_difficult=True)], minlength=table.num_classes)
        coverage = None if anchors is None else anchor_coverage(table, anchors)
        if split.name == "train" and coverage is not None and coverage.unreached["all"] > UNREACHED:
            shares = ", ".join(f"{size} {share:.1%}" for size, share in coverage.unreached.items() if share == share)
            found[split.name].append(Problem("unfit_anchors", f"boxes that no anchor reaches: {shares}", "warning"))
        summaries.append(
            SplitSummary(
                name=split.name,
                source=split.source,
                num_images=table.num_images,
                boxes_per_class={c.name: int(counts[c.label]) for c in table.categories},
                coverage=coverage,
                num_files=sum(path in facts for path in paths.get(split.name, {}).values()),
            )
        )
    findings = [finding for name, problems in found.items() for finding in _grouped(name, problems)]
    findings.extend(_grouped(" and ".join(found), shared))
    return Report(tuple(summaries), tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity))))


def _grouped(split: str, problems: Iterable[Problem]) -> list[Finding]:
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    return [Finding(split, kind, tuple(by_kind[kind])) for kind in MEANINGS if kind in by_kind]


def _usable_table(split: DataSplit) -> AnnotationTable:
    """Give the images and annotations that obey the format; what does not is among the split's problems already.

    Ids may repeat among annotations, and are -1 where an annotation has none.
    """
    records = split.records
    categories = _usable_categories(records)
    images = [record for record in records.images if isinstance(record, dict)]
    ids, usable = as_integers([record.get("id") for record in images])
    sides = []
    for key in ("height", "width"):
        side, whole = as_integers([record.get(key) for record in images])
        usable &= whole & (side >= 1) & (side <= MAX_SIDE)
        sides.append(side)
    names = [record.get("file_name") for record in images]
    usable &= np.array([isinstance(name, str) and name != "" for name in names], dtype=np.bool_)
    _, first = np.unique(ids[usable], return_index=True)
    rows = np.flatnonzero(usable)[np.sort(first)]
    ids = ids[rows]

    objects = [record for record in records.annotations if isinstance(record, dict)]
    image_index, keep = _positions(as_integers([record.get("image_id") for record in objects]), ids)
    category_ids = np.array([category.category_id for category in categories], dtype=np.int64)
    label_index, known = _positions(as_integers([record.get("category_id") for record in objects]), category_ids)
    boxes = _boxes([record.get("bbox") for record in objects])
    keep &= known & np.isfinite(boxes).all(axis=1)
    order = np.flatnonzero(keep)
    order = order[np.argsort(image_index[order], kind="stable")]
    boxes = boxes[order]
    annotation_ids, has_id = as_integers([record.get("id") for record in objects])
    counts = np.bincount(image_index[order], minlength=len(ids))

    def flag(key: str) -> npt.NDArray[np.bool_]:
        return np.array([objects[row].get(key) == 1 for row in order], dtype=np.bool_)

    return AnnotationTable(
        name=split.source,
        categories=categories,
        image_ids=ids,
        file_names=[str(names[row]) for row in rows],  # type: ignore[arg-type]  # the table makes its own of them
        sizes=np.stack(sides, axis=1)[rows].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xywh=boxes,
        labels=label_index[order] + 1,
        area=boxes[:, 2] * boxes[:, 3],
        crowd=flag("iscrowd"),
        difficult=flag("difficult") if split.one_based else np.zeros(len(order), dtype=np.bool_),
        annotation_ids=np.where(has_id, annotation_ids, -1)[order],
    )


def _usable_categories(records: CocoRecords) -> tuple[Category, ...]:
    entries = [record for record in records.categories if isinstance(record, dict)]
    ids, whole = as_integers([record.get("id") for record in entries])
    names: dict[int, str] = {}
    for category_id, usable, record in zip(ids.tolist(), whole.tolist(), entries, strict=True):
        name = record.get("name")
        if usable and category_id not in names:
            names[category_id] = name if isinstance(name, str) and name else f"category {category_id}"
    return tuple(Category(label, key, names[key]) for label, key in enumerate(sorted(names), start=1))


def _positions(
    wanted: tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]], known: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Give where each value stands in ``known``, and whether it does."""
    values, whole = wanted
    if not len(known):
        return np.zeros(len(values), dtype=np.int64), np.zeros(len(values), dtype=np.bool_)
    order = np.argsort(known)
    found = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
    return found.astype(np.int64), whole & (known[found] == values)


def _boxes(values: list[Any]) -> npt.NDArray[np.float64]:
    """Give float64 ``[V, 4]``, NaN where a value is not a box."""
    boxes = as_boxes(values)
    if boxes is None:
        single = [as_boxes([value]) for value in values]
        boxes = np.array([[math.nan] * 4 if box is None else box[0] for box in single], dtype=np.float64)
    return boxes


class _Naming:
    """Makes problems of rows of a table, with words for where they are."""

    def __init__(self, table: AnnotationTable, split: DataSplit) -> None:
        self.table = table
        self.image = table.image_of_box()
        self.one_based = split.one_based

    def box(self, kind: str, row: int, what: str, severity: Severity) -> Problem:
        table, image = self.table, int(self.image[row])
        annotation_id = int(table.annotation_ids[row])
        image_id = int(table.image_ids[image])
        name = "an annotation without id" if annotation_id < 0 else f"annotation {annotation_id}"
        message = f"{name} of image {image_id} ({table.file_names[image]}): {what}: {self.numbers(row)}"
        return Problem(kind, message, severity, (image_id,), () if annotation_id < 0 else (annotation_id,))

    def numbers(self, row: int) -> str:
        """Show a box as its file has it."""
        x, y, w, h = self.table.boxes_xywh[row].tolist()
        if not self.one_based:
            return f"[x, y, width, height] = [{x:.10g}, {y:.10g}, {w:.10g}, {h:.10g}]"
        extent = 0 if w <= 0 or h <= 0 else 1
        corners = (x + 1, y + 1, x + 1 + w - extent, y + 1 + h - extent)
        return "xmin, ymin, xmax, ymax = " + ", ".join(f"{corner:.10g}" for corner in corners)


def _table_problems(table: AnnotationTable, split: DataSplit) -> Iterator[Problem]:
    naming = _Naming(table, split)
    x, y, w, h = table.boxes_xywh.T
    height, width = table.sizes[naming.image].T.astype(np.float64)
    inside = table.boxes_in_image()
    sides = inside[:, 2:] - inside[:, :2]
    negative = (w < 0) | (h < 0)
    zero = ~negative & ((w < MIN_TRAINABLE_SIDE) | (h < MIN_TRAINABLE_SIDE))
    outside = ~negative & ~zero & (sides < MIN_TRAINABLE_SIDE).any(axis=1)
    sound = ~negative & ~zero & ~outside
    overhang = np.max([-x, -y, x + w - width, y + h - height], axis=0, initial=-math.inf)
    overhang = np.where(sound, overhang, 0.0)
    # One pixel beyond the first is what a corner at 0 comes to in VOC's way of counting, which is said apart.
    partly = overhang > (1 if split.one_based else OVERHANG)
    longer, shorter = sides.max(axis=1, initial=0), np.maximum(sides.min(axis=1, initial=math.inf), 1e-9)
    size = [f"{a:g}x{b:g}" for a, b in table.sizes[:, ::-1].tolist()]
    for row in np.flatnonzero(negative).tolist():
        yield naming.box("negative_box", row, "negative width or height", "error")
    for row in np.flatnonzero(zero).tolist():
        yield naming.box("zero_box", row, f"a side of less than {MIN_TRAINABLE_SIDE:g} px", "error")
    for row in np.flatnonzero(outside).tolist():
        yield naming.box("box_outside_image", row, f"outside its {size[naming.image[row]]} image", "error")
    for row in np.flatnonzero(partly).tolist():
        what = f"reaches {overhang[row]:.4g} px out of its {size[naming.image[row]]} image"
        yield naming.box("box_partly_outside", row, what, "warning")
    for row in np.flatnonzero(sound & (sides.min(axis=1, initial=math.inf) < TINY_SIDE - 1e-6)).tolist():
        yield naming.box("tiny_box", row, f"{sides[row, 0]:.3g}x{sides[row, 1]:.3g} px", "info")
    for row in np.flatnonzero(sound & (longer / shorter >= EXTREME_ASPECT)).tolist():
        yield naming.box("extreme_aspect", row, f"{sides[row, 0]:.4g}x{sides[row, 1]:.4g} px", "info")
    yield from _repeated_boxes(table, naming, sound & ~table.crowd)
    yield from _convention_problems(table, split, sound & ~table.crowd)
    yield from _class_problems(table, split)
    yield from _name_problems(table)
    empty = np.flatnonzero(np.diff(table.offsets) == 0).tolist()
    for index in empty if table.num_boxes else []:
        yield _about_image("image_without_boxes", table, index, "no boxes", "info")


def _about_image(
    kind: str, table: AnnotationTable, index: int, what: str, severity: Severity, file: str = ""
) -> Problem:
    image_id = int(table.image_ids[index])
    return Problem(kind, f"image {image_id} ({table.file_names[index]}): {what}", severity, (image_id,), file=file)


def _repeated_boxes(table: AnnotationTable, naming: _Naming, keep: npt.NDArray[np.bool_]) -> Iterator[Problem]:
    rows = np.flatnonzero(keep)
    if len(rows) < 2:
        return
    columns = [*table.boxes_xywh[rows].T, table.labels[rows], naming.image[rows]]
    order = np.lexsort(columns)
    same = np.ones(len(rows) - 1, dtype=np.bool_)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    ends = np.append(starts[1:], len(rows))
    groups = [rows[order[start:end]] for start, end in zip(starts, ends, strict=True) if end - start > 1]
    for group in sorted(groups, key=lambda group: int(group[0])):
        image = int(naming.image[group[0]])
        image_id = int(table.image_ids[image])
        ids = tuple(int(i) for i in table.annotation_ids[group] if i >= 0)
        name = table.categories[int(table.labels[group[0]]) - 1].name
        listed = ", ".join(map(str, ids))
        message = (
            f"annotations {listed} of image {image_id} ({table.file_names[image]}): "
            f"{len(group)} times the same {name!r}: {naming.numbers(int(group[0]))}"
        )
        yield Problem("repeated_box", message, "warning", (image_id,), ids, count=len(group) - 1)


def _convention_problems(table: AnnotationTable, split: DataSplit, keep: npt.NDArray[np.bool_]) -> Iterator[Problem]:
    """Tell by all boxes together whether they were written by another rule than the one by which they are read.

    * Corners as ``[x, y, width, height]``: read as the latter, corners leave the image often (here: a tenth of the
      boxes), and the third and fourth number exceed the first and second always.
    * Fractions: no number above 1.
    * A pixel off: objects cut by the border of an image give boxes that end exactly there, so coordinates pile up at
      0 and at the image's size. Piles one pixel further in, with not one box beyond them, come from counting pixels
      from 1, or from taking the last pixel inside an object for its end. A pile has 5 boxes at least, and three times
      as many as the pixel after it. Without objects at the border nothing can be told, and nothing is said.
    """
    x, y, w, h = table.boxes_xywh.T
    height, width = table.sizes[table.image_of_box()].T.astype(np.float64)
    num_boxes = len(x)
    if num_boxes < _MIN_EVIDENCE:
        return
    if not split.one_based:
        if np.abs(table.boxes_xywh).max() <= 1:
            message = f"no number of its {num_boxes} boxes exceeds 1"
            yield Problem("boxes_are_fractions", message, count=num_boxes)
            return
        fits = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        leaves = (x + w > width + 1) | (y + h > height + 1)
        if fits.mean() >= 0.99 and leaves.mean() >= 0.1:
            message = (
                f"{int(leaves.sum())} of its {num_boxes} boxes leave their images if read as [x, y, width, height], "
                "and as corners [x1, y1, x2, y2] all of them fit"
            )
            yield Problem("boxes_are_corners", message, count=num_boxes)
            return
    low = np.concatenate([x[keep], y[keep]])
    far = np.concatenate([(width - x - w)[keep], (height - y - h)[keep]])
    if split.one_based:
        if (zero := int((low == -1).sum())) > 0:
            rows = np.flatnonzero((x == -1) | (y == -1))
            ids = tuple(np.unique(table.image_ids[table.image_of_box()[rows]]).tolist())
            message = f"{len(rows)} of its {num_boxes} boxes have a corner at 0 ({zero} corners)"
            yield Problem("zero_based_corners", message, "warning", ids, tuple(table.annotation_ids[rows].tolist()))
    elif _piles_up(low):
        message = f"{int((low == 1).sum())} sides of its {num_boxes} boxes are at 1, and not one is nearer to 0"
        yield Problem("one_based_corners", message, "warning")
    if _piles_up(far):
        message = f"{int((far == 1).sum())} sides of its {num_boxes} boxes end 1 px before the border, not one nearer"
        yield Problem("short_boxes", message, "warning")


def _piles_up(distance: npt.NDArray[np.float64]) -> bool:
    """Say whether distances from a border pile up at exactly one pixel, and none is smaller."""
    at_one = int((distance == 1).sum())
    return at_one >= _MIN_EVIDENCE and at_one >= 3 * int((distance == 2).sum()) and not (distance < 1).any()


def _class_problems(table: AnnotationTable, split: DataSplit) -> Iterator[Problem]:
    trainable = table.trainable(use_difficult=True)
    if split.name == "train" and not trainable.any():
        yield Problem("nothing_to_train_on", f"none of its {table.num_boxes} boxes can be trained on")
        return
    counts = np.bincount(table.labels[trainable], minlength=table.num_classes)[1:]
    names = [category.name for category in table.categories]
    unused = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if unused:
        severity: Severity = "warning" if split.name == "train" else "info"
        message = f"{len(unused)} of {len(names)} classes have no box: {_some(unused)}"
        yield Problem("unused_category", message, severity, count=len(unused))
    used = np.flatnonzero(counts)
    if len(used) > 1 and counts[used].max() >= IMBALANCE * counts[used].min():
        most, least = int(counts.argmax()), int(used[counts[used].argmin()])
        message = f"{counts[most]} boxes of {names[most]!r}, {counts[least]} of {names[least]!r}"
        yield Problem("class_imbalance", message, "info")


def _some(names: Sequence[str], num: int = 8) -> str:
    return ", ".join(names[:num]) + (", ..." if len(names) > num else "")


def _name_problems(table: AnnotationTable) -> Iterator[Problem]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(table.file_names):
        by_name[os.path.normpath(name)].append(index)
    for name, indices in by_name.items():
        if len(indices) > 1:
            ids = tuple(int(table.image_ids[index]) for index in indices)
            message = f"images {', '.join(map(str, ids))} have the same file_name {name!r}"
            yield Problem("duplicate_file_name", message, "error", ids, count=len(indices) - 1)


def _file_problems(table: AnnotationTable, split: DataSplit) -> tuple[dict[int, str], list[Problem]]:
    """Look for the files of a table; give the paths of those that are there by image index."""
    assert split.root is not None
    problems: list[Problem] = []
    allowed = np.ones(table.num_images, dtype=np.bool_)
    try:
        FolderImages(split.root, table)
    except DataError:
        # The first bad name stops it; images are asked for one by one to hear of them all.
        for index in range(table.num_images):
            try:
                FolderImages(split.root, table.select_images(np.array([index])))
            except DataError as error:
                allowed[index] = False
                ids = (int(table.image_ids[index]),)
                problems.append(Problem("bad_file_name", str(error).removeprefix(f"{table.name}: "), image_ids=ids))
    names = table.file_names.tolist()
    listings: dict[str, set[str]] = {}
    paths: dict[int, str] = {}
    for index in np.flatnonzero(allowed).tolist():
        folder, name = os.path.split(names[index])
        if folder not in listings:
            listings[folder] = _listing(split.root / folder)
        path = os.path.join(split.root, names[index])
        # A file system that ignores case lists one spelling and opens all, hence the second look.
        if name in listings[folder] or os.path.isfile(path):
            paths[index] = path
        else:
            problems.append(
                _about_image("missing_file", table, index, "no such file in the image folder", "error", path)
            )
    return paths, problems


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):
        return set()


def _unlisted_files(split: DataSplit, sharing: Sequence[DataSplit]) -> Iterator[Problem]:
    """Give image files of a split's folders that no split in ``sharing`` names.

    In VOC's layout a list names a part of a folder, so files with an annotation count as named.
    """
    assert split.root is not None
    entries = (record.get("file_name") for one in sharing for record in one.records.images if isinstance(record, dict))
    names = [name for name in entries if is_file_name(name) and not os.path.normpath(name).startswith(("..", "/"))]
    listed = {os.path.normpath(name) for name in names}
    for folder in sorted({os.path.dirname(name) for name in names}):
        annotated: set[str] = set()
        if split.one_based:
            annotated = {Path(name).stem for name in _listing(split.root / Path(folder).parent / "Annotations")}
        for name in sorted(_listing(split.root / folder)):
            path = os.path.join(folder, name)
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and os.path.normpath(path) not in listed and stem not in annotated:
                yield Problem("unlisted_file", f"{path}: in no annotation", "info", file=str(split.root / path))


def _different_classes(tables: dict[str, AnnotationTable]) -> Iterator[Problem]:
    names = {split: {category.name for category in table.categories} for split, table in tables.items()}
    for split, other in ((a, b) for a in names for b in names if a != b):
        only = sorted(names[split] - names[other])
        if only and names[other]:
            yield Problem("different_classes", f"only {split} has {_some(only)}", count=len(only))


def _shared_files(tables: dict[str, AnnotationTable], paths: dict[str, dict[int, str]]) -> Iterator[Problem]:
    """Give the files that are in both splits."""
    if len(paths) < 2:
        return
    (first, own), (second, other) = paths.items()
    index_of = {os.path.realpath(path): index for index, path in other.items()}
    for index, path in own.items():
        if (match := index_of.get(os.path.realpath(path))) is not None:
            ids = (int(tables[first].image_ids[index]), int(tables[second].image_ids[match]))
            message = f"{path}: image {ids[0]} of {first}, image {ids[1]} of {second}"
            yield Problem("train_val_overlap", message, "warning", ids, file=path)


def _image_problems(table: AnnotationTable, paths: dict[int, str], facts: dict[str, ImageFacts]) -> Iterator[Problem]:
    modes: dict[str, list[int]] = defaultdict(list)
    for index, path in paths.items():
        found = facts[path]
        if found.header is None:
            what = found.error.removeprefix(f"{path}: ")
            yield _about_image("unreadable_file", table, index, what, "error", path)
            continue
        header = found.header
        size = tuple(table.sizes[index].tolist())
        if header.mode != "RGB":
            modes[header.mode].append(int(table.image_ids[index]))
        orientation = f"EXIF orientation {header.orientation}"
        if header.size == size:
            if header.orientation != 1:
                yield _about_image("exif_rotation", table, index, orientation, "warning", path)
        elif header.size == size[::-1] and header.orientation >= 5:
            yield _about_image("exif_turned", table, index, orientation, "info", path)
        else:
            what = f"the file has {_width_height(header.size)} pixels, the annotations say {_width_height(size)}"
            yield _about_image("size_mismatch", table, index, what, "error", path)
    for mode, ids in modes.items():
        yield Problem("not_rgb", f"{len(ids)} images of mode {mode}", "info", tuple(ids), count=len(ids))


def _width_height(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"


def _add_duplicates(
    tables: dict[str, AnnotationTable],
    paths: dict[str, dict[int, str]],
    facts: dict[str, ImageFacts],
    found: dict[str, list[Problem]],
    shared: list[Problem],
) -> None:
    """Add groups of files with the same pixels, and pairs of nearly the same ones, within and across splits."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for split, of_split in paths.items():
        for index, path in of_split.items():
            places[path].append((split, int(tables[split].image_ids[index])))
    readable = [of_file for of_file in facts.values() if of_file.header is not None]
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for of_file in readable:
        by_digest[of_file.digest].append(of_file.path)
    groups = [("duplicate_image", "the same pixels", same) for same in by_digest.values() if len(same) > 1]
    unique = [facts[same[0]] for same in by_digest.values()]
    for i, j in near_duplicates(unique):
        groups.append(("near_duplicate_image", "nearly the same picture", [unique[i].path, unique[j].path]))
    for kind, what, files in groups:
        where = [(split, image_id, path) for path in files for split, image_id in places[path]]
        ids = tuple(image_id for _, image_id, _ in where)
        listed = ", ".join(f"image {image_id} of {split} ({os.path.basename(path)})" for split, image_id, path in where)
        in_split = Counter(split for split, _, _ in where)
        across = len(in_split) > 1
        severity: Severity = "warning" if across or kind == "duplicate_image" else "info"
        problem = Problem(
            "train_val_overlap" if across else kind,
            f"{what}: {listed}",
            severity,
            ids,
            file=files[0],
            count=len(files) - 1,
        )
        (shared if across else found[where[0][0]]).append(problem)


def report_text(report: Report, *, num_examples: int = 3) -> str:
    """Give a report as lines to be read: what each split holds, then findings with their first examples."""
    lines = []
    for split in report.splits:
        num_boxes = sum(split.boxes_per_class.values())
        decoded = f", {split.num_files:,} files decoded" if split.num_files else ""
        lines.append(
            f"{split.name}: {split.source}: {split.num_images:,} images{decoded}, "
            f"{num_boxes:,} boxes of {len(split.boxes_per_class)} classes"
        )
        if split.coverage is not None and num_boxes:
            shares = (
                f"{size} {split.coverage.unreached[size]:.1%} of {count:,}"
                for size, count in split.coverage.num_boxes.items()
                if count
            )
            lines.append(f"  boxes that no anchor overlaps by {IOU_REACHED:g}: {', '.join(shares)}")
    for finding in report.findings:
        head = f"{finding.severity.upper() if finding.severity == 'error' else finding.severity:<8}"
        lines.append("")
        lines.append(f"{head}{finding.split}: {finding.kind}, {finding.count:,}: {MEANINGS[finding.kind]}")
        lines.extend(f"          {problem.message}" for problem in finding.problems[:num_examples])
        if len(finding.problems) > num_examples:
            lines.append(f"          ... and {len(finding.problems) - num_examples:,} more")
    num = {severity: sum(f.count for f in report.findings if f.severity == severity) for severity in _ORDER}
    verdict = f"wrong: {_counted(num['error'], 'error')}: training would be refused, or wrong"
    if not report.wrong:
        verdict = "nothing is wrong" + (f"; {_counted(num['warning'], 'warning')}" if num["warning"] else "")
    return "\n".join([*lines, "", verdict])


def _counted(num: int, word: str) -> str:
    return f"{num:,} {word}{'' if num == 1 else 's'}"
