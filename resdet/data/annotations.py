"""One flat table for all images and boxes of a dataset: NumPy arrays, no Python object per box."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from resdet.data.names import same_forms
from resdet.data.sharing import reduce_for_worker
from resdet.errors import DataError
from resdet.types import Bools, Category, Floats, Ints

Arrays = dict[str, npt.NDArray[Any]]

MIN_TRAINABLE_SIDE = 0.1
"""Pixels. A box thinner than this inside its image teaches nothing and can vanish when the image is resized in
float32, where torchvision refuses it ("positive height and width"). Training leaves it out and logs it."""


def bare_name(name: str) -> str:
    """Return a class name without what spellings of one name differ in: case, blanks, hyphens and underscores."""
    # Between two digits a separator has a meaning: 1-1 is not 11.
    return re.sub(r"(?<!\d)[\s_-]+|[\s_-]+(?!\d)", "", unicodedata.normalize("NFKC", name)).casefold()


class FileNames(Sequence[str]):
    """Strings in one UTF-8 array with the start and end of each; an item is decoded on access.

    NumPy's own strings take four bytes a character and pad each string to the longest. Slices and selections share the
    characters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # File names need not be valid UTF-8; Python then represents bytes as halves of surrogate pairs.
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        bounds = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), out=bounds[1:])
        self._utf8 = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._starts, self._ends = bounds[:-1], bounds[1:]

    @classmethod
    def from_arrays(cls, utf8: npt.NDArray[np.uint8], starts: Ints, ends: Ints) -> FileNames:
        """Make the strings ``utf8[starts[i]:ends[i]]``, without copying."""
        names = cls.__new__(cls)
        names._utf8, names._starts, names._ends = utf8, starts, ends
        return names

    def to_arrays(self) -> tuple[npt.NDArray[np.uint8], Ints, Ints]:
        """Return the characters, starts and ends that ``from_arrays`` takes."""
        return self._utf8, self._starts, self._ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, key: slice | npt.NDArray[Any]) -> FileNames: ...
    def __getitem__(self, key: int | np.integer[Any] | slice | npt.NDArray[Any]) -> str | FileNames:
        """Return one string, or those at a slice, an array of indices or a mask."""
        if isinstance(key, (slice, np.ndarray)):
            return FileNames.from_arrays(self._utf8, self._starts[key], self._ends[key])
        return self._utf8[self._starts[key] : self._ends[key]].tobytes().decode("utf-8", "surrogatepass")

    def tolist(self) -> list[str]:
        """Return all strings as a list."""
        return list(self)

    def __repr__(self) -> str:
        return f"FileNames({self.tolist()!r})" if len(self) < 8 else f"<FileNames: {len(self)}, {self[0]!r}, ...>"


@dataclass(frozen=True)
class AnnotationTable:
    """Images and ground-truth boxes; the boxes of image ``i`` are rows ``offsets[i]:offsets[i + 1]``.

    Boxes keep the numbers of their source, crowd, difficult and degenerate ones included: evaluation must see what the
    reference evaluators see. ``trainable`` tells which of them training uses.

    Memory: 58 bytes a box and about 60 an image (57 MB for COCO's train2017), once for all processes. Tables of large
    files are read-only maps of a file in the cache (``resdet.data.cache``), which independent processes share. Forked
    workers share their parent's memory; a table that is sent to a spawned worker shares its arrays
    (``resdet.data.sharing``). So give workers the table itself and ask it for one image at a time (``boxes_of(i)``,
    ``labels[rows(i)]``, ``file_names[i]``): arrays taken out of it are copied when they are pickled.
    """

    name: str  # where the table came from, for messages (a file or folder)
    categories: tuple[Category, ...]  # foreground classes in label order: categories[k].label == k + 1
    image_ids: Ints  # [I], the dataset's ids (VOC has none: 1..I in the order of the split)
    file_names: FileNames  # [I], relative to the image folder; any sequence of strings is converted
    sizes: npt.NDArray[np.int32]  # [I, 2], (height, width)
    offsets: Ints  # [I + 1]
    boxes_xywh: Floats  # [N, 4], (x, y, width, height): COCO's own numbers, so that evaluation is exact
    labels: Ints  # [N], 1..K
    area: Floats  # [N], pixels; COCO's segment area where given, else width * height
    crowd: Bools  # [N], COCO's iscrowd
    difficult: Bools  # [N], VOC's difficult
    annotation_ids: Ints  # [N]
    notes: tuple[str, ...] = ()  # what the reader left out or corrected, with counts, one line each

    def __post_init__(self) -> None:
        if not isinstance(self.file_names, FileNames):
            object.__setattr__(self, "file_names", FileNames(self.file_names))

    @property
    def num_images(self) -> int:
        """Number of images, those without boxes included."""
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Number of boxes, crowd, difficult and degenerate ones included."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Foreground classes plus the background, as torchvision's detectors count."""
        return len(self.categories) + 1

    def rows(self, index: int) -> slice:
        """Return the rows of the box arrays that belong to image ``index``."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def image_of_box(self) -> Ints:
        """Return the image index of each box, int64 ``[N]``."""
        return np.repeat(np.arange(self.num_images, dtype=np.int64), np.diff(self.offsets))

    def objects_per_image(self) -> Ints:
        """Return how many boxes of each image are single objects and not crowd regions, int64 ``[I]``.

        A detector that returns fewer detections than that (``eval.max_detections``) cannot find all of them.
        """
        before = np.concatenate([[0], np.cumsum(~self.crowd)])  # [N + 1]
        counts: Ints = np.diff(before[self.offsets])
        return counts

    def boxes_in_image(self) -> Floats:
        """Return all boxes as ``(x1, y1, x2, y2)`` clipped to their images, float64 ``[N, 4]``."""
        height, width = self.sizes[self.image_of_box()].T  # [N] each
        return _corners(self.boxes_xywh, height, width)

    def trainable(self, *, use_difficult: bool = False) -> Bools:
        """Return which boxes training uses, bool ``[N]``.

        It leaves out crowd regions (as every reference implementation does), difficult objects by default (Ren et al.
        2015 train without them), and boxes that are not finite or thinner than ``MIN_TRAINABLE_SIDE`` inside their
        image.
        """
        keep = _has_extent(self.boxes_xywh, self.boxes_in_image()) & ~self.crowd
        return keep if use_difficult else keep & ~self.difficult

    def boxes_of(self, index: int) -> tuple[npt.NDArray[np.float32], Bools]:
        """Return the boxes of image ``index`` as training takes them, in new arrays ``[n, 4]`` and ``[n]``.

        This is the one conversion from a file's numbers to a model's: to ``(x1, y1, x2, y2)`` clipped to the image, and
        to which of them have finite numbers and are no thinner than ``MIN_TRAINABLE_SIDE``. ``trainable`` also
        considers the columns ``crowd`` and ``difficult``.
        """
        boxes_xywh = self.boxes_xywh[self.rows(index)]  # [n, 4]
        height, width = self.sizes[index]
        boxes = _corners(boxes_xywh, height, width)
        return boxes.astype(np.float32), _has_extent(boxes_xywh, boxes)

    def select_images(self, indices: Ints) -> AnnotationTable:
        """Return a table of the images at ``indices``, in that order, with their boxes.

        Consecutive images share this table's memory (except for the offsets). Otherwise only the characters of file
        names are shared, and the rest is copied for the selected images.
        """
        images: slice | Ints = indices
        rows: slice | Ints
        if len(indices) and indices[0] >= 0 and (np.diff(indices) == 1).all():
            images = slice(int(indices[0]), int(indices[-1]) + 1)
            offsets = self.offsets[images.start : images.stop + 1] - self.offsets[images.start]
            rows = slice(int(self.offsets[images.start]), int(self.offsets[images.stop]))
        else:
            counts = np.diff(self.offsets)[indices]
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            rows = np.repeat(self.offsets[:-1][indices] - offsets[:-1], counts) + np.arange(offsets[-1])  # [N selected]
        return replace(
            self,
            image_ids=self.image_ids[images],
            file_names=self.file_names[images],
            sizes=self.sizes[images],
            offsets=offsets,
            **{name: getattr(self, name)[rows] for name in _BOX_COLUMNS},
        )

    def add_classes(self, categories: Sequence[Category]) -> AnnotationTable:
        """Return the same table with those classes appended that it lacks by name; they have no boxes.

        They keep their ``category_id`` where it is free, and get the next above all others where it is not.
        """
        every = list(self.categories)
        for name, category in zip(same_forms(one.name for one in categories), categories, strict=True):
            if name in {known.name for known in every}:
                continue
            taken = {known.category_id for known in every}
            category_id = max(taken) + 1 if category.category_id in taken else category.category_id
            every.append(Category(len(every) + 1, category_id, name))
        return self if len(every) == len(self.categories) else replace(self, categories=tuple(every))

    def with_classes_of(self, categories: Sequence[Category]) -> AnnotationTable:
        """Return the table with a model's classes, to evaluate the model on it.

        Classes that it lacks are appended (``add_classes``): a validation set need not hold every class. Its own
        classes that the model lacks are removed if none of them has boxes; otherwise the table is returned unchanged.
        """
        known = set(same_forms(category.name for category in categories))
        kept = [own.name for own in self.categories if own.name in known]
        unknown = [own.label for own in self.categories if own.name not in known]
        if np.isin(unknown, self.labels).any():
            return self
        return (self.select_classes(kept) if unknown else self).add_classes(categories)

    def select_classes(self, names: Sequence[str]) -> AnnotationTable:
        """Return a table of the named classes only, labelled 1..len(names) in that order, with every image.

        Named classes that the table lacks have no boxes, and a note says so. It shares this table's images, and its
        boxes too if every class is named; otherwise the kept boxes are copied.

        Raises:
            DataError: If a name is given twice, differs from a class that is not named in case or blanks alone, or none
                of the names is a class of this table.
        """
        names = same_forms(names)
        own = sorted(category.name for category in self.categories)
        absent = [name for name in names if name not in own]
        plain = {bare_name(name) for name in own if name not in names}
        misspelt = absent if len(absent) == len(names) else [name for name in absent if bare_name(name) in plain]
        if misspelt or len(set(names)) != len(names):
            what = f"unknown classes {misspelt}" if misspelt else "the same class twice"
            raise DataError(f"{self.name}: classes must name each class once, out of {own}; got {what}")
        if absent:
            note = f"the named classes {absent} are not in it; its classes are {own}"
            table = replace(self, notes=(*self.notes, note))
            return table.add_classes([Category(0, 0, name) for name in absent]).select_classes(names)
        known = {category.name: category for category in self.categories}
        new_label = np.zeros(len(self.categories) + 1, dtype=np.int64)  # [K + 1], 0 for classes left out
        for label, name in enumerate(names, start=1):
            new_label[known[name].label] = label
        kept = self.select_boxes(new_label[self.labels] > 0)
        categories = tuple(replace(known[name], label=label) for label, name in enumerate(names, start=1))
        return replace(kept, categories=categories, labels=new_label[kept.labels])

    def select_boxes(self, keep: Bools) -> AnnotationTable:
        """Return a table of the boxes in a mask ``[N]``, with every image; all boxes share this table's memory."""
        if keep.all():
            return self
        kept_before = np.concatenate([[0], np.cumsum(keep)])  # [N + 1]
        columns = {name: getattr(self, name)[keep] for name in _BOX_COLUMNS}
        return replace(self, offsets=kept_before[self.offsets].astype(np.int64), **columns)

    def to_arrays(self) -> Arrays:
        """Return everything but name, categories and notes as arrays by name, without copying."""
        utf8, starts, ends = self.file_names.to_arrays()
        arrays = {name: getattr(self, name) for name in _IMAGE_COLUMNS + _BOX_COLUMNS}
        return {**arrays, "file_names.utf8": utf8, "file_names.starts": starts, "file_names.ends": ends}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, name: str, categories: tuple[Category, ...], notes: tuple[str, ...]
    ) -> AnnotationTable:
        """Make a table of what ``to_arrays`` returned, without copying."""
        file_names = FileNames.from_arrays(*(arrays[f"file_names.{part}"] for part in ("utf8", "starts", "ends")))
        columns: dict[str, Any] = {column: arrays[column] for column in _IMAGE_COLUMNS + _BOX_COLUMNS}
        return cls(name=name, categories=categories, file_names=file_names, notes=notes, **columns)


_IMAGE_COLUMNS = ("image_ids", "sizes", "offsets")
_BOX_COLUMNS = ("boxes_xywh", "labels", "area", "crowd", "difficult", "annotation_ids")

ForkingPickler.register(AnnotationTable, reduce_for_worker)


def _corners(boxes_xywh: Floats, height: Any, width: Any) -> Floats:
    """Return ``[N, 4]`` boxes as ``(x1, y1, x2, y2)`` clipped to one image, or each to its own."""
    x, y, w, h = boxes_xywh.T
    x1, x2 = np.clip(x, 0, width), np.clip(x + w, 0, width)
    y1, y2 = np.clip(y, 0, height), np.clip(y + h, 0, height)
    return np.stack([x1, y1, x2, y2], axis=1)


def _has_extent(boxes_xywh: Floats, boxes_in_image: Floats) -> Bools:
    with np.errstate(invalid="ignore"):
        sides = boxes_in_image[:, 2:] - boxes_in_image[:, :2]  # [N, 2]
        sound: Bools = np.all(np.isfinite(boxes_xywh), axis=1) & np.all(sides >= MIN_TRAINABLE_SIDE, axis=1)
    return sound
