"""Find image files: those in folders, and those that annotations and lists name."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from resdet.data.annotations import AnnotationTable
from resdet.data.names import IMAGE_SUFFIXES, is_file, is_hidden, list_folder, same_form, similar_path
from resdet.errors import DataError, shortened

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
"""Files with one of these are videos."""

_MAX_FOLDERS = 2000
"""Subfolders that are searched for a file like a missing one."""
_MAX_NAME = 1024
"""Characters of a file name with its folders; systems allow no more."""
# Unicode's line breaks too: a name with one would break messages and lists of names. Of the halves of surrogate pairs,
# those are allowed that stand for bytes that are not UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]")


def find_images(paths: Iterable[Path | str], *, videos: bool = False) -> list[Path]:
    """List image files, with ``videos`` also those, each once, in the order of ``paths``.

    Files may have any name; a folder stands for its image files by name, without hidden ones and subfolders, and a
    pattern such as ``photos/**/*.jpg`` for its matches, for shells that do not expand it. A DataError is raised for a
    path that does not exist, matches nothing or holds no image.
    """
    suffixes = IMAGE_SUFFIXES + (VIDEO_SUFFIXES if videos else ())
    found: list[Path] = []
    for path in map(Path, paths):
        if is_file(path):
            found.append(path)
            continue
        if os.path.isdir(path):
            matches = [entry for entry in path.iterdir() if not is_hidden(entry.name)]
            missing = f"no images{' or videos' if videos else ''} in this folder (looked for {', '.join(suffixes)})"
        elif glob.has_magic(str(path)):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            missing = f"no image{' or video' if videos else ''} matches this pattern"
        else:
            raise DataError(f"{shortened(path)}: no such file or folder")
        files = [file for file in matches if file.suffix.lower() in suffixes and file.is_file()]
        if not files:
            raise DataError(f"{path}: {missing}")
        found += sorted(files, key=str)
    if not found:
        raise DataError("no images given: expected files, folders or patterns")
    return list(dict.fromkeys(found))


def name_fault(name: str) -> str | None:
    """Return why a name cannot be that of a file below a folder, or None; nothing is opened."""
    if _leaves_folder(name):
        rule = "lie in the image folder"
    elif _CONTROL.search(name):
        rule = "hold no control characters and no half surrogates"
    elif len(name) > _MAX_NAME:
        rule = f"have at most {_MAX_NAME} characters"
    elif name.strip("./") == "":
        rule = "name a file"
    else:
        return None
    shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}... ({len(name)} characters)"
    return f"file_name must {rule}, got {shown}"


def _leaves_folder(name: str) -> bool:
    if ".." not in name and ":" not in name and not name.startswith(("/", "\\")):
        return False
    windows = PureWindowsPath(name)
    return ".." in windows.parts or bool(windows.drive or windows.root) or PurePosixPath(name).is_absolute()


class Meant(NamedTuple):
    """The existing file that a missing name probably stands for."""

    path: Path
    name: str  # relative to the image folder; outside it, the whole path
    difference: str  # what to change, in a few words for a message

    def __str__(self) -> str:
        return f"did you mean {self.name} ({self.difference})?"


class ImageFolder:
    """The files below a folder, by the names that annotations and lists have for them.

    Each subfolder is listed once, when it is first needed: 118 000 names in a fraction of a second, where ``stat`` over
    a network takes minutes.

    Args:
        root: The folder.
        suffixes: If given, names are without suffix, as in VOC's lists, and stand for the file with one of these, in
            upper or lower case; of several files, for that whose suffix comes first.
    """

    def __init__(self, root: Path, suffixes: tuple[str, ...] = ()) -> None:
        self.root, self._suffixes = Path(root), suffixes
        self._listed = functools.cache(lambda folder: list_folder(self.root / folder))
        self._by_name = functools.cache(self._files_by_name)
        self._by_form = functools.cache(lambda folder: _grouped(self._by_name(folder)))
        self._real_folder = functools.cache(self._folder_in_any_form)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageFolder, (self.root, self._suffixes)  # a worker lists for itself what it needs

    def files(self, folder: str = "") -> list[str]:
        """Return the files in a subfolder (with ``suffixes``: one for each name), sorted."""
        return sorted(self._by_name(folder).values())

    def find(self, name: str) -> str | None:
        """Return the path below the folder by which the disk has a file, None where it has none.

        That is ``name`` itself (with its suffix), or else the one that differs from it in Unicode's form alone.

        Raises:
            DataError: If several differ from it in form alone.
        """
        folder, base = os.path.split(name)
        if base in self._by_name(folder):
            return os.path.join(folder, self._by_name(folder)[base])
        # A file system that ignores case or form lists one spelling and opens all.
        if not self._suffixes and is_file(self.root / name):
            return name
        real = None if name.isascii() else self._real_folder(folder)
        return None if real is None else self._only(real, base, self._by_form(real).get(same_form(base), []))

    def _files_by_name(self, folder: str) -> dict[str, str]:
        names = self._listed(folder)
        if not self._suffixes:
            return {name: name for name in names}
        split = [(*os.path.splitext(name), name) for name in names]
        known = [one for one in split if one[1].lower() in self._suffixes]
        known.sort(key=lambda one: (self._suffixes.index(one[1].lower()), one[2]), reverse=True)
        return {stem: name for stem, _, name in known}

    def _folder_in_any_form(self, folder: str) -> str | None:
        if not folder or os.path.isdir(self.root / folder):
            return folder
        above, name = os.path.split(folder)
        real = self._real_folder(above)
        same = [] if real is None else [one for one in self._listed(real) if same_form(one) == same_form(name)]
        return self._only(real or "", name, same)

    def _only(self, folder: str, name: str, found: list[str]) -> str | None:
        if len(found) > 1:
            several = ", ".join(sorted(map(ascii, found)))
            raise DataError(f"{self.root / folder}: several names look like {name}: {several}; rename all but one")
        return os.path.join(folder, found[0]) if found else None

    def hint(self, name: str) -> str:
        """Return the end of a message on a missing file: what was probably meant, or nothing."""
        meant = self.meant(name)
        return f"; {meant}" if meant else ""

    def meant(self, name: str) -> Meant | None:
        r"""Return the existing file that a missing name probably stands for, or None.

        Its name differs in upper and lower case, in its suffix, in separators (``\``) or in its first folders; or it
        lies where another image folder would fit. At most ``_MAX_FOLDERS`` subfolders are searched, once.
        """
        asked = re.sub("^[A-Za-z]:", "", same_form(unquote(name)).replace("\\", "/"))
        parts = [part for part in asked.split("/") if part not in ("", ".", "..")]
        if not parts or len(name) > _MAX_NAME:
            return None
        asked = "/".join(parts)
        root = self.root if self.root.name not in ("", "..") else Path(os.path.abspath(self.root))
        if is_file(root.parent / asked) and not is_file(root / asked):
            path = root.parent / asked
            return Meant(path, str(path), f"then the image folder is {root.parent}")

        def unlike(row: list[str]) -> tuple[bool, bool, int]:
            differs_in_case = row[-1].casefold() != parts[-1].casefold()
            return row[-1] != parts[-1], differs_in_case, -min(len(row), len(parts))

        rows = [row for row in self._by_stem.get(_stem(parts[-1]), []) if _is_among(row[:-1], parts[:-1])]
        least = min(map(unlike, rows), default=None)
        best = ["/".join(row) for row in rows if unlike(row) == least]
        if len(best) != 1:
            return None
        return Meant(self.root / best[0], best[0], self._difference(name, asked, best[0]))

    def _difference(self, name: str, asked: str, found: str) -> str:
        if asked == (found := same_form(found)):
            return "folders must be separated by /, not by \\" if "\\" in name else "without escapes as in a URL"
        if asked.casefold() == found.casefold():
            return "upper and lower case differ"
        if found.endswith(f"/{asked}"):
            return f"then the image folder is {self.root / found.removesuffix(f'/{asked}')}"
        if asked.endswith(f"/{found}"):
            return f"without {asked.removesuffix(f'/{found}')}/ before it"
        return "another suffix" if os.path.dirname(asked) == os.path.dirname(found) else "another folder"

    @functools.cached_property
    def _by_stem(self) -> dict[str, list[list[str]]]:
        """The parts of each file's path below the folder, by its stem."""
        found: dict[str, list[list[str]]] = defaultdict(list)
        for folder, folders, names in itertools.islice(os.walk(self.root), _MAX_FOLDERS):
            folders[:] = sorted(one for one in folders if not is_hidden(one))
            above = list(Path(folder).relative_to(self.root).parts)
            for name in sorted(names):
                if not is_hidden(name):
                    found[_stem(name)].append([*above, name])
        return found


def _grouped(names: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, file in names.items():
        found[same_form(name)].append(file)
    return found


def _stem(name: str) -> str:
    """Return a name for comparison: without case, Unicode's form and suffixes of images, repeated ones too."""
    stem, suffix = os.path.splitext(same_form(name).casefold().strip())
    return _stem(stem) if suffix in IMAGE_SUFFIXES else stem + suffix


def _is_among(first: list[str], second: list[str]) -> bool:
    """Check that one of two lists of folders has all those of the other, in order, but for upper and lower case."""
    short, long = sorted(([same_form(part).casefold() for part in parts] for parts in (first, second)), key=len)
    rest = iter(long)
    return all(part in rest for part in short)


def check_folder(root: Path, annotations: str | Path) -> None:
    """Raise a DataError if the folder of the images of ``annotations`` does not exist."""
    if not os.path.isdir(root):
        raise DataError(f"{shortened(root)}: no such image folder (the images of {annotations}){similar_path(root)}")


def check_names(root: Path, table: AnnotationTable) -> None:
    """Raise a DataError for the first file name of a table that no file below ``root`` can have."""
    for image_id, name in zip(table.image_ids.tolist(), table.file_names, strict=True):
        if fault := name_fault(name):
            raise DataError(f"{table.name}: image {image_id}: {fault}{ImageFolder(root).hint(name)}")


def check_files(root: Path, table: AnnotationTable) -> None:
    """Raise a DataError if an image of a table does not exist, or as ``FolderImages`` does; none is opened."""
    root = Path(root)
    check_folder(root, table.name)
    check_names(root, table)
    folder = ImageFolder(root)
    missing = [index for index, name in enumerate(table.file_names) if folder.find(name) is None]
    if missing:
        names = {index: table.file_names[index] for index in missing[:3]}
        shown = ", ".join(f"{name} (image {table.image_ids[index]})" for index, name in names.items())
        more = ", ..." if len(missing) > 3 else ""
        slashes = os.sep == "/" and any("\\" in name for name in names.values())
        why = "; folders in a file_name must be separated by /, not by \\" if slashes else ""
        hint = next(filter(None, map(folder.hint, names.values())), why)
        raise DataError(
            f"{root}: {len(missing)} of the {table.num_images} images of {table.name} are missing: {shown}{more}{hint}"
        )
