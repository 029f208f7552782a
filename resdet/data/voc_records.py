"""Folders in Pascal VOC's layout -> the records that a COCO json of the same content would hold, good and bad alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from resdet.data import voc
from resdet.data.coco_rules import CocoRecords, Problem, Record
from resdet.errors import DataError


def voc_records(root: Path, split: str | Sequence[str]) -> tuple[CocoRecords, list[Problem]]:
    """Read splits of Pascal VOC as ``read_voc`` does, but go on after a damaged file, and keep boxes without extent.

    Boxes are converted as by ``read_voc``; those that it leaves out have sides ``xmax - xmin`` and ``ymax - ymin``,
    zero or negative. Annotations carry ``difficult`` beside COCO's own keys, and are numbered from 1 in the order of
    the split.

    Args:
        root: As for ``read_voc``.
        split: As for ``read_voc``.

    Returns:
        The records of all files that can be read, and a problem for each that cannot.

    Raises:
        DataError: If a folder or a split is missing.
    """
    root = Path(root)
    problems: list[Problem] = []
    images: list[Record] = []
    objects: list[tuple[Record, str]] = []
    names: set[str] = set()
    listed: set[str] = set()
    seen: set[Path] = set()
    for one_split in [split] if isinstance(split, str) else list(split):
        *parents, list_name = one_split.split("/")
        folder = root.joinpath(*parents)
        voc._check_layout(folder, root)
        annotations = {path.stem: path for path in sorted((folder / "Annotations").glob("*.xml"))}
        image_names = voc._images_by_stem(folder / "JPEGImages")
        for stem in voc._read_list(folder, list_name, annotations):
            file_name = (Path(*parents) / "JPEGImages" / image_names.get(stem, f"{stem}.jpg")).as_posix()
            if file_name in listed:
                problems.append(Problem("listed_twice", f"{file_name} is listed twice", file=str(root)))
                continue
            listed.add(file_name)
            path = annotations.get(stem, folder / "Annotations" / f"{stem}.xml")
            seen.add(path)
            try:
                if stem not in annotations:
                    hint = voc._hint_at_name(stem, annotations)
                    raise DataError(f"no annotation {path.name[:100]!r}, but {one_split} lists it{hint}")
                annotation = voc._parse(path)
                columns = voc._Columns()
                voc._read_objects(annotation, path, root / file_name, columns)
            except DataError as error:
                problems.append(Problem("bad_annotation_file", _after(str(error), path), file=str(path)))
                continue
            ((height, width),) = columns.sizes
            images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
            for item in annotation.iterfind("object"):
                objects.append(_record(item, len(images), len(objects) + 1))
        # The classes are those of the whole folder, so a damaged file outside the split stops the reader too.
        for path in (path for path in annotations.values() if path not in seen):
            seen.add(path)
            try:
                names.update(voc._class_name(item, path) for item in voc._objects(voc._parse(path), path))
            except DataError as error:
                problems.append(Problem("bad_annotation_file", _after(str(error), path), file=str(path)))
    names.update(name for _, name in objects)
    class_names = voc.VOC_CLASSES if names <= set(voc.VOC_CLASSES) else tuple(sorted(names))
    category_id = {name: number for number, name in enumerate(class_names, start=1)}
    for record, name in objects:
        record["category_id"] = category_id[name]
    document: Record = {
        "images": images,
        "annotations": [record for record, _ in objects],
        "categories": [{"id": number, "name": name} for name, number in category_id.items()],
    }
    return CocoRecords(root, document, *document.values()), problems


def _after(message: str, path: Path) -> str:
    """Take the name of the file from the front of a message; a problem carries it apart."""
    return message.removeprefix(f"{path}: ")


def _record(item: ElementTree.Element, image_id: int, annotation_id: int) -> tuple[Record, str]:
    """Give an object that ``read_voc`` accepts as an annotation without its class, and the class."""
    xmin, ymin, xmax, ymax = (float(item.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax"))
    extent = 1 if xmax > xmin and ymax > ymin else 0
    box = [xmin - 1, ymin - 1, xmax - xmin + extent, ymax - ymin + extent]
    difficult = int((item.findtext("difficult") or "0").strip())
    record: Record = {"id": annotation_id, "image_id": image_id, "category_id": 0, "bbox": box}
    record |= {"area": box[2] * box[3], "iscrowd": 0, "difficult": difficult}
    return record, (item.findtext("name") or "").strip()
