"""Folders in Pascal VOC's layout -> ``AnnotationTable``."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from resdet.data.annotations import AnnotationTable, FileNames
from resdet.data.images import IMAGE_SUFFIXES, read_size
from resdet.errors import DataError
from resdet.types import Category

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 classes of VOC 2007 to 2012 in the order of the development kit."""

MAX_XML_BYTES = 8 * 2**20
"""Annotations of one image are refused above this size; 8 MiB hold 25 000 objects."""

# What writers of XML declare, by the names of Python's codecs. Others are left out for what decoding them can cost.
_ENCODINGS = ("utf-8", "ascii", "iso8859", "cp", "mac-", "koi8", "gb", "big5", "shift_jis", "euc_")
_MAX_CORNER = 2.0**31
"""Pixels. Far outside any image, and far below where differences and products of corners overflow."""

VOC_LAYOUT = "Annotations/*.xml, ImageSets/Main/<split>.txt and JPEGImages/*"
HOW_TO_GET_VOC = (
    "VOC is VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar from "
    "http://host.robots.ox.ac.uk/pascal/VOC, unpacked into one folder, which then holds VOCdevkit/VOC2007 and "
    f"VOCdevkit/VOC2012; such a folder, or one of your own, holds {VOC_LAYOUT}"
)


@dataclass
class _Columns:
    """What becomes the table, as it grows; rows of numbers rather than an object per box."""

    file_names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    names_left_out: set[str] = field(default_factory=set)
    difficult: list[bool] = field(default_factory=list)
    degenerate: list[str] = field(default_factory=list)
    zero_based: list[str] = field(default_factory=list)


def read_voc(root: Path, split: str | Sequence[str], *, classes: Sequence[str] | None = None) -> AnnotationTable:
    """Read one or several splits of Pascal VOC, or of any folder laid out like it.

    This is the one place where VOC's corners become this package's boxes. VOC counts pixels from 1 and its corners
    are the first and the last pixel inside the object, so the box covers ``[xmin - 1, xmax] x [ymin - 1, ymax]`` in
    continuous coordinates and is ``xmax - xmin + 1`` wide.

    Classes are VOC's 20 in their usual order if every name in the annotations is one of them, otherwise the names in
    alphabetical order. Names are taken from all of a folder's annotations, not from the split alone: ``train`` and
    ``val``, read one after the other, agree on their labels.

    Boxes without extent (``xmax <= xmin`` or ``ymax <= ymin``) are left out, and the table's notes count them and name
    their images. Every other ``<object>`` is in the table, or the file is refused.

    Files may be in any encoding that they declare or begin with the mark of, UTF-8 otherwise. Document types and
    entities are refused, so an annotation cannot expand or reach for other files. A width or height that is 0 or
    missing is read from the image.

    Args:
        root: The folder with Annotations, ImageSets and JPEGImages, or a folder above several such (VOCdevkit). The
            table's file names are relative to it.
        split: A list in ImageSets/Main (``"train"``); below a VOCdevkit with the folder before it
            (``"VOC2007/trainval"``). Several are joined: ``["VOC2007/trainval", "VOC2012/trainval"]`` is "07+12". Lists
            of one class (``"aeroplane_train"``) give all the images they name, those without the class too.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.

    Raises:
        DataError: If a folder, split or annotation is missing or damaged, if an image is listed twice, if ``classes``
            names an unknown class. The message names the file.

    Source: VOCdevkit, VOC2012 documentation section 3; of the fields, ``truncated``, ``occluded``, ``pose`` and
    ``part`` are not used. Deviation: the kit's own overlap adds 1 to both sides of inclusive corners, which is the same
    width; detectron2 subtracts 1 from xmin and ymin only, as here; torchvision's VOC datasets subtract nothing.
    """
    root = Path(root)
    splits = [split] if isinstance(split, str) else list(split)
    if not splits:
        raise DataError(f"{root}: at least one split must be named")
    columns = _Columns()
    names_of_folder: dict[Path, set[str]] = {}
    listed: dict[str, str] = {}
    for one_split in splits:
        *parents, list_name = one_split.split("/")
        folder = root.joinpath(*parents)
        _check_layout(folder, root)
        annotations = {path.stem: path for path in (folder / "Annotations").glob("*.xml")}
        images = _images_by_stem(folder / "JPEGImages")
        stems = _read_list(folder, list_name, annotations)
        for stem in stems:
            file_name = (Path(*parents) / "JPEGImages" / images.get(stem, f"{stem}.jpg")).as_posix()
            if file_name in listed:
                raise DataError(f"{root}: image {file_name} is listed twice, in {listed[file_name]} and {one_split}")
            listed[file_name] = one_split
            if stem not in annotations:
                raise DataError(
                    f"{folder / 'Annotations'}: no annotation {f'{stem}.xml'[:100]!r}, but {one_split} lists it"
                    + _hint_at_name(stem, annotations)
                )
            columns.file_names.append(file_name)
            _read_objects(_parse(annotations[stem]), annotations[stem], root / file_name, columns)
        if folder not in names_of_folder:
            inside = set(stems)
            outside = (path for stem, path in annotations.items() if stem not in inside)
            names_of_folder[folder] = {
                _class_name(item, path) for path in outside for item in _objects(_parse(path), path)
            }
    # A class of which this split has only boxes without extent is a class all the same: the other splits have it.
    names = set(columns.names).union(columns.names_left_out, *names_of_folder.values())
    table = _to_table(columns, names, f"{root} ({', '.join(splits)})")
    return table if classes is None else table.select_classes(list(classes))


def _to_table(columns: _Columns, names: set[str], name: str) -> AnnotationTable:
    if not names:
        raise DataError(f"{name}: none of the annotations holds an object, so there are no classes to learn")
    class_names = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    label_of = {class_name: label for label, class_name in enumerate(class_names, start=1)}
    num_boxes = len(columns.names)
    xmin, ymin, xmax, ymax = np.array(columns.corners, dtype=np.float64).reshape(num_boxes, 4).T
    boxes_xywh = np.stack([xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1], axis=1)
    return AnnotationTable(
        name=name,
        categories=tuple(Category(label, label, class_name) for class_name, label in label_of.items()),
        image_ids=np.arange(1, len(columns.file_names) + 1, dtype=np.int64),
        file_names=FileNames(columns.file_names),
        sizes=np.array(columns.sizes, dtype=np.int32).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(columns.counts)]).astype(np.int64),
        boxes_xywh=boxes_xywh,
        labels=np.array([label_of[class_name] for class_name in columns.names], dtype=np.int64),
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        difficult=np.array(columns.difficult, dtype=np.bool_),
        annotation_ids=np.arange(1, num_boxes + 1, dtype=np.int64),
        notes=tuple(
            f"{len(where)} {'box' if len(where) == 1 else 'boxes'} {what}: {', '.join(where[:5])}"
            + (", ..." if len(where) > 5 else "")
            for what, where in (
                ("without extent (xmax <= xmin or ymax <= ymin) left out", columns.degenerate),
                ("with a corner at 0, though VOC counts pixels from 1; moved by 1 like the others", columns.zero_based),
            )
            if where
        ),
    )


def _check_layout(folder: Path, root: Path) -> None:
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        if (folder / part).is_dir():
            continue
        below = [child for child in sorted(root.glob("*")) + sorted(root.glob("VOCdevkit/*")) if _is_voc(child)]
        if below and folder == root:
            found = ", ".join(child.relative_to(root).as_posix() for child in below)
            raise DataError(f"{folder}: has no {part}; below it lie {found}: name the split as <folder>/<split>")
        raise DataError(f"{folder / part}: no such folder. {HOW_TO_GET_VOC}")


def _is_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "ImageSets" / "Main").is_dir()


def _images_by_stem(folder: Path) -> dict[str, str]:
    """Give the file name of each image by its stem; of several, the one whose suffix VOC would prefer."""
    rank = {suffix: position for position, suffix in enumerate(IMAGE_SUFFIXES)}
    images: dict[str, str] = {}
    for path in folder.iterdir():
        suffix = path.suffix.lower()
        if suffix not in rank:
            continue
        other = images.get(path.stem)
        if other is None or rank[suffix] < rank[Path(other).suffix.lower()]:
            images[path.stem] = path.name
    return images


def _read_list(folder: Path, list_name: str, annotations: dict[str, Path]) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{list_name}.txt"
    if not path.is_file():
        found = sorted(other.stem for other in path.parent.glob("*.txt"))
        whole = [name for name in found if "_" not in name or name.rsplit("_", 1)[0] not in VOC_CLASSES]
        raise DataError(f"{path}: no such split; {path.parent} has {', '.join(whole) or 'none'}")
    try:
        text = _decode(path.read_bytes())
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    stems = []
    for line in text.splitlines():
        stem = line.strip()
        # "000012  1" in the lists of one class; a name may itself end in " 1", so the whole line is tried first.
        if stem not in annotations:
            stem = re.sub(r"\s+(-1|0|1)$", "", stem)
        if stem:
            stems.append(stem)
    if not stems:
        raise DataError(f"{path}: lists no images")
    return stems


def _hint_at_name(stem: str, annotations: Collection[str]) -> str:
    bare = Path(stem.replace("\\", "/").split()[0])
    if bare.stem in annotations or bare.name in annotations:
        return "; lists give names without folder and suffix, one a line"
    return ""


def _decode(data: bytes) -> str:
    """Decode by the byte order mark, else by XML's declaration, else as UTF-8.

    What is checked for entities is then the very text that the parser sees.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    declared = re.match(rb"""\s*<\?xml[^>]{,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""", data)
    encoding = "utf-8-sig"
    # A declaration readable byte by byte cannot stand in UTF-16: some writers declare it and save as UTF-8.
    if declared and not declared[1].lower().startswith((b"utf-16", b"utf16")):
        encoding = declared[1].decode()
        name = codecs.lookup(encoding).name
        if not name.startswith(_ENCODINGS):
            raise LookupError(f"encoding {encoding} is not among those read; save it as UTF-8")
    return data.decode(encoding)


def _parse(path: Path) -> ElementTree.Element:
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file")
        size = path.stat().st_size
        if size > MAX_XML_BYTES:
            raise DataError(f"{path}: refused: an annotation may have at most {MAX_XML_BYTES} bytes, got {size}")
        text = _decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeError, LookupError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    # Entities can grow without bound and name other files; an annotation needs none.
    for declaration in ("<!DOCTYPE", "<!ENTITY"):
        if declaration in text:
            raise DataError(f"{path}: refused: an annotation must be plain XML without {declaration}")
    try:
        element = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: not well-formed XML: {error}") from error
    if element.tag != "annotation":
        raise DataError(f"{path}: the outermost element must be <annotation>, got <{element.tag[:80]}>")
    return element


def _objects(annotation: ElementTree.Element, path: Path) -> list[ElementTree.Element]:
    objects = annotation.findall("object")
    num_inside = sum(1 for _ in annotation.iter("object"))
    if num_inside != len(objects):
        raise DataError(
            f"{path}: every <object> must stand directly in <annotation>, but {num_inside - len(objects)} of "
            f"{num_inside} do not"
        )
    return objects


def _child(item: ElementTree.Element, tag: str, path: Path) -> ElementTree.Element | None:
    found = item.findall(tag)
    if len(found) > 1:
        raise DataError(f"{path}: <{item.tag}> must have one <{tag}>, got {len(found)}")
    return found[0] if found else None


def _text(item: ElementTree.Element, tag: str, path: Path) -> str:
    """Give the text in an item's element ``tag``, "" where either is missing."""
    child = _child(item, tag, path)
    if child is not None and len(child):
        raise DataError(f"{path}: <{tag}> must hold text alone, got <{child[0].tag[:80]}> in it")
    return ((child.text if child is not None else None) or "").strip()


def _class_name(item: ElementTree.Element, path: Path) -> str:
    name = _text(item, "name", path)
    if not name:
        raise DataError(f"{path}: <object> has no <name>")
    if len(name.splitlines()) > 1 or len(name) > 200:
        shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}... ({len(name)} characters)"
        raise DataError(f"{path}: <name> must be one line of at most 200 characters, got {shown}")
    return name


def _number(item: ElementTree.Element, tag: str, path: Path) -> float:
    text = _text(item, tag, path)
    if not text:
        raise DataError(f"{path}: <{item.tag}> has no <{tag}>")
    try:
        # Python alone would read "1_0" too.
        number = math.nan if "_" in text else float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= _MAX_CORNER:
        raise DataError(f"{path}: <{tag}> must be a number of pixels up to 2**31, got {text[:80]!r}")
    return number


def _read_size(annotation: ElementTree.Element, path: Path, image_path: Path) -> tuple[int, int]:
    size = _child(annotation, "size", path)
    if size is None or not _text(size, "width", path) or not _text(size, "height", path):
        return read_size(image_path)
    height, width = (_number(size, tag, path) for tag in ("height", "width"))
    for tag, side in (("height", height), ("width", width)):
        if side != int(side) or not 0 <= side < 2**31:
            raise DataError(f"{path}: <{tag}> must be a whole number of pixels, got {_text(size, tag, path)[:80]!r}")
    # Some tools leave zeros where they did not open the image.
    return (int(height), int(width)) if height and width else read_size(image_path)


def _read_objects(annotation: ElementTree.Element, path: Path, image_path: Path, columns: _Columns) -> None:
    columns.sizes.append(_read_size(annotation, path, image_path))
    num_kept = 0
    for item in _objects(annotation, path):
        name = _class_name(item, path)
        box = _child(item, "bndbox", path)
        if box is None:
            raise DataError(f"{path}: the object {name!r} has no <bndbox>")
        xmin, ymin, xmax, ymax = (_number(box, tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = _text(item, "difficult", path) or "0"
        if difficult not in ("0", "1"):
            raise DataError(f"{path}: <difficult> must be 0 or 1, got {difficult[:80]!r}")
        if xmax <= xmin or ymax <= ymin:
            columns.degenerate.append(path.stem)
            columns.names_left_out.add(name)
            continue
        if xmin < 1 or ymin < 1:
            columns.zero_based.append(path.stem)
        columns.corners.append((xmin, ymin, xmax, ymax))
        columns.names.append(name)
        columns.difficult.append(difficult == "1")
        num_kept += 1
    columns.counts.append(num_kept)
