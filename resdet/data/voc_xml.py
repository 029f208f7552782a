"""Read one annotation file in Pascal VOC's XML."""

from __future__ import annotations

import math
import os
from pathlib import Path
from xml.etree import ElementTree

from resdet.data.coco_rules import Record
from resdet.data.names import decode_text, same_form

MAX_XML_BYTES = 8 * 2**20
"""Annotation files larger than this are refused; 8 MiB hold 25 000 objects."""

_MAX_CORNER = 2.0**31
"""Pixels. Far outside any image, and far too small for differences and products of corners to overflow."""

_FLAGS = {"": False, "false": False, "no": False, "true": True, "yes": True}


class AnnotationFileError(Exception):
    """Tells what is wrong with an annotation file, without its name."""


def parse_annotation(path: Path) -> ElementTree.Element:
    """Return the outermost element of a file; raise an AnnotationFileError if it is damaged or no annotation."""
    try:
        if not os.path.isfile(path):
            raise AnnotationFileError("not a file")
        size = path.stat().st_size
        if size > MAX_XML_BYTES:
            raise AnnotationFileError(f"refused: an annotation may have at most {MAX_XML_BYTES} bytes, got {size}")
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise AnnotationFileError(f"cannot be read: {error.strerror}") from error
    except (UnicodeError, LookupError) as error:
        raise AnnotationFileError(f"cannot be read as text: {error}") from error
    if not text.strip():
        raise AnnotationFileError("the file is empty")
    # Entities can grow without bound and name other files; an annotation needs none.
    for declaration in ("<!DOCTYPE", "<!ENTITY"):
        if declaration in text:
            raise AnnotationFileError(f"refused: an annotation must be plain XML without {declaration}")
    try:
        element = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise AnnotationFileError(f"not well-formed XML: {error}") from error
    if element.tag != "annotation":
        raise AnnotationFileError(f"the outermost element must be <annotation>, got <{element.tag[:80]}>")
    return element


def objects_of(annotation: ElementTree.Element) -> list[ElementTree.Element]:
    """Return the objects of an annotation; raise an AnnotationFileError if some stand where no reader finds them."""
    objects = annotation.findall("object")
    num_inside = sum(1 for _ in annotation.iter("object"))
    if num_inside != len(objects):
        nested = f"{num_inside - len(objects)} of {num_inside}"
        raise AnnotationFileError(f"every <object> must stand directly in <annotation>, but {nested} do not")
    return objects


def read_object(item: ElementTree.Element) -> Record:
    """Read an object as a COCO annotation without ids, with its class name for the category.

    This is the one place where VOC's corners become this package's boxes. A box without extent gets the sides
    ``xmax - xmin`` and ``ymax - ymin``, of which one is zero or negative. An object is difficult only if the file
    clearly says so (``unclear_difficult``).
    """
    name = class_name(item)
    corners = _child(item, "bndbox")
    if corners is None:
        raise AnnotationFileError(f"the object {name!r} has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(corners, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    difficult = _flag(_text(item, "difficult"))
    last = 1 if xmax > xmin and ymax > ymin else 0  # the last pixel is inside the object
    box = [xmin - 1, ymin - 1, xmax - xmin + last, ymax - ymin + last]
    return {"category_id": name, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "difficult": int(difficult or 0)}


def unclear_difficult(item: ElementTree.Element) -> str:
    """Return the text of an object's ``<difficult>`` if it is neither yes nor no (``Unspecified``), else ""."""
    text = _text(item, "difficult")
    return text[:80] if _flag(text) is None else ""


def _flag(text: str) -> bool | None:
    """Return what ``0``, ``1.0``, ``False``, ``yes`` or nothing says, None for what is neither."""
    try:
        return {0.0: False, 1.0: True}.get(float(text))
    except ValueError:
        return _FLAGS.get(text.casefold())


def stated_size(annotation: ElementTree.Element) -> tuple[int, int] | None:
    """Return ``(height, width)``, or None where a side is missing or 0."""
    size = _child(annotation, "size")
    if size is None or not _text(size, "width") or not _text(size, "height"):
        return None
    height, width = (_number(size, tag) for tag in ("height", "width"))
    for tag, side in (("height", height), ("width", width)):
        if side != int(side) or not 0 <= side < 2**31:
            raise AnnotationFileError(f"<{tag}> must be a whole number of pixels, got {_text(size, tag)[:80]!r}")
    # Some tools write zeros where they did not open the image.
    return (int(height), int(width)) if height and width else None


def _child(item: ElementTree.Element, tag: str) -> ElementTree.Element | None:
    found = item.findall(tag)
    if len(found) > 1:
        raise AnnotationFileError(f"<{item.tag}> must have one <{tag}>, got {len(found)}")
    return found[0] if found else None


def _text(item: ElementTree.Element, tag: str) -> str:
    """Return the text of an item's element ``tag``, "" where either is missing."""
    child = _child(item, tag)
    if child is not None and len(child):
        raise AnnotationFileError(f"<{tag}> must hold text alone, got <{child[0].tag[:80]}> in it")
    return ((child.text if child is not None else None) or "").strip()


def class_name(item: ElementTree.Element) -> str:
    """Return the class of an object in composed Unicode; raise an AnnotationFileError if it is none."""
    name = _text(item, "name")
    if not name:
        raise AnnotationFileError("<object> has no <name>")
    if len(name.splitlines()) > 1 or len(name) > 200:
        shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}... ({len(name)} characters)"
        raise AnnotationFileError(f"<name> must be one line of at most 200 characters, got {shown}")
    return same_form(name)


def _number(item: ElementTree.Element, tag: str) -> float:
    text = _text(item, tag)
    if not text:
        raise AnnotationFileError(f"<{item.tag}> has no <{tag}>")
    try:
        # float() alone would read "1_0" too.
        number = math.nan if "_" in text else float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= _MAX_CORNER:
        raise AnnotationFileError(f"<{tag}> must be a number of pixels up to 2**31, got {text[:80]!r}")
    return number
