"""Read folders in Pascal VOC's layout into an ``AnnotationTable``."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import usable_table
from resdet.data.coco_rules import CocoRecords, Problem, Record
from resdet.data.image_files import IMAGE_SUFFIXES
from resdet.data.images import read_size
from resdet.errors import DataError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 classes of VOC 2007 to 2012 in the order of the development kit."""

MAX_XML_BYTES = 8 * 2**20
"""Annotation files larger than this are refused; 8 MiB hold 25 000 objects."""

# What XML writers declare, by the names of Python's codecs. Others are left out because decoding them can be costly.
_ENCODINGS = ("utf-8", "ascii", "iso8859", "cp", "mac-", "koi8", "gb", "big5", "shift_jis", "euc_")
_MAX_CORNER = 2.0**31
"""Pixels. Far outside any image, and far too small for differences and products of corners to overflow."""

VOC_LAYOUT = "Annotations/*.xml, ImageSets/Main/<split>.txt and JPEGImages/*"
HOW_TO_GET_VOC = (
    "VOC is VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar from "
    "http://host.robots.ox.ac.uk/pascal/VOC, unpacked into one folder, which then holds VOCdevkit/VOC2007 and "
    f"VOCdevkit/VOC2012; such a folder, or one of your own, holds {VOC_LAYOUT}"
)

_Report = Callable[[str, str, Path], None]  # takes the kind of a problem, the message, and the file concerned


class _FileError(Exception):
    """Tells what is wrong with an annotation file, without its name."""


def read_voc(root: Path, split: str | Sequence[str], *, classes: Sequence[str] | None = None) -> AnnotationTable:
    """Read one or several splits of Pascal VOC, or of any folder laid out like it.

    VOC counts pixels from 1 and its corners are the first and the last pixel inside the object, so the box covers
    ``[xmin - 1, xmax] x [ymin - 1, ymax]`` in continuous coordinates and is ``xmax - xmin + 1`` wide.

    Classes are VOC's 20 in their usual order if every name in the annotations is one of them, otherwise the names in
    alphabetical order. Names are taken from all annotations of a folder, not only from the split's, so that ``train``
    and ``val``, read separately, agree on their labels.

    Boxes without extent (``xmax <= xmin`` or ``ymax <= ymin``) are left out, and the table's notes count them and name
    their images. Every other ``<object>`` is in the table, or the file is refused.

    Files may be in any encoding that they declare or mark by their first bytes, UTF-8 otherwise. Document types and
    entities are refused, so an annotation cannot expand without bound or include other files. A width or height that is
    0 or missing is read from the image.

    Args:
        root: The folder with Annotations, ImageSets and JPEGImages, or a folder above several such (VOCdevkit). The
            table's file names are relative to it.
        split: A list in ImageSets/Main (``"train"``); below a VOCdevkit with the folder before it
            (``"VOC2007/trainval"``). Several are joined: ``["VOC2007/trainval", "VOC2012/trainval"]`` is "07+12". Lists
            of one class (``"aeroplane_train"``) give all images that they name, including those without the class.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.

    Raises:
        DataError: If a folder, split or annotation is missing or damaged, if an image is listed twice, or if
            ``classes`` names an unknown class. The message names the file.

    Source: VOCdevkit, VOC2012 documentation section 3. The fields ``truncated``, ``occluded``, ``pose`` and ``part``
    are not used. Deviation: the kit's own overlap adds 1 to both sides of inclusive corners, which is the same width;
    detectron2 subtracts 1 from xmin and ymin only, as here; torchvision's VOC datasets subtract nothing.
    """

    def refuse(_kind: str, message: str, _file: Path) -> None:
        raise DataError(message)

    root, splits = Path(root), _as_list(split)
    records = _read_files(root, splits, refuse)
    name = f"{root} ({', '.join(splits)})"
    if not records.categories:
        raise DataError(f"{name}: none of the annotations holds an object, so there are no classes to learn")

    sound = [record for record in records.annotations if min(record["bbox"][2:]) > 0]
    flat = [record for record in records.annotations if min(record["bbox"][2:]) <= 0]
    moved = [record for record in sound if min(record["bbox"][:2]) < 0]
    odd = {
        "without extent (xmax <= xmin or ymax <= ymin) left out": flat,
        "with a corner at 0, though VOC counts pixels from 1; moved by 1 like the others": moved,
    }
    notes = []
    for what, found in odd.items():
        stems = [Path(records.images[record["image_id"] - 1]["file_name"]).stem for record in found]
        listed = ", ".join(stems[:5]) + (", ..." if len(stems) > 5 else "")
        if found:
            notes.append(f"{len(found)} {'box' if len(found) == 1 else 'boxes'} {what}: {listed}")
    for number, record in enumerate(sound, start=1):
        record["id"] = number
    table = replace(usable_table(replace(records, annotations=sound), name, difficult=True), notes=tuple(notes))
    return table if classes is None else table.select_classes(list(classes))


def voc_records(root: Path, split: str | Sequence[str]) -> tuple[CocoRecords, list[Problem]]:
    """Read splits as ``read_voc`` does, but continue after damaged files, and keep boxes without extent.

    The result is what a COCO json of the same content would hold, and a problem for each file that cannot be read.
    Annotations are numbered from 1 in the order of the split and carry ``difficult`` besides COCO's own keys. A missing
    folder or split raises a DataError all the same.
    """
    problems: list[Problem] = []

    def note(kind: str, message: str, file: Path) -> None:
        problems.append(Problem(kind, message.removeprefix(f"{file}: "), file=str(file)))

    return _read_files(Path(root), _as_list(split), note), problems


def _as_list(split: str | Sequence[str]) -> list[str]:
    return [split] if isinstance(split, str) else list(split)


def _read_files(root: Path, splits: list[str], report: _Report) -> CocoRecords:
    """Read the images of splits, and the class names in all annotations of their folders.

    Whatever is wrong with a file is reported; the file is left out if ``report`` returns. A missing folder or split
    raises a DataError.
    """
    if not splits:
        raise DataError(f"{root}: at least one split must be named")
    images: list[Record] = []
    objects: list[Record] = []
    listed: dict[str, str] = {}
    outside: dict[Path, None] = {}
    inside: set[Path] = set()
    for one_split in splits:
        *parents, list_name = one_split.split("/")
        folder = root.joinpath(*parents)
        _check_layout(folder, root)
        annotations = {path.stem: path for path in sorted((folder / "Annotations").glob("*.xml"))}
        outside.update(dict.fromkeys(annotations.values()))
        pictures = [path for path in (folder / "JPEGImages").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        pictures.sort(key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path.name), reverse=True)
        image_names = {path.stem: path.name for path in pictures}  # of several, the suffix that VOC would prefer
        for stem in _read_list(folder, list_name, annotations):
            file_name = (Path(*parents) / "JPEGImages" / image_names.get(stem, f"{stem}.jpg")).as_posix()
            if file_name in listed:
                where = f"in {listed[file_name]} and {one_split}"
                report("listed_twice", f"{root}: image {file_name} is listed twice, {where}", root)
                continue
            listed[file_name] = one_split
            if stem not in annotations:
                parent, name = folder / "Annotations", f"{stem}.xml"
                bare = Path(stem.replace("\\", "/").split()[0])
                is_path = bare.stem in annotations or bare.name in annotations
                hint = "; lists give names without folder and suffix, one a line" if is_path else ""
                message = f"{parent}: no annotation {name[:100]!r}, but {one_split} lists it{hint}"
                report("bad_annotation_file", message, parent / name)
                continue
            path = annotations[stem]
            inside.add(path)
            try:
                annotation = _parse(path)
                height, width = _size(annotation) or read_size(root / file_name)
                of_image = [_read_object(item) for item in _objects(annotation)]
            except (_FileError, DataError) as error:
                message = str(error) if isinstance(error, DataError) else f"{path}: {error}"
                report("bad_annotation_file", message, path)
                continue
            images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
            for record in of_image:
                objects.append({"id": len(objects) + 1, "image_id": len(images)} | record)
    names = {record["category_id"] for record in objects}
    for path in (path for path in outside if path not in inside):
        try:
            names.update(_class_name(item) for item in _objects(_parse(path)))
        except _FileError as error:
            report("bad_annotation_file", f"{path}: {error}", path)
    # A class of which a split has only boxes without extent is a class all the same: the other splits have it.
    class_names = VOC_CLASSES if names and names <= set(VOC_CLASSES) else sorted(names)
    category_id = {name: number for number, name in enumerate(class_names, start=1)}
    for record in objects:
        record["category_id"] = category_id[record["category_id"]]
    categories: list[Record] = [{"id": number, "name": name} for name, number in category_id.items()]
    document: Record = {"images": images, "annotations": objects, "categories": categories}
    return CocoRecords(root, document, images, objects, categories)


def _check_layout(folder: Path, root: Path) -> None:
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        if (folder / part).is_dir():
            continue
        children = sorted(root.glob("*")) + sorted(root.glob("VOCdevkit/*"))
        below = [path for path in children if (path / "Annotations").is_dir() and (path / "ImageSets/Main").is_dir()]
        if below and folder == root:
            found = ", ".join(path.relative_to(root).as_posix() for path in below)
            raise DataError(f"{folder}: has no {part}; below it lie {found}: name the split as <folder>/<split>")
        raise DataError(f"{folder / part}: no such folder. {HOW_TO_GET_VOC}")


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
    lines = [line.strip() for line in text.splitlines()]
    # "000012  1" in the lists of one class; a name may itself end in " 1", so the whole line is tried first.
    stems = [line if line in annotations else re.sub(r"\s+(-1|0|1)$", "", line) for line in lines if line]
    if not stems:
        raise DataError(f"{path}: lists no images")
    return stems


def _decode(data: bytes) -> str:
    """Decode by the byte order mark, else by XML's declaration, else as UTF-8.

    The text that is checked for entities is thus the one that the parser sees.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    declared = re.match(rb"""\s*<\?xml[^>]{,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""", data)
    encoding = "utf-8-sig"
    # A declaration that can be read byte by byte is not UTF-16: some writers declare that and save as UTF-8.
    if declared and not declared[1].lower().startswith((b"utf-16", b"utf16")):
        encoding = declared[1].decode()
        name = codecs.lookup(encoding).name
        if not name.startswith(_ENCODINGS):
            raise LookupError(f"encoding {encoding} is not among those read; save it as UTF-8")
    return data.decode(encoding)


def _parse(path: Path) -> ElementTree.Element:
    try:
        if not path.is_file():
            raise _FileError("not a file")
        size = path.stat().st_size
        if size > MAX_XML_BYTES:
            raise _FileError(f"refused: an annotation may have at most {MAX_XML_BYTES} bytes, got {size}")
        text = _decode(path.read_bytes())
    except OSError as error:
        raise _FileError(f"cannot be read: {error.strerror}") from error
    except (UnicodeError, LookupError) as error:
        raise _FileError(f"cannot be read as text: {error}") from error
    if not text.strip():
        raise _FileError("the file is empty")
    # Entities can grow without bound and name other files; an annotation needs none.
    for declaration in ("<!DOCTYPE", "<!ENTITY"):
        if declaration in text:
            raise _FileError(f"refused: an annotation must be plain XML without {declaration}")
    try:
        element = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _FileError(f"not well-formed XML: {error}") from error
    if element.tag != "annotation":
        raise _FileError(f"the outermost element must be <annotation>, got <{element.tag[:80]}>")
    return element


def _objects(annotation: ElementTree.Element) -> list[ElementTree.Element]:
    objects = annotation.findall("object")
    num_inside = sum(1 for _ in annotation.iter("object"))
    if num_inside != len(objects):
        nested = f"{num_inside - len(objects)} of {num_inside}"
        raise _FileError(f"every <object> must stand directly in <annotation>, but {nested} do not")
    return objects


def _read_object(item: ElementTree.Element) -> Record:
    """Read an object as a COCO annotation without ids, with its class name for the category.

    This is the one place where VOC's corners become this package's boxes. A box without extent gets the sides
    ``xmax - xmin`` and ``ymax - ymin``, of which one is zero or negative.
    """
    name = _class_name(item)
    corners = _child(item, "bndbox")
    if corners is None:
        raise _FileError(f"the object {name!r} has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(corners, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    difficult = _text(item, "difficult") or "0"
    if difficult not in ("0", "1"):
        raise _FileError(f"<difficult> must be 0 or 1, got {difficult[:80]!r}")
    last = 1 if xmax > xmin and ymax > ymin else 0  # the last pixel is inside the object
    box = [xmin - 1, ymin - 1, xmax - xmin + last, ymax - ymin + last]
    return {"category_id": name, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "difficult": int(difficult)}


def _size(annotation: ElementTree.Element) -> tuple[int, int] | None:
    """Return ``(height, width)``, or None where a side is missing or 0."""
    size = _child(annotation, "size")
    if size is None or not _text(size, "width") or not _text(size, "height"):
        return None
    height, width = (_number(size, tag) for tag in ("height", "width"))
    for tag, side in (("height", height), ("width", width)):
        if side != int(side) or not 0 <= side < 2**31:
            raise _FileError(f"<{tag}> must be a whole number of pixels, got {_text(size, tag)[:80]!r}")
    # Some tools write zeros where they did not open the image.
    return (int(height), int(width)) if height and width else None


def _child(item: ElementTree.Element, tag: str) -> ElementTree.Element | None:
    found = item.findall(tag)
    if len(found) > 1:
        raise _FileError(f"<{item.tag}> must have one <{tag}>, got {len(found)}")
    return found[0] if found else None


def _text(item: ElementTree.Element, tag: str) -> str:
    """Return the text of an item's element ``tag``, "" where either is missing."""
    child = _child(item, tag)
    if child is not None and len(child):
        raise _FileError(f"<{tag}> must hold text alone, got <{child[0].tag[:80]}> in it")
    return ((child.text if child is not None else None) or "").strip()


def _class_name(item: ElementTree.Element) -> str:
    name = _text(item, "name")
    if not name:
        raise _FileError("<object> has no <name>")
    if len(name.splitlines()) > 1 or len(name) > 200:
        shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}... ({len(name)} characters)"
        raise _FileError(f"<name> must be one line of at most 200 characters, got {shown}")
    return name


def _number(item: ElementTree.Element, tag: str) -> float:
    text = _text(item, tag)
    if not text:
        raise _FileError(f"<{item.tag}> has no <{tag}>")
    try:
        # float() alone would read "1_0" too.
        number = math.nan if "_" in text else float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= _MAX_CORNER:
        raise _FileError(f"<{tag}> must be a number of pixels up to 2**31, got {text[:80]!r}")
    return number
