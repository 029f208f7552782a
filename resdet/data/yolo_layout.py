"""Find the images, splits and class names of a data set in YOLO's layout, by the conventions of Ultralytics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resdet.data.names import (
    IMAGE_SUFFIXES,
    SPLITS,
    is_file,
    is_hidden,
    list_folder,
    on_disk,
    read_text,
    same_forms,
    similar_path,
)
from resdet.errors import ConfigError, DataError, name_some, shortened
from resdet.yaml12 import read_yaml

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
"""Lists of class names, one a line: Label Studio's and labelImg's, darknet's and CVAT's, Roboflow's."""

HOW_TO_NAME_CLASSES = (
    "a data.yaml with 'names', or the class names one a line in classes.txt or obj.names, must lie in this folder"
)
_CONFIGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "obj.data")


@dataclass(frozen=True)
class YoloLayout:
    """A data set in YOLO's layout: what its folder or data.yaml says, before any label is read."""

    root: Path  # the folder of the data set
    config: Path | None  # its data.yaml or obj.data
    names: tuple[str, ...]  # class names; their positions are the classes in label files
    splits: dict[str, tuple[Path, ...]]  # folders of images and .txt lists of images, by "train", "val", "test"
    absent: dict[str, Path] = field(default_factory=dict)  # splits that are stated, and what does not exist of each
    keypoints: int = 0  # numbers of a label file's line after the box, from kpt_shape
    notes: tuple[str, ...] = ()  # what was guessed
    notes_on: dict[Path, str] = field(default_factory=dict)  # likewise, of one source of images

    def sources(self, split: str | None) -> tuple[Path, ...]:
        """Return the folders and lists of a split, for None those of all splits or the whole folder.

        Raises:
            DataError: If there is no such split, or its folder does not exist; the message names those that there are.
        """
        if split is None:
            every = [path for paths in self.splits.values() for path in paths]
            return tuple(dict.fromkeys(every)) or (_folder_of_images(self.root),)
        name = next((own for own, aliases in SPLITS.items() if split in aliases), split)
        if paths := self.splits.get(name):
            return paths
        if path := self.absent.get(name):
            what = f"no such folder or list of images: {shortened(path)}{similar_path(path)}"
            raise DataError(f"{self.config}: {name}: {what}")
        where, found = self.config or self.root, ", ".join(self.splits)
        hint = f"it has {found}" if found else "split: null takes all of its images"
        raise DataError(f"{where}: has no split {shortened(split)!r}; {hint}")


def find_layout(root: Path) -> YoloLayout:
    """Read how a data set in YOLO's layout is organised.

    With a data.yaml (or another YAML file that is the only one with ``names`` or ``nc`` in its folder) its ``path``,
    ``train``, ``val`` (or ``validation``) and ``test`` count, each a folder, a .txt list or a list of these, and its
    ``names``: a list, a mapping from positions, or the name of a file. Relative paths start from ``path``, or from the
    YAML file's folder where ``path`` does not exist; ``../train/images``, as Roboflow writes it, is taken without
    ``../`` if it exists only so. darknet's obj.data (``train = train.txt``) is read likewise.

    Without such a file the splits are the folders ``images/train``, ``train/images`` or ``train``, or the list
    ``train.txt``, and likewise for val (also valid, validation) and test; class names come from ``NAME_FILES``.

    Args:
        root: The folder, or the YAML file.

    Raises:
        DataError: If the folder does not exist, the file is damaged, class names are missing or given twice, or their
            number is not ``nc``. A split that does not exist is no error before it is asked for: Roboflow names a test
            split in every export.
    """
    root = Path(root)
    config = root if is_file(root) else _config_in(root)
    if config is None:
        return YoloLayout(root, None, _names_in(root), _splits_in(root))
    content = _read_obj_data(config) if config.suffix == ".data" else _read_yaml(config)
    bases, notes = _bases(config, content)
    splits: dict[str, tuple[Path, ...]] = {}
    absent, notes_on = {}, {}
    for split, aliases in SPLITS.items():
        stated: Any = next((content[alias] for alias in aliases if content.get(alias)), [])
        found = [(str(entry), *_resolve(str(entry), bases)) for entry in _as_list(stated)]
        missing = [path for _, path, spelling in found if spelling is None]
        if missing:
            absent[split] = missing[0]
        elif found:
            splits[split] = tuple(path for _, path, _ in found)
        for entry, path, spelling in found:
            if spelling not in (None, entry):
                notes_on[path] = f"{config}: {split}: {entry} does not exist; taken for {path}"
    names = _class_names(config, content, bases, notes)
    return YoloLayout(bases[0], config, names, splits, absent, _keypoints(config, content), tuple(notes), notes_on)


def image_paths(sources: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Yield the images of folders, at any depth, and of lists, each with the source that names it; none is opened.

    A list holds one path a line: absolute, or relative to the list (``./images/a.jpg``), or to a folder above it, as
    other tools' lists are.
    """
    for source in sources:
        if not os.path.isdir(source):
            yield from ((path, source) for path in _read_image_list(source))
            continue
        seen = set()
        for folder, folders, names in os.walk(source, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(names):
                if not is_hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                    yield os.path.join(folder, name), source


def label_path(image: str) -> str:
    """Return where Ultralytics looks for an image's labels: the last ``/images/`` of its path is ``/labels/``."""
    head, found, tail = os.path.splitext(os.path.abspath(image))[0].rpartition(f"{os.sep}images{os.sep}")
    return f"{os.path.join(head, 'labels', tail) if found else tail}.txt"


def label_folder(folder: str) -> str:
    """Return where the labels of the images in a folder lie, by ``label_path``.

    Where there is no such folder, labels lie beside the images, as darknet has them.
    """
    labels = os.path.dirname(label_path(os.path.join(folder, "image")))
    return labels if os.path.isdir(labels) else folder


def describes_classes(path: Path) -> bool:
    """Check whether a YAML file has the class names, or their number, of a data set in YOLO's layout."""
    try:
        return bool({"names", "nc"} & _read_yaml(path).keys())
    except DataError:
        return False


def read_names(path: Path) -> tuple[str, ...]:
    """Read a file of class names, one a line."""
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path}: must hold the class names, one a line, but is empty")
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} must be a class name, but is empty")
    return _distinct(lines, path)


def _config_in(folder: Path) -> Path | None:
    if not os.path.isdir(folder):
        raise DataError(f"{shortened(folder)}: no such folder or data.yaml{similar_path(folder)}")
    names = list_folder(folder)
    for name in _CONFIGS:
        if name in names:
            return folder / name
    others = [folder / name for name in sorted(names) if name.endswith((".yaml", ".yml"))]
    found = [path for path in others if describes_classes(path)]
    if len(found) > 1:
        listed = name_some([path.name for path in found])
        raise DataError(
            f"{folder}: several files describe a data set: {listed}; name one of them in place of the folder"
        )
    return found[0] if found else None


def _read_yaml(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    text = read_text(path)
    try:
        content = read_yaml(text, str(path), problems, {})
    except ConfigError as error:
        raise DataError(f"{path}: {error.problems[0]}") from error
    if problems:
        raise DataError(problems[0])
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold keys such as train, val and names")
    return content


def _read_obj_data(path: Path) -> dict[str, Any]:
    lines = [line.partition("=") for line in read_text(path).splitlines()]
    content: dict[str, Any] = {key.strip(): value.strip() for key, equals, value in lines if equals}
    num_classes = content.pop("classes", "")
    return content | ({"nc": int(num_classes)} if num_classes.isdecimal() else {})


def _bases(config: Path, content: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """Return the folders from which relative paths may start, the likeliest first, and what was guessed."""
    stated, folder = content.get("path"), config.parent
    if not stated or os.path.normpath(str(stated)) == ".":
        return [folder], []
    bases = [path for path in (folder / str(stated), Path(str(stated))) if os.path.isdir(path)]
    if bases:
        return [_plain(bases[0]), folder], []
    return [folder], [f"{config}: its path {shortened(stated)} does not exist; paths are taken relative to {folder}"]


def _plain(path: Path) -> Path:
    """Return a path without ``..``, whose meaning links change."""
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolve(entry: str, bases: list[Path]) -> tuple[Path, str | None]:
    """Return the path that an entry of data.yaml or obj.data stands for, and how it is spelt there, None if nowhere."""
    entry = entry.replace("\\", "/") if os.sep == "/" else entry
    # CVAT and darknet write data/train.txt for a file beside obj.data.
    spellings = [entry, *(entry.removeprefix(start) for start in ("../", "data/") if entry.startswith(start))]
    for spelling in spellings:
        for base in bases:
            path = on_disk(base / spelling)
            if os.path.isdir(path) or is_file(path):
                return _plain(path) if ".." in spelling else path, spelling
    return bases[0] / entry, None


def _class_names(config: Path, content: dict[str, Any], bases: list[Path], notes: list[str]) -> tuple[str, ...]:
    stated, number = content.get("names"), content.get("nc")
    if isinstance(stated, str):
        path, spelling = _resolve(stated, [config.parent, *bases])
        if spelling is None:
            raise DataError(f"{config}: names: no such file: {shortened(path)}{similar_path(path)}")
        names = read_names(path)
    elif stated is None and isinstance(number, int) and number > 0:
        names = tuple(f"class_{index}" for index in range(number))
        notes.append(f"{config}: has no 'names'; its {number} classes are called class_0 to class_{number - 1}")
    else:
        names = _names_in(config.parent) if stated is None else _listed_names(config, stated)
    if number is not None and number != len(names):
        raise DataError(
            f"{config}: nc must be the number of names, but nc is {number!r} and there are {len(names)} names"
        )
    return names


def _listed_names(config: Path, stated: Any) -> tuple[str, ...]:
    if isinstance(stated, dict):
        positions = {int(key): name for key, name in stated.items() if key.isdecimal()}
        if len(positions) != len(stated) or sorted(positions) != list(range(len(stated))):
            raise DataError(f"{config}: names must have the keys 0 to {len(stated) - 1}, got {name_some(stated, 8)}")
        stated = [positions[index] for index in range(len(stated))]
    if not isinstance(stated, list) or not stated:
        raise DataError(
            f"{config}: names must be a list, a mapping from 0, 1, ... or a file, got {shortened(repr(stated))}"
        )
    wrong = next((name for name in stated if name in (None, "") or isinstance(name, (list, dict))), stated)
    if wrong is not stated:
        raise DataError(f"{config}: each of names must be a text, got {shortened(repr(wrong))}")
    return _distinct([str(name) for name in stated], config)


def _distinct(names: list[str], where: Path) -> tuple[str, ...]:
    names = same_forms(names)
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise DataError(f"{where}: class names must differ, got {twice[0]!r} twice")
    return tuple(names)


def _keypoints(config: Path, content: dict[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise DataError(f"{config}: kpt_shape must be two whole numbers, got {shortened(repr(shape))}")
    return int(shape[0] * shape[1])


def _names_in(folder: Path) -> tuple[str, ...]:
    # Roboflow puts a list into each split's folder.
    for place in (folder, *(folder / alias for aliases in SPLITS.values() for alias in aliases)):
        for name in NAME_FILES:
            if is_file(place / name):
                return read_names(place / name)
    raise DataError(f"{folder}: the names of the classes are needed: {HOW_TO_NAME_CLASSES}")


def _splits_in(folder: Path) -> dict[str, tuple[Path, ...]]:
    splits: dict[str, tuple[Path, ...]] = {}
    for split, aliases in SPLITS.items():
        places = [
            path
            for alias in aliases
            for path in (folder / "images" / alias, folder / alias / "images", folder / alias, folder / f"{alias}.txt")
        ]
        if found := next((path for path in places if os.path.isdir(path) or is_file(path)), None):
            splits[split] = (found,)
    return splits


def _folder_of_images(folder: Path) -> Path:
    return folder / "images" if os.path.isdir(folder / "images") else folder


def _read_image_list(path: Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    entries = [line.replace("\\", "/") if os.sep == "/" else line for line in lines if line]
    if not entries:
        raise DataError(f"{path}: lists no images")
    # One folder for all lines: looking for each of 118 000 files in several places would take minutes over a network.
    first = entries[0]
    places = [path.parent, path.parent.parent, Path.cwd()]
    spellings = [(base, start) for start in ("", "data/") for base in places if first.startswith(start)]
    base, start = next(((b, s) for b, s in spellings if is_file(b / first.removeprefix(s))), (path.parent, ""))
    return [os.path.normpath(base / entry.removeprefix(start)) for entry in entries]
