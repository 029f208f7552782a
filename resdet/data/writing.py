"""Write tables and their images as a data set in COCO's, YOLO's or Pascal VOC's layout."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable, FileNames
from resdet.data.coco import coco_document
from resdet.data.images import Images, read_orientation, read_size, size_tells, turned_boxes
from resdet.data.names import IMAGE_SUFFIXES, SPLITS, on_disk
from resdet.data.yolo import TOLERANCE
from resdet.data.yolo_layout import label_path
from resdet.errors import UserError, name_some
from resdet.files import make_output_folder
from resdet.types import Category

Layout = Literal["coco", "yolo", "voc"]

_OWN_FOLDERS = {"JPEGImages", "images", *(name for names in SPLITS.values() for name in names)}


@dataclass(frozen=True)
class Part:
    """A split to be written."""

    name: str  # "train", "val", ...
    table: AnnotationTable
    images: Path | Images  # the folder of its images, or what draws them
    layout: str  # that it was read from: "coco", "yolo", "voc" or "shapes"


def write_dataset(parts: Sequence[Part], layout: Layout, output: Path, *, copy: bool = False) -> list[str]:
    """Write splits as one data set; return lines that say what was written, and what the layout cannot hold.

    * ``coco``: annotations/instances_SPLIT.json and images/SPLIT/. Difficult objects get ``iscrowd`` 1.
    * ``yolo``: data.yaml, images/SPLIT/ and labels/SPLIT/. Crowd regions, difficult objects and boxes that repeat
      another of their image and class are left out, and boxes far outside their images clipped.
    * ``voc``: JPEGImages/, Annotations/, ImageSets/Main/SPLIT.txt, and labelmap.txt for the order of the classes. Crowd
      regions get ``difficult`` 1; boxes of one pixel or less in width or height, which VOC's corners cannot state, are
      left out.

    Class names and their order, names of images with their subfolders, and images without objects are kept; of an
    object its box, class and (in COCO) area. Boxes mean the image that readers of the layout see: upright by EXIF's
    orientation in YOLO, else as stored.

    Args:
        parts: The splits.
        layout: One of the three.
        output: A new or an empty folder, which appears whole or not at all.
        copy: Copy images instead of linking them, so that both sets can be changed apart.

    Raises:
        UserError: If ``output`` is not empty, or two images would share a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: the output must be a new or an empty folder")
    make_output_folder(output.parent)
    lost: Counter[str] = Counter()
    parts = _with_one_class_list(parts, lost)
    names = _kept_names(parts, layout)
    temporary = output.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        files = _Files(copy)
        for part in parts:
            folder = temporary / ("JPEGImages" if layout == "voc" else f"images/{part.name}")
            table = _as_read(part, layout)
            placed = [files.place(part, index, folder / name) for index, name in enumerate(names[part.name])]
            _WRITERS[layout](temporary, replace(part, table=table), placed, lost)
        _write_classes(temporary, parts, layout)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = [f"{part.name}: {part.table.num_images} images, {part.table.num_boxes} objects" for part in parts]
    return [*counts, files.report(), *(f"{number} {what}" for what, number in lost.items())]


class _Files:
    """Brings images to their new places."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._num_linked = self._num_copied = self._bytes = 0

    def place(self, part: Part, index: int, target: Path) -> Path:
        """Link, copy or draw image ``index`` to ``target``; return ``target``."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(part.images, Path):
            Image.fromarray(part.images(index)).save(target, format="PNG")
            self._count_copied(target)
            return target
        source = os.path.realpath(on_disk(part.images / part.table.file_names[index]))
        try:
            if self._copy:
                raise OSError
            os.link(source, target)
            self._num_linked += 1
        except OSError:  # --copy, another disk, or a file system without links
            shutil.copy2(source, target)
            self._count_copied(target)
        return target

    def _count_copied(self, target: Path) -> None:
        self._num_copied += 1
        self._bytes += target.stat().st_size

    def report(self) -> str:
        """Return how many images were linked and copied."""
        linked = f"{self._num_linked} images are hard links to the given files (--copy makes them files of their own)"
        copied = f"{self._num_copied} images copied, {self._bytes:,} bytes"
        return "; ".join(([linked] if self._num_linked else []) + ([copied] if self._num_copied else [])) or "no images"


def _with_one_class_list(parts: Sequence[Part], lost: Counter[str]) -> list[Part]:
    """Return the parts with the classes of the first, and after them those that only others have."""
    first = parts[0].table
    for part in parts[1:]:
        first = first.add_classes(part.table.categories)
    categories = first.categories
    ids = [category.category_id for category in categories]
    if ids != sorted(ids):  # readers of COCO take the order of ids for that of the classes
        lost["category ids changed: they are 1, 2, ... in the order of the classes"] = len(ids)
        categories = tuple(Category(label, label, one.name) for label, one in enumerate(categories, start=1))
    names = [category.name for category in categories]
    return [replace(one, table=replace(one.table.select_classes(names), categories=categories)) for one in parts]


def _kept_names(parts: Sequence[Part], layout: Layout) -> dict[str, list[str]]:
    """Return the images' names in the new layout: with their subfolders, but without the old layout's own folders.

    Raises:
        UserError: If two images would have one annotation file, or one has no suffix by which it would be found.
    """
    names = {part.name: _without_own_folders(part) for part in parts}
    everything = [name for of_part in names.values() for name in of_part]
    if layout == "voc" and len({os.path.splitext(name)[0] for name in everything}) < len(everything):
        names = {split: [f"{split}/{name}" for name in of_part] for split, of_part in names.items()}
    for of_part in names.values() if layout != "coco" else ():
        seen: dict[str, str] = {}
        for name in of_part:
            if (other := seen.setdefault(os.path.splitext(name)[0], name)) is not name:
                raise UserError(f"images {other} and {name} would share one annotation file; rename one of them")
        if unknown := [name for name in of_part if not name.lower().endswith(IMAGE_SUFFIXES)]:
            raise UserError(f"images must end in one of {', '.join(IMAGE_SUFFIXES)}, got {name_some(unknown)}")
    return names


def _without_own_folders(part: Part) -> list[str]:
    names = [PurePosixPath(os.path.normpath(name)) for name in part.table.file_names]
    while part.layout != "coco" and len({name.parts[0] for name in names}) == 1:
        if names[0].parts[0] not in _OWN_FOLDERS | {part.name} or min(len(name.parts) for name in names) == 1:
            break
        names = [name.relative_to(name.parts[0]) for name in names]
    return [str(name) for name in names]


def _as_read(part: Part, layout: Layout) -> AnnotationTable:
    """Return the table with boxes and sizes in the pixels that readers of the layout see (``FolderImages``)."""
    table = part.table
    if not isinstance(part.images, Path):
        return table
    boxes, sizes = table.boxes_xywh.copy(), table.sizes.copy()
    for index, name in enumerate(table.file_names):
        path = on_disk(part.images / name)
        if (orientation := read_orientation(path)) == 1:
            continue
        stored, size = read_size(path), (int(sizes[index, 0]), int(sizes[index, 1]))
        is_upright = part.layout == "yolo" or (orientation >= 5 and stored != size)
        if is_upright != (layout == "yolo" or (is_upright and size_tells(orientation, stored))):
            rows = table.rows(index)
            boxes[rows] = turned_boxes(boxes[rows], size, orientation, back=is_upright)
            sizes[index] = size[::-1] if orientation >= 5 else size
    return replace(table, boxes_xywh=boxes, sizes=sizes)


def _write_coco(output: Path, part: Part, images: Sequence[Path], lost: Counter[str]) -> None:
    folder = output / "images" / part.name
    table = replace(part.table, file_names=FileNames(path.relative_to(folder).as_posix() for path in images))
    if len(np.unique(table.annotation_ids)) < table.num_boxes:
        table = replace(table, annotation_ids=np.arange(1, table.num_boxes + 1, dtype=np.int64))
    document = coco_document(replace(table, crowd=table.crowd | table.difficult))
    if num := int((table.difficult & ~table.crowd).sum()):
        lost["difficult objects have iscrowd 1, which leaves them out of training and scores"] += num
    _write(output / "annotations" / f"instances_{part.name}.json", json.dumps(document))


def _write_yolo(output: Path, part: Part, images: Sequence[Path], lost: Counter[str]) -> None:
    table = part.table
    for index, path in enumerate(images):
        rows, (height, width) = table.rows(index), table.sizes[index].tolist()
        clipped, sound = table.boxes_of(index)
        lines = []
        for row, label in enumerate(table.labels[rows].tolist(), start=rows.start):
            if table.crowd[row] or table.difficult[row]:
                lost[f"{'crowd regions' if table.crowd[row] else 'difficult objects'} left out"] += 1
            elif not sound[row - rows.start]:
                lost[_NO_EXTENT] += 1
            else:
                x, y, w, h = table.boxes_xywh[row].tolist()
                shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                if not all(-TOLERANCE <= share <= 1 + TOLERANCE for share in shares):
                    lost["boxes clipped to their images"] += 1
                    x1, y1, x2, y2 = clipped[row - rows.start].tolist()
                    shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                line = " ".join([str(label - 1), *(_decimal(share, 10) for share in shares)])
                if line in lines:  # readers drop it without a word
                    lost["boxes that repeat another of their image and class left out"] += 1
                else:
                    lines.append(line)
        _write(Path(label_path(str(path))), "\n".join(lines))


def _write_voc(output: Path, part: Part, images: Sequence[Path], lost: Counter[str]) -> None:
    table, stems = part.table, []
    for index, path in enumerate(images):
        name = path.relative_to(output / "JPEGImages")
        stems.append(name.with_suffix("").as_posix())
        annotation = ElementTree.Element("annotation")
        height, width = table.sizes[index].tolist()
        _add(annotation, {"folder": "JPEGImages", "filename": name.as_posix()})
        _add(ElementTree.SubElement(annotation, "size"), {"width": width, "height": height, "depth": 3})
        for row in range(*table.rows(index).indices(table.num_boxes)):
            x, y, w, h = table.boxes_xywh[row].tolist()
            if not min(w, h) > 1:
                lost["boxes of one pixel or less in width or height left out"] += 1
                continue
            if table.crowd[row]:
                lost["crowd regions are marked difficult"] += 1
            item = ElementTree.SubElement(annotation, "object")
            difficult = int(table.crowd[row] or table.difficult[row])
            _add(item, {"name": table.categories[int(table.labels[row]) - 1].name, "difficult": difficult})
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            _add(ElementTree.SubElement(item, "bndbox"), {tag: _decimal(value, 6) for tag, value in corners.items()})
        ElementTree.indent(annotation)
        _write(
            (output / "Annotations" / name).with_suffix(".xml"), ElementTree.tostring(annotation, encoding="unicode")
        )
    _write(output / "ImageSets" / "Main" / f"{part.name}.txt", "\n".join(stems))


_NO_EXTENT = f"boxes thinner than {MIN_TRAINABLE_SIDE:g} px inside their images left out"
_WRITERS: dict[Layout, Callable[[Path, Part, Sequence[Path], Counter[str]], None]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "voc": _write_voc,
}


def _write_classes(output: Path, parts: Sequence[Part], layout: Layout) -> None:
    names = [category.name for category in parts[0].table.categories]
    if layout == "yolo":
        splits = [f"{part.name}: images/{part.name}" for part in parts]
        listed = [f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(names)]
        _write(output / "data.yaml", "\n".join([*splits, f"nc: {len(names)}", "names:", *listed]))
    elif layout == "voc":
        _write(output / "labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *(f"{n}:::" for n in names)]))


def _add(element: ElementTree.Element, values: dict[str, object]) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(element, tag).text = str(value)


def _decimal(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n" if text else "", encoding="utf-8", newline="\n")
