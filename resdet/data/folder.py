"""Recognise what lies in a dataset's folder: COCO, Pascal VOC or YOLO, and what labelling tools export of them.

Names and the first and last bytes of files decide; no file is read whole, and no more than ``_MAX_FOLDERS`` folders are
listed. Reading a configuration imports this module, so it imports no NumPy.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from resdet.data.names import IMAGE_SUFFIXES, SPLITS, is_file, is_hidden, similar_path
from resdet.data.yolo_layout import find_layout
from resdet.errors import DataError, name_some, shortened

logger = logging.getLogger(__name__)

HELD_OUT = {"fraction": 0.2}
"""``data.val`` where a folder has only one set of images."""

_LOOK = 256 << 10  # bytes at each end of a json
_MAX_FOLDERS = 200
_MAX_JSONS = 30  # in one folder; labelme writes one for each image
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_SPELLINGS = {
    **{spelling: split for split, spellings in SPLITS.items() for spelling in spellings},
    "trainval": "train",
    "minival": "val",
}
_YOLO_CONFIGS = (".yaml", ".yml", ".data")
_VOC_PARTS = ("Annotations", "JPEGImages", "ImageSets/Main")
_PLAIN = ("images", "img", "imgs", "data", "masks", "labels", "annotations", "jpegimages")
_NOT_DETECTION = ("captions", "keypoints", "panoptic", "stuff")  # in names of COCO's other files
_LOOKED_FOR = (
    "COCO's json (annotations/instances_*.json, train.json and val.json, _annotations.coco.json) with its images, "
    "YOLO's data.yaml or images and labels, and Pascal VOC's Annotations, JPEGImages and ImageSets/Main, or .xml files "
    "beside images"
)


@dataclass(frozen=True)
class _Found:
    """One set of labelled images."""

    layout: str  # "COCO", "Roboflow's COCO export", "YOLO" or "Pascal VOC"
    split: str | None  # "train", "val" or "test"; None where its name says none of them
    section: dict[str, Any]  # of the configuration
    seen: str  # the file or folder that it was recognised by, relative to the dataset's folder


class _Folder:
    """What a folder holds, without hidden names; it is listed when it is first asked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _entries(self) -> tuple[list[str], list[str]]:
        try:
            with os.scandir(self.path) as entries:
                both = [(entry.is_dir(), entry.name) for entry in entries if not is_hidden(entry.name)]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be listed: {error.strerror}") from None
        return sorted(name for is_dir, name in both if is_dir), sorted(name for is_dir, name in both if not is_dir)

    @cached_property
    def folders(self) -> list[_Folder]:
        return [_Folder(self.path / name) for name in self._entries[0]]

    @property
    def files(self) -> list[str]:
        return self._entries[1]

    def ending(self, *suffixes: str) -> list[str]:
        """Return the names of the files with one of the suffixes."""
        return [name for name in self.files if name.lower().endswith(suffixes)]

    def folder(self, *names: str) -> _Folder | None:
        """Return the folder at the end of a path of names, whatever their case."""
        same = [one for one in self.folders if one.path.name.casefold() == names[0].casefold()]
        exact = sorted(same, key=lambda one: one.path.name != names[0])
        return None if not exact else exact[0].folder(*names[1:]) if names[1:] else exact[0]

    def within(self, depth: int) -> list[_Folder]:
        """Return this folder and those below it, nearest first, at most ``_MAX_FOLDERS``."""
        level, every = [self], [self]
        for _ in range(depth):
            level = [one for folder in level for one in folder.folders][: _MAX_FOLDERS - len(every)]
            every += level
        return every


def folder_sections(folder: str) -> dict[str, Any]:
    """Return the sections ``train`` and ``val`` of the configuration that a dataset's folder stands for, and log them.

    Args:
        folder: The folder, or a data.yaml of YOLO. Paths in the sections begin as it does; ``~`` is expanded.

    Raises:
        DataError: If nothing is recognised, or more than one thing; the message names what was found.
    """
    path = Path(folder).expanduser()
    found, left_out = _all_found(path)
    train, val = _train_and_val(path, found, left_out)
    sections = {"train": train.section, "val": HELD_OUT if val is None else val.section}
    used = [one.seen for one in (train, val) if one is not None]
    lines = [f"{path}: taken for {train.layout} ({name_some(dict.fromkeys(used))}). As keys:"]
    lines += [_as_key(f"data.{name}", section) for name, section in sections.items()]
    if val is None:
        lines.append("  nothing is named val or test: data.val.fraction of the images are held out of training")
    elif val.split == "test":
        lines.append("  test is taken for val, as nothing is named val")
    unused = [*dict.fromkeys(one.seen for one in found if one.seen not in used), *left_out]
    if unused:
        lines.append(f"  not used: {name_some(unused)}")
    if os.environ.get("RANK", "0") == "0":  # one process of a run is enough
        logger.info("%s", "\n".join(lines))
    return sections


def folder_splits(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of all sets of images in a dataset's folder, by their names ("train", "val", "test").

    A single one without such a name is "train". Errors are those of ``folder_sections``.
    """
    path = folder.expanduser()
    sections: dict[str, dict[str, Any]] = {}
    found, _ = _all_found(path)
    for one in found:
        if sections.setdefault(one.split or "train", one.section) is not one.section:
            same = [other for other in found if (other.split or "train") == (one.split or "train")]
            raise DataError(f"{path}: {_candidates(f'it cannot be told which of these is {one.split}', same)}")
    return sections


def _all_found(path: Path) -> tuple[list[_Found], list[str]]:
    """Return the sets of images of one layout, and what else looked like annotations with why it is none."""
    if is_file(path) and path.suffix in _YOLO_CONFIGS:
        left_out: list[str] = []
        return _yolo(path, left_out), left_out
    if not os.path.isdir(path):
        raise DataError(_not_a_folder(path))
    root, why = _Folder(path), list[str]()
    for _ in range(4):
        found, left_out = _found_in(root)
        if len({one.section["format"] for one in found}) > 1:
            raise DataError(f"{path}: {_candidates('more than one layout is here', found)}")
        if found:
            return found, left_out
        why = why or left_out
        if len(root.folders) != 1:
            break
        root = root.folders[0]  # an archive's own folder, or one for a single year
    raise DataError(f"{path}: {_why_not(_Folder(path), why)}")


def _found_in(root: _Folder) -> tuple[list[_Found], list[str]]:
    """Return what ``_all_found`` does, of all layouts."""
    left_out: list[str] = []
    found = [*_coco(root, left_out), *(_voc(root) or _loose_voc(root, left_out))]
    if _has_yolo_labels(root):
        try:
            found += _yolo(root.path, left_out)
        except DataError as error:
            if not found:
                raise
            left_out.append(f"YOLO's labels cannot be read ({error})")
    return found, left_out


def _train_and_val(path: Path, found: list[_Found], left_out: list[str]) -> tuple[_Found, _Found | None]:
    """Return what is to be trained on, and what evaluated on, if anything."""
    if len(found) == 1 and found[0].split in (None, "train"):
        return found[0], None
    train, val, test = ([one for one in found if one.split == split] for split in SPLITS)
    for several in (train, val or test):
        if len(several) > 1:
            what = f"it cannot be told which of these is {several[0].split}"
            raise DataError(f"{path}: {_candidates(what, several)}")
    if not train:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise DataError(f"{path}: {_candidates(f'nothing is named train{why}', found)}")
    return train[0], next(iter(val or test), None)


def _candidates(what: str, found: Sequence[_Found]) -> str:
    keys = [_as_key("data.train" if one.split in (None, "train") else "data.val", one.section) for one in found]
    names = name_some((f"{one.seen} ({one.layout})" for one in found), 8)
    return "\n".join([f"{what}: {names}. State data.train and data.val, of", *keys])


def _as_key(key: str, section: dict[str, Any]) -> str:
    text = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return f"    {shlex.quote(f'{key}={text.strip()}')}"


def _split_of(name: str) -> str | None:
    """Return the split that words of a name say: ``instances_train2017``, ``Valid``, ``test-data``."""
    words = (word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name))
    splits = {_SPELLINGS[word] for word in words if word in _SPELLINGS}
    return "train" if splits == {"train", "val"} else splits.pop() if len(splits) == 1 else None


def _coco(root: _Folder, left_out: list[str]) -> Iterator[_Found]:
    """Yield the detection files of COCO's format with the folders of their images."""
    found, people = list[_Found](), list[_Found]()
    for folder in root.within(2):
        jsons = sorted(folder.ending(".json"), key=lambda name: (_split_of(name) is None, name))
        for name in jsons[:_MAX_JSONS]:
            file = folder.path / name
            seen, text = file.relative_to(root.path).as_posix(), _ends_of(file)
            if (other := _other_kind(text)) is not None:
                left_out.append(f"{seen} is {other}")
                continue
            split = _split_of(file.stem) or _split_of(folder.path.name if folder is not root else "")
            names = _image_names(text)
            places = _image_folders(root, folder, split, names)
            if len(places) > 1:
                listed = name_some(str(place) for place in places)
                raise DataError(f"{root.path}: the images of {seen} may be in {listed}: state data.train and data.val")
            if not places:
                left_out.append(f"{seen} names images that are not here ({name_some(names, 2) or 'none'})")
                continue
            layout = "Roboflow's COCO export" if name == "_annotations.coco.json" else "COCO"
            section = {"format": "coco", "images": str(places[0]), "annotations": str(file)}
            is_other = any(word in name.lower() for word in _NOT_DETECTION) or '"keypoints"' in text
            (people if is_other else found).append(_Found(layout, split, section, seen))
    yield from found or people
    if found:
        left_out.extend(f"{one.seen} is not for detection, by its name or content" for one in people)


def _ends_of(file: Path) -> str:
    """Return the beginning and the end of a file as text, the whole if it is small."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_LOOK)
            stream.seek(max(_LOOK, os.fstat(stream.fileno()).st_size - _LOOK))
            return (head + stream.read()).decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    except OSError:
        return ""


def _other_kind(text: str) -> str | None:
    """Return what a json is if it is no file of boxes in COCO's format, by its beginning and end."""
    if '"shapes"' in text and '"imagePath"' in text:
        return "labelme's file of one image (labelme2coco makes COCO's format of them)"
    if '"segments_info"' in text:
        return "of COCO's panoptic format"
    if not re.search(r'"images"\s*:\s*\[', text) and '"file_name"' not in text:
        return "not of COCO's format"
    if '"bbox"' in text or re.search(r'"annotations"\s*:\s*\[\s*\]', text):
        return None
    return "COCO's captions" if '"caption"' in text else "a list of images without boxes"


def _image_names(text: str) -> list[str]:
    """Return the first names of images in the text of a json, of LVIS the ends of URLs."""
    quoted = re.findall(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)+")', text)[:3]
    if not quoted:
        return ["/".join(url.split("/")[-2:]) for url in re.findall(r'"coco_url"\s*:\s*"([^"\\]+)"', text)[:3]]
    return [json.loads(name, strict=False) for name in quoted]


def _image_folders(root: _Folder, folder: _Folder, split: str | None, names: Sequence[str]) -> list[Path]:
    """Return the folders below which the images of a json lie: one, or several that fit equally well."""
    ranked: dict[tuple[int, int], list[Path]] = {}
    for place in dict.fromkeys(one.path for one in (folder, root, *root.within(2))):
        num_found = sum(os.path.isfile(place / name) for name in names)
        of_split = {_split_of(part) for part in place.relative_to(root.path).parts} - {None}
        if num_found:
            # Another split's folder last: names such as 0001.jpg may be in all of them.
            ranked.setdefault((-num_found, 1 - (split in of_split) + bool(of_split - {split})), []).append(place)
    return ranked[min(ranked)] if ranked else []


def _voc(root: _Folder) -> list[_Found]:
    """Return the lists of folders in VOC's layout: of the folder itself, or of those in it or in its VOCdevkit."""
    inside = [*root.folders, *(kit.folders if (kit := root.folder("VOCdevkit")) else [])]
    kits = [one for one in (root, *inside) if all(one.folder(*part.split("/")) for part in _VOC_PARTS)]
    lists: dict[str | None, list[str]] = {}
    others: list[str] = []
    for kit in kits:
        main, above = kit.folder("ImageSets", "Main"), kit.path.relative_to(root.path)
        for stem in (name[: -len(".txt")] for name in main.ending(".txt")) if main else ():
            word = stem.lower()
            known = word if word == "trainval" else _SPELLINGS.get(word)
            (others if known is None else lists.setdefault(known, [])).append((above / stem).as_posix())
    # trainval is train and val together.
    both, is_whole = lists.pop("trainval", None), all(len(lists.get(one, ())) == len(kits) for one in ("train", "val"))
    if both and not is_whole:
        lists = {"train": both, **{split: lists[split] for split in ("test",) if split in lists}}
    rest = [] if lists else [(_split_of(name), [name]) for name in others]
    found = []
    for split, names in [*lists.items(), *rest]:
        section = {"format": "voc", "root": str(root.path), "split": names[0] if len(names) == 1 else names}
        files = (Path(name).parent / "ImageSets" / "Main" / f"{Path(name).name}.txt" for name in names)
        found.append(_Found("Pascal VOC", split, section, " + ".join(map(Path.as_posix, files))))
    return found


def _loose_voc(root: _Folder, left_out: list[str]) -> list[_Found]:
    """Return folders of VOC's .xml files without lists, as Roboflow, Label Studio and labelImg leave them."""
    found: dict[str, _Found] = {}
    for folder in root.within(3):
        xml = next(iter(folder.ending(".xml")), None)
        if xml is None:
            continue
        parts = folder.path.relative_to(root.path).parts
        if not re.search(r"<annotation[\s>]", _ends_of(folder.path / xml)):
            seen = "/".join((*parts, xml))
            left_out.append(f"{seen} is no annotation of VOC (of CVAT's own format?): export it as COCO, YOLO or VOC")
            continue
        named = next((number for number, part in enumerate(parts, start=1) if _split_of(part)), 0)
        name = "/".join(parts[:named])
        section = {"format": "voc", "root": str(root.path), "split": name or None}
        found[name] = _Found("Pascal VOC", _split_of(name), section, f"{name or '/'.join(parts) or '.'}/*.xml")
    return list(found.values())


def _has_yolo_labels(root: _Folder) -> bool:
    """Check for a data.yaml or obj.data, for .txt files in a folder of labels, or beside images of the same names."""
    if any("names" in (text := _ends_of(root.path / name)) or "nc" in text for name in root.ending(*_YOLO_CONFIGS)):
        return True
    for folder in root.within(2):
        texts = {os.path.splitext(name)[0] for name in folder.ending(".txt")}
        is_labels = any(part.lower() == "labels" for part in folder.path.relative_to(root.path).parts)
        if texts and (is_labels or texts & {os.path.splitext(name)[0] for name in folder.ending(*IMAGE_SUFFIXES)}):
            return True
    return False


def _yolo(root: Path, left_out: list[str]) -> list[_Found]:
    """Return the splits of a folder in YOLO's layout, or of its data.yaml."""
    layout, found = find_layout(root), []
    by = f" by {layout.config.name}" if layout.config else ""
    for split, paths in layout.splits.items():
        seen = " + ".join(Path(os.path.relpath(path, layout.root)).as_posix() for path in paths)
        found.append(_Found("YOLO", split, {"format": "yolo", "root": str(root), "split": split}, seen + by))
    left_out.extend(f"{split}{by} does not exist ({path})" for split, path in layout.absent.items())
    if found or layout.absent:
        return found
    return [_Found("YOLO", None, {"format": "yolo", "root": str(root), "split": None}, f"images and labels{by}")]


def _not_a_folder(path: Path) -> str:
    if not os.path.exists(path):
        return f"{shortened(path)}: no such folder{similar_path(path)}"
    if path.suffix.lower() in _ARCHIVES:
        return f"{path}: an archive: unpack it first; data takes the folder that comes out of it"
    return f"{path}: data must be a folder (or a data.yaml of YOLO); single files are stated in data.train and data.val"


def _why_not(root: _Folder, left_out: list[str]) -> str:
    """Return why a folder is not recognised: what was looked for, and what is there."""
    every = root.within(3)
    num_images = sum(len(folder.ending(*IMAGE_SUFFIXES)) for folder in every)
    for above in (root, root.folder("train"), root.folder("training")):
        of_class = [one for one in (above.folders if above else []) if one.ending(*IMAGE_SUFFIXES)]
        names = [one.path.name for one in of_class]
        classes = [name for name in names if _split_of(name) is None and name.casefold() not in _PLAIN]
        if above and len(classes) > 1 and not left_out:
            return (
                f"this is a classification dataset, a folder of images for each of {len(classes)} classes "
                f"({name_some(classes)}): resdet pretrain trains on it, with data.train.root={above.path}"
            )
    if archives := root.ending(*_ARCHIVES):
        return f"unpack {name_some(archives)} first; data takes the folder that comes out of it"
    files = [name for folder in every for name in folder.files]
    suffixes = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in files)
    counts = [f"{number} {suffix}" for suffix, number in suffixes.most_common()]
    folders = f"the folders {name_some((one.path.name for one in root.folders), 8)}" if root.folders else "no folders"
    what = f"has images ({num_images}) and nothing that labels them" if num_images else "no dataset is recognised"
    why = f" Of what is there, {'; '.join(left_out[:4])}." if left_out else ""
    return f"{what}. Looked for {_LOOKED_FOR}. There: {folders}; files: {name_some(counts, 8) or 'none'}.{why}"
