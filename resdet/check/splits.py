"""Read the splits of a dataset to be checked, sound records and damaged ones alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import coco_document, usable_table
from resdet.data.coco_rules import SECTIONS, CocoRecords, Problem, is_file_name, load_records, record_problems
from resdet.data.image_files import check_folder, name_fault
from resdet.data.voc import voc_name, voc_records
from resdet.data.yolo import yolo_files
from resdet.errors import DataError


@dataclass(frozen=True)
class DataSplit:
    """A split of a dataset, as it is in its files."""

    name: str  # "train" or "val"
    source: str  # where it came from, for messages
    records: CocoRecords
    root: Path | None  # folder of its images; None for pictures that are drawn
    classes: Sequence[str] | None = None  # names of the classes that are used; all if None
    one_based: bool = False  # whether its files count pixels from 1, as VOC does
    use_difficult: bool = False  # whether VOC's difficult objects are trained on
    upright: bool = False  # whether its boxes mean images as their EXIF orientation shows them, as YOLO's do
    label_files: tuple[Path, ...] = ()  # YOLO's, and data.yaml
    problems: tuple[Problem, ...] = ()  # what is wrong with the files themselves

    @property
    def has_file_per_image(self) -> bool:
        """Whether each image has an annotation file of its own, as in VOC's and YOLO's layouts."""
        return self.one_based or self.upright

    def usable_table(self) -> tuple[AnnotationTable, list[Problem]]:
        """Return the images and annotations that obey the format; the problem, if classes are named that it lacks."""
        table = usable_table(self.records, self.source, difficult=self.one_based)
        try:
            return (table if self.classes is None else table.select_classes(list(self.classes))), []
        except DataError as error:
            message = str(error).removeprefix(f"{table.name}: ")
            return table, [Problem("unknown_class", message, file=table.name)]

    def divided(self, held_out: Set[int]) -> tuple[DataSplit, DataSplit]:
        """Return the split without the images of these ids, and "val", the split of these, with their annotations.

        Whatever is wrong with the files themselves remains a problem of the first.
        """
        parts = []
        for is_val in (False, True):
            images, objects = (
                [one for one in section if (isinstance(one, dict) and _is_among(one.get(key), held_out)) == is_val]
                for section, key in ((self.records.images, "id"), (self.records.annotations, "image_id"))
            )
            parts.append(replace(self.records, images=images, annotations=objects))
        return replace(self, records=parts[0]), replace(self, name="val", records=parts[1], problems=())

    def input_files(self) -> Iterator[Path]:
        """Yield the files that the split is read from, images included."""
        if self.root is None:
            return
        names = (record.get("file_name") for record in self.records.images if isinstance(record, dict))
        yield from (self.root / name for name in names if is_file_name(name) and name_fault(name) is None)
        if self.one_based:
            for part in ("*.xml", "ImageSets/**/*.txt", "labelmap.txt"):
                yield from self.root.rglob(part)
        else:
            yield self.records.path
            yield from self.label_files


def _is_among(value: Any, ids: Set[int]) -> bool:
    return isinstance(value, (int, float)) and value in ids


def coco_split(name: str, images: Path, annotations: Path, classes: Sequence[str] | None = None) -> DataSplit:
    """Read a COCO json and everything that is wrong with its records; refuse only a missing path."""
    images, annotations = Path(images), Path(annotations)
    check_folder(images, annotations)
    try:
        records = load_records(annotations)
    except DataError as error:
        if not os.path.isfile(annotations):
            raise
        message = str(error).removeprefix(f"{annotations}: ")
        problems = [Problem("unreadable_annotations", message, file=str(annotations))]
        records = CocoRecords(annotations, {}, [], [], [])
    else:
        problems = list(record_problems(records))
        if num_named := records.num_named_by_url:
            message = f"{num_named} of {len(records.images)} images have no file_name, but a coco_url"
            problems.append(Problem("file_name_from_url", message, file=str(annotations), count=num_named))
        if records.root_note:
            problems.append(Problem("root_category", records.root_note, file=str(annotations)))
    return DataSplit(name, str(annotations), records, images, classes, problems=tuple(problems))


def voc_split(
    name: str,
    root: Path,
    split: str | Sequence[str] | None,
    classes: Sequence[str] | None = None,
    *,
    use_difficult: bool = False,
) -> DataSplit:
    """Read a split of Pascal VOC and everything that is wrong with its files; refuse only a missing path."""
    records, problems = voc_records(root, split)
    source, found, root = voc_name(root, split), tuple(problems), Path(root)
    return DataSplit(name, source, records, root, classes, one_based=True, use_difficult=use_difficult, problems=found)


def yolo_split(name: str, root: Path, split: str | None, classes: Sequence[str] | None = None) -> DataSplit:
    """Read a split in YOLO's layout and everything that is wrong with its files; refuse only a missing path."""
    found, problems = yolo_files(root, split)
    problems += [Problem("guessed_layout", note) for note in found.notes]
    return DataSplit(
        name,
        found.table.name,
        _records_of(found.table),
        found.root,
        classes,
        upright=True,
        label_files=found.files,
        problems=tuple(problems),
    )


def table_split(name: str, table: AnnotationTable, classes: Sequence[str] | None = None) -> DataSplit:
    """Make a split of a table whose pictures are drawn, not read."""
    return DataSplit(name, table.name, _records_of(table), None, classes)


def _records_of(table: AnnotationTable) -> CocoRecords:
    document = coco_document(table)
    return CocoRecords(Path(table.name), {}, *(document[section] for section in SECTIONS))
