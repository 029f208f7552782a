"""Datasets of ``(image, target)`` in torchvision's convention, for training and evaluation as if they came from files.

All items are read once to fill the annotation table, for evaluation, sampling and the classes; of torchvision's
``CocoDetection`` without transforms the annotations are taken as they are. Training then reads image and boxes of an
item together at each draw, with torch's, NumPy's and Python's generators seeded for it: random transforms of the
dataset are repeated by a resumed run, whatever the number of workers.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from tqdm import tqdm

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable, FileNames
from resdet.data.augment.pipeline import Augment
from resdet.data.augment.sample import Sample, extent
from resdet.data.dataset import DetectionDataset, without_subset
from resdet.data.loader import eval_keys
from resdet.data.sources import image_in_memory
from resdet.data.workers import Keys, load_batches
from resdet.errors import DataError, name_some
from resdet.processes import Processes
from resdet.random_states import seeded
from resdet.types import Bools, Category, Floats, Ints

logger = logging.getLogger(__name__)

_ALONE = Processes(0, 1, torch.device("cpu"))
_READ_AT_ONCE = 16


class Facts(NamedTuple):
    """What the annotation table holds of an item: one row of each column for each box, as the target has it."""

    image_id: int
    size: tuple[int, int]  # (height, width)
    boxes: Floats  # [N, 4], (x1, y1, x2, y2)
    labels: Ints  # [N], 1..K
    area: Floats  # [N]
    crowd: Bools  # [N]
    difficult: Bools  # [N]


def wrap_dataset(
    dataset: Dataset[Any],
    *,
    classes: Sequence[str] | None = None,
    unnamed: Sequence[str] | None = None,
    name: str = "dataset",
    training: bool = False,
    augment: Augment | None = None,
    num_workers: int = 0,
    team: Processes = _ALONE,
) -> DetectionDataset:
    """Return a dataset of ``(image, target)`` as a ``DetectionDataset``; one that is (a ``Subset`` of) one as it is.

    An image is a PIL image, a tensor ``[3, H, W]`` (uint8, or floating-point in [0, 1], which is rounded to 8 bits) or
    a uint8 array ``[H, W, 3]``; gray ones are repeated. A target is None for an image without objects, or a dict:
    ``boxes`` ``[N, 4]`` (xyxy in pixels; tv_tensors of another format are converted), ``labels`` int ``[N]``, 1..K, and
    optionally ``image_id``, ``area``, ``iscrowd`` and ``difficult``. Labels of a ``CocoDetection`` are category ids.

    Args:
        dataset: Any map-style dataset, also ``Subset`` and ``ConcatDataset``.
        classes: Names of labels 1, 2, ...; None takes ``dataset.classes`` or a ``CocoDetection``'s, or else the numbers
            up to the largest label.
        unnamed: Names of the classes of a dataset that has none, in place of those numbers.
        name: What messages call it.
        training: As for ``DetectionDataset``.
        augment: As for ``DetectionDataset``.
        num_workers: Processes that read the items for the table.
        team: The processes that share this reading, each of which must call this.

    Raises:
        DataError: If an item is not of this form; the message has its index. Or as ``DetectionDataset``.
    """
    if _is_own(dataset):
        own = without_subset(dataset)  # type: ignore[arg-type]
        return own.for_training(augment) if training else own
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        what = "must have __getitem__ and __len__, as a map-style torch.utils.data.Dataset has"
        raise DataError(f"{name}: {what}; got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise DataError(f"{name}: has no images")
    items = _TorchItems(dataset, name, _classes_of(dataset, name, classes, unnamed), is_steady=not training)
    table = items.table(num_workers, team)
    return DetectionDataset(table, items.image, augment, training=training, items=items.item)


def _is_own(dataset: Any) -> bool:
    return _is_own(dataset.dataset) if isinstance(dataset, Subset) else isinstance(dataset, DetectionDataset)


class _Classes(NamedTuple):
    """What labels a dataset's targets may have."""

    names: tuple[str, ...] | None  # in label order; None until all labels are known
    category_ids: tuple[int, ...] | None = None  # labels are these, in label order; None: 1..K

    def labels(self, given: Floats, where: str) -> Ints:
        """Return labels 1..K, int64 ``[N]``, for those of a target."""
        if self.category_ids is not None:
            known, what = self.category_ids, "a category id of its annotations"
        else:
            last = None if self.names is None else len(self.names)
            known = tuple(range(1, (int(given.max(initial=0)) if last is None else last) + 1))
            what = f"in 1..{'K' if last is None else last} (0 is the background)"
        wrong = np.flatnonzero(~np.isin(given, known))
        if wrong.size:
            raise DataError(f"{where}: a label must be {what}; got {given[wrong[0]]:g} for box {wrong[0]}")
        return np.searchsorted(known, given).astype(np.int64) + 1


def _classes_of(dataset: Any, name: str, classes: Sequence[str] | None, unnamed: Sequence[str] | None) -> _Classes:
    """Return the stated classes, or those that the dataset has, or the stated ones for a dataset without."""
    found = {_own_classes(part) for part in _parts(dataset)} if classes is None else {_Classes(tuple(classes))}
    if len(found) > 1:
        raise DataError(f"{name}: its parts must have the same classes in the same order: give classes=[...]")
    chosen = found.pop()
    if chosen.names is None and unnamed is not None:
        chosen = _Classes(tuple(unnamed))
    if chosen.names is not None and len(set(chosen.names)) < len(chosen.names):
        raise DataError(f"{name}: classes must have different names, got {name_some(chosen.names, 10)}")
    if chosen.category_ids is not None:
        logger.info("%s: labels are taken as category ids of its annotations (classes=[...]: as 1..K)", name)
    return chosen


def _own_classes(dataset: Any) -> _Classes:
    categories = getattr(getattr(dataset, "coco", None), "cats", None)
    if categories:
        ids = tuple(sorted(categories))
        return _Classes(tuple(categories[category_id]["name"] for category_id in ids), ids)
    for key in ("classes", "class_names", "categories"):
        names = getattr(dataset, key, None)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            has_background = names[0].strip("_").casefold() == "background"  # as torchvision's meta["categories"]
            return _Classes(tuple(names[has_background:]))
    return _Classes(None)


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield the datasets that a ``Subset`` or ``ConcatDataset`` is made of, any other as it is."""
    if isinstance(dataset, Subset):
        yield from _parts(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        yield from itertools.chain.from_iterable(map(_parts, dataset.datasets))
    else:
        yield dataset


class _TorchItems:
    """The items of a dataset, checked and converted; workers get a copy, or share it where they are forked.

    One that ``is_steady`` must return images of the same size at each reading.
    """

    def __init__(self, dataset: Any, name: str, classes: _Classes, *, is_steady: bool) -> None:
        self._dataset, self._name, self._classes, self._is_steady = dataset, name, classes, is_steady
        self._sizes: npt.NDArray[np.int32] | None = None  # of the first reading

    def table(self, num_workers: int, team: Processes) -> AnnotationTable:
        """Read every item once and return the table of all."""
        num_images, what = len(self._dataset), f"reading {self._name}"
        keys = eval_keys(num_images, _READ_AT_ONCE, rank=team.rank, world_size=team.world_size)
        own: list[tuple[int, Facts]] = []
        with tqdm(total=num_images, desc=what, unit="image", delay=2, disable=not team.is_main) as bar:
            for (batch,) in load_batches(self._facts, keys, num_workers=num_workers, device=torch.device("cpu")):
                own += batch
                bar.update(len(batch) * team.world_size)
        shares = itertools.chain.from_iterable(team.gather(own))
        rows = [facts for _, facts in sorted(shares, key=lambda share: share[0])]
        image_ids, sizes, *columns = zip(*rows, strict=True)
        boxes, labels, area, crowd, difficult = map(np.concatenate, columns)
        if len(boxes) and 0 < boxes.max() <= 1:
            raise DataError(f"{self._name}: boxes must be in pixels, but all of them are within 1 pixel: normalised?")
        names = self._classes.names
        if names is None:
            names = tuple(str(label) for label in range(1, int(labels.max(initial=0)) + 1))
            logger.info("%s: %d classes without names, called by their labels (classes=[...])", self._name, len(names))
        category_ids = self._classes.category_ids or range(1, len(names) + 1)
        self._sizes = np.array(sizes, dtype=np.int32)
        return AnnotationTable(
            name=f"{self._name} ({type(self._dataset).__name__})",
            categories=tuple(map(Category, range(1, len(names) + 1), category_ids, names)),
            image_ids=np.array(image_ids if len(set(image_ids)) == num_images else range(num_images), dtype=np.int64),
            file_names=FileNames([f"item_{index}" for index in range(num_images)]),
            sizes=self._sizes,
            offsets=np.cumsum([0, *(len(facts.labels) for facts in rows)]).astype(np.int64),
            boxes_xywh=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
            labels=labels,
            area=area,
            crowd=crowd,
            difficult=difficult,
            annotation_ids=np.arange(1, len(labels) + 1),
        )

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Return an image, uint8 RGB ``[H, W, 3]``."""
        return self._read(index, 0)[0]

    def item(self, index: int, seed: int) -> Sample:
        """Return an image with the boxes that come with it, clipped; those that are too thin are left out."""
        image, facts = self._read(index, seed)
        boxes = np.clip(facts.boxes, 0, extent(image.shape))
        sample = Sample(
            image=image,
            image_id=facts.image_id,
            boxes=boxes.astype(np.float32),
            labels=facts.labels,
            crowd=facts.crowd,
            difficult=facts.difficult,
            annotation_ids=np.arange(len(boxes)),
            visible=np.ones(len(boxes)),
        )
        return sample.select(np.all(boxes[:, 2:] - boxes[:, :2] >= MIN_TRAINABLE_SIDE, axis=1))

    def _facts(self, keys: Keys) -> tuple[list[tuple[int, Facts]]]:
        """Return the facts of some items by their indices, of annotations without their images."""
        return ([(index, self._known(index) or self._read(index, seed)[1]) for index, seed in keys],)

    def _known(self, index: int) -> Facts | None:
        known = _annotated(self._dataset, index)
        return None if known is None else _facts_of(known[1], known[0], index, self._classes, self._where(index))

    def _read(self, index: int, seed: int) -> tuple[npt.NDArray[np.uint8], Facts]:
        with seeded(seed):
            item = self._dataset[index]
        where, known = self._where(index), self._known(index)
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where}: must be a pair of image and target, got {type(item).__name__}")
        image = _pixels(item[0], where)
        height, width = size = (image.shape[0], image.shape[1])
        first = None if self._sizes is None else tuple(self._sizes[index].tolist())
        if first not in (None, size) and (self._is_steady or known is not None):
            raise DataError(
                f"{where}: must be {first[1]}x{first[0]} pixels, as at its first reading or in its annotations, and is "
                f"{width}x{height}: a dataset for evaluation must return the same each time"
            )
        return image, known or _facts_of(item[1], size, index, self._classes, where)

    def _where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def _annotated(dataset: Any, index: int) -> tuple[tuple[int, int], dict[str, Any]] | None:
    """Return size and target of an item of torchvision's ``CocoDetection`` without transforms; None of any other."""
    while isinstance(dataset, (Subset, ConcatDataset)):
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        else:
            part = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    transforms = (getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms"))
    # torchvision's wrapper of it leaves crowd regions and areas out of the targets.
    if type(getattr(dataset, "_dataset", dataset)) is not CocoDetection or any(one is not None for one in transforms):
        return None
    image_id = dataset.ids[index]
    image, objects = dataset.coco.imgs[image_id], dataset.coco.imgToAnns.get(image_id, [])
    boxes = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return (image["height"], image["width"]), {
        "image_id": image_id,
        "boxes": boxes,
        "labels": [one["category_id"] for one in objects],
        "area": [one.get("area", one["bbox"][2] * one["bbox"][3]) for one in objects],
        "iscrowd": [one.get("iscrowd", 0) for one in objects],
    }


def _pixels(image: Any, where: str) -> npt.NDArray[np.uint8]:
    """Return an image of any accepted kind as uint8 RGB ``[H, W, 3]``."""
    if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
        raise DataError(f"{where}: must have a PIL image, a tensor or an array, got {type(image).__name__}")
    if isinstance(image, Tensor):
        image = image.as_subclass(Tensor)  # torchvision's tv_tensors
        image = image.expand(3, -1, -1) if image.shape[:-2] == (1,) else image
    return image_in_memory(image, where)


def _facts_of(target: Any, size: tuple[int, int], index: int, classes: _Classes, where: str) -> Facts:
    """Return what a target says of an image of ``size``."""
    if not isinstance(target, Mapping | None):
        hint = "; torchvision.datasets.wrap_dataset_for_transforms_v2 makes such targets of torchvision's own datasets"
        what = f"must have a dict with boxes and labels as its target, or None, got {type(target).__name__}"
        raise DataError(f"{where}: {what}{hint if isinstance(target, list) else ''}")
    target = target or {}
    boxes = _boxes(target.get("boxes"), size, where)
    columns = {"labels": np.zeros(0), "area": np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)}
    columns |= dict.fromkeys(("iscrowd", "difficult"), np.zeros(len(boxes)))
    for key in columns:
        if target.get(key) is not None:
            columns[key] = _numbers(target[key], key, where).reshape(-1)
        if len(columns[key]) != len(boxes):
            raise DataError(f"{where}: must have one of {key} for each box, got {len(columns[key])} for {len(boxes)}")
    try:
        image_id = int(target.get("image_id", index))
    except (TypeError, ValueError):  # a file's name, say
        image_id = index
    labels = classes.labels(columns["labels"], where)
    return Facts(image_id, size, boxes, labels, columns["area"], columns["iscrowd"] != 0, columns["difficult"] != 0)


def _boxes(given: Any, size: tuple[int, int], where: str) -> Floats:
    """Return boxes ``(x1, y1, x2, y2)``, float64 ``[N, 4]``."""
    boxes = _numbers(() if given is None else given, "boxes", where)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"{where}: must have boxes of shape [N, 4], got {list(boxes.shape)}")
    form = getattr(getattr(given, "format", None), "name", "XYXY")  # of torchvision's tv_tensors
    if form != "XYXY":
        boxes = box_convert(torch.from_numpy(boxes), form.lower(), "xyxy").numpy()
    (x1, y1, x2, y2), (height, width) = boxes.T, size
    is_outside = (x1 > width) | (y1 > height) | (x2 < 0) | (y2 < 0)
    for wrong, what in (
        (~np.isfinite(boxes).all(axis=1), "be finite"),
        ((x2 < x1) | (y2 < y1), "be (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, not (x, y, width, height)"),
        (is_outside, f"meet its image, {width}x{height} px"),
    ):
        if wrong.any():
            row = np.flatnonzero(wrong)[0]
            raise DataError(f"{where}: a box must {what}; got {boxes[row].tolist()} for box {row}")
    return boxes


def _numbers(value: Any, key: str, where: str) -> Floats:
    try:
        return np.asarray(torch.as_tensor(value).detach().cpu().as_subclass(Tensor), dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: must have numbers as its {key}: {error}") from None
