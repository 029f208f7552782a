"""Read folders in Pascal VOC's layout into an ``AnnotationTable``."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import usable_table
from resdet.data.coco_rules import CocoRecords, Problem, Record
from resdet.data.image_files import ImageFolder, name_fault
from resdet.data.images import read_size
from resdet.data.names import IMAGE_SUFFIXES, SPLITS, is_file, is_hidden, list_folder, read_text, same_form
from resdet.data.voc_xml import (
    AnnotationFileError,
    class_name,
    objects_of,
    parse_annotation,
    read_object,
    stated_size,
    unclear_difficult,
)
from resdet.errors import DataError, shortened

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 classes of VOC 2007 to 2012 in the order of the development kit."""

UNCLEAR_DIFFICULT, OTHER_UNICODE_FORM = "unclear_difficult", "other_unicode_form"
"""The kinds of problems that are no errors."""

_LISTS = "ImageSets/Main"
_IMAGE_FOLDERS = ("jpegimages", "images", "imgs")  # beside Annotations
VOC_LAYOUT = f"Annotations/*.xml, {_LISTS}/<split>.txt and JPEGImages/*"
HOW_TO_GET_VOC = (
    "VOC is VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar from "
    "http://host.robots.ox.ac.uk/pascal/VOC, unpacked into one folder, which then holds VOCdevkit/VOC2007 and "
    f"VOCdevkit/VOC2012; such a folder, or one of your own, holds {VOC_LAYOUT}"
)

_Report = Callable[[str, str, Path], None]  # takes the kind of a problem, the message, and the file concerned


def read_voc(root: Path, split: str | Sequence[str] | None, *, classes: Sequence[str] | None = None) -> AnnotationTable:
    """Read one or several splits of Pascal VOC, or of any folder laid out like it.

    VOC counts pixels from 1 and its corners are the first and the last pixel inside the object, so the box covers
    ``[xmin - 1, xmax] x [ymin - 1, ymax]`` in continuous coordinates and is ``xmax - xmin + 1`` wide.

    Classes are those of labelmap.txt, which CVAT and datumaro write, in its order, and after them others that the
    annotations name; without that file VOC's 20 in their usual order if every name in the annotations is one of them,
    otherwise the names in alphabetical order. Names are taken from all annotations of a folder, not only from the
    split's, so that ``train`` and ``val``, read separately, agree on their labels; of its subfolders, from those that
    the split's images lie in.

    A folder without ImageSets is read too, as Roboflow, Label Studio and labelImg leave it: every annotation at any
    depth, with the image of the same name beside it, or in JPEGImages or images beside its Annotations.

    Hidden files are skipped. Names in lists may differ from the disk's in Unicode's form (``ImageFolder.find``). An
    object is difficult if ``<difficult>`` is 1, 1.0, true or yes; the table's notes count texts that are neither yes
    nor no, such as converters' ``Unspecified``, which are taken for no.

    Boxes without extent (``xmax <= xmin`` or ``ymax <= ymin``) are left out, and the table's notes count them and name
    their images. Every other ``<object>`` is in the table, or the file is refused.

    Files may be in any encoding that they declare or mark by their first bytes, UTF-8 otherwise. Document types and
    entities are refused, so an annotation cannot expand without bound or include other files. A width or height that is
    0 or missing is read from the image.

    Args:
        root: The folder with Annotations, ImageSets and JPEGImages, or a folder above several such (VOCdevkit). The
            table's file names are relative to it.
        split: A list in ImageSets/Main (``"train"``) of names without suffix (``000012``, ``sub/000012``); below a
            VOCdevkit with the folder before it (``"VOC2007/trainval"``). Several are joined: ``["VOC2007/trainval",
            "VOC2012/trainval"]`` is "07+12". Lists of one class (``"aeroplane_train"``) give all images that they name,
            including those without the class. In a folder without ImageSets it names a subfolder, such as Roboflow's
            train and valid; None takes the whole folder.
        classes: Names of the classes to keep, labelled 1..len(classes) in this order; all of them if ``None``.

    Raises:
        DataError: If a folder, split or annotation is missing or damaged, if an image is listed twice, or if
            ``classes`` names an unknown class. The message names the file.

    Source: VOCdevkit, VOC2012 documentation section 3. The fields ``truncated``, ``occluded``, ``pose`` and ``part``
    are not used. Deviation: the kit's own overlap adds 1 to both sides of inclusive corners, which is the same width;
    detectron2 subtracts 1 from xmin and ymin only, as here; torchvision's VOC datasets subtract nothing.
    """
    unclear: list[Path] = []

    def refuse(kind: str, message: str, file: Path) -> None:
        if kind == UNCLEAR_DIFFICULT:
            unclear.append(file)
        elif kind != OTHER_UNICODE_FORM:
            raise DataError(message)

    root = Path(root)
    records = _read_files(root, _as_list(split), refuse)
    name = voc_name(root, split)
    if not records.categories:
        raise DataError(f"{name}: none of the annotations holds an object, so there are no classes to learn")

    sound = [record for record in records.annotations if min(record["bbox"][2:]) > 0]
    flat = [record for record in records.annotations if min(record["bbox"][2:]) <= 0]
    moved = [record for record in sound if min(record["bbox"][:2]) < 0]

    def stems(found: list[Record]) -> list[str]:
        return [Path(records.images[record["image_id"] - 1]["file_name"]).stem for record in found]

    notes = (
        *_note("without extent (xmax <= xmin or ymax <= ymin) left out", stems(flat)),
        *_note("with a corner at 0, though VOC counts pixels from 1; moved by 1 like the others", stems(moved)),
        *_note("whose <difficult> is neither yes nor no, taken as not difficult", [file.stem for file in unclear]),
    )
    for number, record in enumerate(sound, start=1):
        record["id"] = number
    table = replace(usable_table(replace(records, annotations=sound), name, difficult=True), notes=notes)
    return table if classes is None else table.select_classes(list(classes))


def _note(what: str, stems: list[str]) -> list[str]:
    """Return a line on boxes, with the names of their images, or none where there are none."""
    listed = ", ".join(stems[:5]) + (", ..." if len(stems) > 5 else "")
    return [f"{len(stems)} {'box' if len(stems) == 1 else 'boxes'} {what}: {listed}"] if stems else []


def voc_name(root: Path, split: str | Sequence[str] | None) -> str:
    """Return what messages call splits of a folder."""
    return f"{root} ({', '.join(_as_list(split) or [])})" if split else str(root)


def voc_records(root: Path, split: str | Sequence[str] | None) -> tuple[CocoRecords, list[Problem]]:
    """Read splits as ``read_voc`` does, but continue after damaged files, and keep boxes without extent.

    The result is what a COCO json of the same content would hold, and a problem for each file that cannot be read.
    Annotations are numbered from 1 in the order of the split and carry ``difficult`` besides COCO's own keys. A missing
    folder or split raises a DataError all the same.
    """
    problems: list[Problem] = []

    def note(kind: str, message: str, file: Path) -> None:
        problems.append(Problem(kind, message.removeprefix(f"{file}: "), file=str(file)))

    return _read_files(Path(root), _as_list(split), note), problems


def _as_list(split: str | Sequence[str] | None) -> list[str] | None:
    return [split] if isinstance(split, str) else None if split is None else list(split)


def _read_files(root: Path, splits: list[str] | None, report: _Report) -> CocoRecords:
    """Read the images of splits, and the class names in all annotations of their folders.

    Whatever is wrong with a file is reported; the file is left out if ``report`` returns. A missing folder or split
    raises a DataError.
    """
    if splits == []:
        raise DataError(f"{root}: at least one split must be named")
    images: list[Record] = []
    objects: list[Record] = []
    outside: dict[Path, None] = {}
    inside: set[Path] = set()
    listed = _loose_images(root, splits, outside)
    for path, file_name in _listed_images(root, splits or [], outside, report) if listed is None else listed:
        inside.add(path)
        try:
            annotation = parse_annotation(path)
            height, width = stated_size(annotation) or read_size(root / file_name)
            items = objects_of(annotation)
            of_image = [read_object(item) for item in items]
        except (AnnotationFileError, DataError) as error:
            message = str(error) if isinstance(error, DataError) else f"{path}: {error}"
            report("bad_annotation_file", message, path)
            continue
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for item, record in zip(items, of_image, strict=True):
            objects.append({"id": len(objects) + 1, "image_id": len(images)} | record)
            if text := unclear_difficult(item):
                what = f"object {objects[-1]['id']}: <difficult> {text!r} is taken as 0"
                report(UNCLEAR_DIFFICULT, f"{path}: {what}", path)
    names = {record["category_id"] for record in objects}
    for path in (path for path in outside if path not in inside):
        try:
            names.update(class_name(item) for item in objects_of(parse_annotation(path)))
        except AnnotationFileError as error:
            report("bad_annotation_file", f"{path}: {error}", path)
    # A class of which a split has only boxes without extent is a class all the same: the other splits have it.
    folders = [root, *(root.joinpath(*split.split("/")[:-1]) for split in splits or [])]
    category_id = {name: number for number, name in enumerate(_class_names(names, folders), start=1)}
    for record in objects:
        record["category_id"] = category_id[record["category_id"]]
    categories: list[Record] = [{"id": number, "name": name} for name, number in category_id.items()]
    document: Record = {"images": images, "annotations": objects, "categories": categories}
    return CocoRecords(root, document, images, objects, categories)


def _listed_images(
    root: Path, splits: list[str], outside: dict[Path, None], report: _Report
) -> Iterator[tuple[Path, str]]:
    """Yield the annotation and the file name of each image in lists; ``outside`` receives all annotations there."""
    listed: dict[str, str] = {}
    for one_split in splits:
        *parents, list_name = one_split.split("/")
        folder = root.joinpath(*parents)
        _check_layout(folder, root)
        annotations = ImageFolder(folder / "Annotations", (".xml",))
        pictures = ImageFolder(folder / "JPEGImages", IMAGE_SUFFIXES)
        stems = _read_list(folder, list_name, annotations)
        for subfolder in ("", *sorted({os.path.dirname(stem) for stem in stems if not name_fault(stem)} - {""})):
            outside.update((annotations.root / subfolder / name, None) for name in annotations.files(subfolder))
        for stem in stems:
            try:
                xml_name = None if name_fault(stem) else annotations.find(stem)
                image_name = (xml_name and pictures.find(stem)) or f"{stem}.jpg"
            except DataError as error:
                report("bad_annotation_file", str(error), folder)
                continue
            file_name = (Path(*parents) / "JPEGImages" / image_name).as_posix()
            if file_name in listed:
                where = f"in {listed[file_name]} and {one_split}"
                report("listed_twice", f"{root}: image {file_name} is listed twice, {where}", root)
                continue
            listed[file_name] = one_split
            if xml_name is None:
                report(*_no_annotation(annotations, stem, one_split))
                continue
            path = annotations.root / xml_name
            for found in (path, root / file_name):
                if found.stem != os.path.basename(stem):
                    what = f"{one_split} lists {stem!a}, the disk has {found.stem!a}"
                    report(OTHER_UNICODE_FORM, f"{found}: {what}", found)
            yield path, file_name


def _loose_images(root: Path, splits: list[str] | None, outside: dict[Path, None]) -> list[tuple[Path, str]] | None:
    """Return annotations and file names of a folder without lists, None if it has lists or no such subfolders.

    ``outside`` receives all annotations of the folder.
    """
    lists = ImageFolder(root / _LISTS, (".txt",)).files()
    if lists and splits is None:
        names = ", ".join(os.path.splitext(name)[0] for name in lists)
        raise DataError(f"{root}: has lists of images in {_LISTS}: split must name one or several of {names}")
    if lists:
        return None
    folders = [root] if splits is None else [_subfolder_of(root, split) for split in splits]
    if None in folders:
        return None
    if splits is None and not os.path.isdir(root / "Annotations"):
        _check_kits(root, "split")
    pictures = functools.cache(lambda folder: ImageFolder(folder, IMAGE_SUFFIXES))
    every = {path: None for folder in (root, *folders) if folder for path in _annotations_below(folder)}
    outside.update(every)
    found = [(path, _image_of(path, pictures)) for path in every if any(f and f in path.parents for f in folders)]
    if not found:
        where = root if splits is None else ", ".join(map(str, folders))
        raise DataError(f"{where}: no annotations (*.xml) in this folder; a folder in VOC's layout holds {VOC_LAYOUT}")
    return [(path, image.relative_to(root).as_posix()) for path, image in found]


def _subfolder_of(root: Path, split: str) -> Path | None:
    """Return the folder of a split, as Roboflow has them, if it holds annotations."""
    spellings = next((names for names in SPLITS.values() if split in names), ())
    folders = [root / name for name in (split, *spellings) if name and os.path.isdir(root / name)]
    return next((folder for folder in folders if any(True for _ in _annotations_below(folder))), None)


def _annotations_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if name.lower().endswith(".xml") and not is_hidden(name):
                yield Path(parent, name)


def _image_of(annotation: Path, pictures: Callable[[Path], ImageFolder]) -> Path:
    """Return the image of an annotation: beside it, or in a folder of images beside its folder Annotations."""
    folder = annotation.parent
    places = [folder]
    for above in (folder, *folder.parents):
        if above.name.lower() == "annotations":
            beside = [name for name in sorted(list_folder(above.parent)) if name.lower() in _IMAGE_FOLDERS]
            places += [above.parent / name / folder.relative_to(above) for name in beside]
    for place in places:
        if name := pictures(place).find(annotation.stem):
            return place / name
    return places[-1] / f"{annotation.stem}.jpg"


def _class_names(names: set[str], folders: Sequence[Path]) -> Sequence[str]:
    """Return the classes in order: of labelmap.txt (``name:color:parts:actions``), of VOC, or of the alphabet."""
    mapped: dict[str, None] = {}
    for path in (folder / "labelmap.txt" for folder in dict.fromkeys(folders)):
        if is_file(path):
            lines = read_text(path).splitlines()
            stated = [line.rsplit(":", 3)[0].strip() for line in lines if ":" in line and not line.startswith("#")]
            mapped.update(
                (same_form(name), None) for name in stated if name and (name != "background" or name in names)
            )
    if mapped:
        return [*mapped, *sorted(names - mapped.keys())]
    return VOC_CLASSES if names and names <= set(VOC_CLASSES) else sorted(names)


def _no_annotation(annotations: ImageFolder, stem: str, split: str) -> tuple[str, str, Path]:
    """Return the problem that a listed image has no annotation, and what was probably meant."""
    parent, name = annotations.root, f"{stem}.xml"
    bare = Path(stem.replace("\\", "/").split()[0])
    meant = annotations.meant(name)
    if annotations.find(bare.stem) or annotations.find(bare.name):
        hint = "; lists give names without folder and suffix, one a line"
    elif meant and meant.path == parent / meant.name and meant.name.endswith(f"/{name}"):
        hint = f"; it lies in a subfolder: list it as {meant.name.removesuffix('.xml')}"
    else:
        hint = annotations.hint(name)
    message = f"{parent}: no annotation {name[:100]!r}, but {shortened(split)} lists it{hint}"
    return "bad_annotation_file", message, parent / name[:100]


def _check_layout(folder: Path, root: Path) -> None:
    for part in ("Annotations", _LISTS, "JPEGImages"):
        if os.path.isdir(folder / part):
            continue
        if folder == root:
            _check_kits(root, part)
        alike = [name for name in sorted(list_folder(folder)) if name.casefold() == part.split("/")[0].casefold()]
        hint = f"did you mean {alike[0]} (upper and lower case differ)?" if alike else HOW_TO_GET_VOC
        if part == _LISTS and not alike:
            hint = f"Without lists of images, split: null takes every annotation of the folder. {HOW_TO_GET_VOC}"
        raise DataError(f"{shortened(folder / part)}: no such folder. {hint}")


def _check_kits(root: Path, missing: str) -> None:
    """Raise a DataError if folders in VOC's layout lie below ``root``, whose splits are named with their folder."""
    children = [above / name for above in (root, root / "VOCdevkit") for name in sorted(list_folder(above))]
    below = [path for path in children if os.path.isdir(path / "Annotations") and os.path.isdir(path / _LISTS)]
    if below:
        found = ", ".join(path.relative_to(root).as_posix() for path in below)
        raise DataError(f"{root}: has no {missing}; below it lie {found}: name the split as <folder>/<split>")


def _read_list(folder: Path, list_name: str, annotations: ImageFolder) -> list[str]:
    lists = ImageFolder(folder / _LISTS, (".txt",))
    name = lists.find(list_name)
    if name is None:
        found = [os.path.splitext(other)[0] for other in lists.files()]
        whole = [name for name in found if "_" not in name or name.rsplit("_", 1)[0] not in VOC_CLASSES]
        path = lists.root / f"{shortened(list_name)}.txt"
        raise DataError(f"{path}: no such split; {path.parent} has {', '.join(whole) or 'none'}")
    path = lists.root / name
    lines = [line.strip() for line in read_text(path).splitlines()]
    # "000012  1" in the lists of one class; a name may itself end in " 1", so the whole line is tried first.
    flag = re.compile(r"\s+(-1|0|1)$")
    stems = [flag.sub("", line) if flag.search(line) and not annotations.find(line) else line for line in lines if line]
    if not stems:
        raise DataError(f"{path}: lists no images")
    return stems
