"""Datasets of ``(image, target)`` in torchvision's convention, for training and evaluation as if they came from files.

All items are read once to fill the annotation table, for evaluation, sampling and the classes; of torchvision's
``CocoDetection`` without transforms the annotations are taken as they are. Training then reads image and boxes of an
item together at each draw, with torch's, NumPy's and Python's generators seeded for it: random transforms of the
dataset are repeated by a resumed run, whatever the number of workers.
"""

from __future__ import annotations

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
    a uint8 array ``[H, W, 3]``; grayscale is repeated. A target is None for an image without objects, or a dict:
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
        return without_subset(dataset).for_training(augment) if training else without_subset(dataset)  # type: ignore[arg-type]
    items = _TorchItems(dataset, name, classes, unnamed, training)
    table = items.table(num_workers, team)
    return DetectionDataset(table, items.image, augment, training=training, items=items.item)


def _is_own(dataset: Any) -> bool:
    return _is_own(dataset.dataset) if isinstance(dataset, Subset) else isinstance(dataset, DetectionDataset)


class _TorchItems:
    """The items of a dataset, checked and converted; workers get a copy, or share it where they are forked."""

    def __init__(
        self, dataset: Any, name: str, classes: Sequence[str] | None, unnamed: Sequence[str] | None, training: bool
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            what = "must have __getitem__ and __len__, as a map-style torch.utils.data.Dataset has"
            raise DataError(f"{name}: {what}; got {type(dataset).__name__}")
        self._dataset, self._name, self._training = dataset, name, training
        self._names, self._label_of = self._own_classes() if classes is None else (list(classes), None)
        if self._names is None and unnamed is not None:
            self._names = list(unnamed)
        if self._names is not None and len(set(self._names)) < len(self._names):
            raise DataError(f"{name}: classes must have different names, got {name_some(self._names, 10)}")
        self._sizes: npt.NDArray[np.int32] | None = None  # of the first reading

    def _own_classes(self) -> tuple[list[str] | None, dict[int, int] | None]:
        """Return the dataset's class names in label order, if it has any, and the label of each category id."""
        found = {_names_of(part) for part in _parts(self._dataset)}
        if len(found) > 1:
            raise DataError(f"{self._name}: its parts must have the same classes in the same order: give classes=[...]")
        names, ids = found.pop() if found else (None, None)
        if ids is not None:
            return list(names or ()), {category_id: label for label, category_id in enumerate(ids, start=1)}
        return None if names is None else list(names), None

    def table(self, num_workers: int, team: Processes) -> AnnotationTable:
        """Read every item once and return the table of all."""
        num_images = len(self._dataset)
        if num_images == 0:
            raise DataError(f"{self._name}: has no images")
        keys = eval_keys(num_images, _READ_AT_ONCE, rank=team.rank, world_size=team.world_size)
        own: list[tuple[int, Facts]] = []
        with tqdm(
            total=sum(map(len, keys)), desc=f"reading {self._name}", unit="image", delay=2, disable=not team.is_main
        ) as bar:
            for (batch,) in load_batches(self._facts, keys, num_workers=num_workers, device=torch.device("cpu")):
                own += batch
                bar.update(len(batch))
        rows = [
            facts for _, facts in sorted((pair for share in team.gather(own) for pair in share), key=lambda p: p[0])
        ]
        boxes, labels, area, crowd, difficult = (np.concatenate(column) for column in list(zip(*rows, strict=True))[2:])
        if len(boxes) and 0 < boxes.max() <= 1:
            raise DataError(f"{self._name}: boxes must be in pixels, but all of them are within 1 pixel: normalised?")
        ids = np.array([facts.image_id for facts in rows], dtype=np.int64)
        names = self._names or [str(label) for label in range(1, int(labels.max(initial=0)) + 1)]
        category_ids = list(self._label_of or range(1, len(names) + 1))
        self._sizes = np.array([facts.size for facts in rows], dtype=np.int32)
        if self._label_of is not None:
            logger.info("%s: labels are taken as category ids of its annotations (classes=[...]: as 1..K)", self._name)
        elif self._names is None:
            logger.info("%s: %d classes without names, called by their labels (classes=[...])", self._name, len(names))
        return AnnotationTable(
            name=f"{self._name} ({type(self._dataset).__name__})",
            categories=tuple(map(Category, range(1, len(names) + 1), category_ids, names)),
            image_ids=ids if len(np.unique(ids)) == num_images else np.arange(num_images),
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
        facts = []
        for index, seed in keys:
            known = _annotated(self._dataset, index)
            facts.append((index, self._read(index, seed)[1] if known is None else self._checked(index, *known)))
        return (facts,)

    def _read(self, index: int, seed: int) -> tuple[npt.NDArray[np.uint8], Facts]:
        with seeded(seed):
            item = self._dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise self._wrong(index, f"must be a pair of image and target, got {type(item).__name__}")
        image, target = self._pixels(index, item[0]), {} if item[1] is None else item[1]
        size, known = image.shape[:2], _annotated(self._dataset, index)
        if isinstance(target, list) and known is not None:  # torchvision's CocoDetection as it is
            target = known[1]
        if not isinstance(target, Mapping):
            hint = (
                "; torchvision.datasets.wrap_dataset_for_transforms_v2 makes such targets of torchvision's own datasets"
            )
            what = f"must have a dict with boxes and labels as its target, or None, got {type(target).__name__}"
            raise self._wrong(index, what + (hint if isinstance(target, list) else ""))
        if known is not None and len(known[1]["labels"]) == len(target.get("labels", ())):
            target = {**known[1], **target}  # torchvision's wrapper leaves iscrowd and area out
        if not self._training and self._sizes is not None and size != tuple(self._sizes[index]):
            height, width = self._sizes[index]
            was = f"was {width}x{height} pixels when it was first read, and is {size[1]}x{size[0]} now"
            raise self._wrong(index, f"{was}: a dataset for evaluation must return the same each time")
        return image, self._checked(index, (size[0], size[1]), target)

    def _pixels(self, index: int, image: Any) -> npt.NDArray[np.uint8]:
        """Return an image of any accepted kind as uint8 RGB ``[H, W, 3]``."""
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        elif isinstance(image, Tensor):
            array = image.detach().cpu().as_subclass(Tensor)
            image = (array.float() if array.is_floating_point() else array).numpy()
            image = image.transpose(1, 2, 0) if image.ndim == 3 else image[None]  # [H, W, C]
        if not isinstance(image, np.ndarray):
            raise self._wrong(index, f"must have a PIL image, a tensor or an array, got {type(image).__name__}")
        if np.issubdtype(image.dtype, np.floating):
            low, high = image.min(initial=0), image.max(initial=0)
            if not (low >= -1e-3 and high <= 1 + 1e-3):
                what = "a floating-point image must be in [0, 1], since the detector normalises (model.image_mean)"
                raise self._wrong(index, f"{what}; got {low:.3g} to {high:.3g}")
            image = (image.clip(0, 1) * 255).round().astype(np.uint8)
        image = image[:, :, None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            what = "must have an image of 1 or 3 channels, a uint8 or float tensor [C, H, W] or a uint8 array [H, W, C]"
            raise self._wrong(index, f"{what}; got {image.dtype}, as [H, W, C] {list(image.shape)}")
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

    def _checked(self, index: int, size: tuple[int, int], target: Mapping[str, Any]) -> Facts:
        """Return what a target says of an image of ``size``."""
        boxes = self._boxes(index, target)
        num_boxes, none = len(boxes), np.zeros(len(boxes))
        x1, y1, x2, y2 = boxes.T
        height, width = size
        labels = self._column(index, target, "labels", none[:0])
        area = self._column(index, target, "area", (x2 - x1) * (y2 - y1))
        crowd, difficult = (self._column(index, target, key, none) for key in ("iscrowd", "difficult"))
        if len(labels) != num_boxes:
            raise self._wrong(index, f"must have one label for each box, got {len(labels)} for {num_boxes} boxes")
        in_order = "must be (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, not (x, y, width, height)"
        if self._label_of is not None:
            known, of = list(self._label_of), "a category id of its annotations"
        else:
            last = len(self._names) if self._names is not None else max(1, int(labels.max(initial=1)))
            known, of = (
                list(range(1, last + 1)),
                f"in 1..{last if self._names is not None else 'K'} (0 is the background)",
            )
        for wrong, what, values in (
            (~np.isfinite(boxes).all(axis=1), "a box must be finite", boxes),
            ((x2 < x1) | (y2 < y1), f"a box {in_order}", boxes),
            (
                (x1 > width) | (y1 > height) | (x2 < 0) | (y2 < 0),
                f"a box must meet its image, {width}x{height} px",
                boxes,
            ),
            (~np.isin(labels, known), f"a label must be {of}", labels),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise self._wrong(index, f"{what}; got {values[row].tolist()} for box {row}")
        ids = labels.astype(np.int64).tolist()
        try:
            image_id = int(target.get("image_id", index))
        except (TypeError, ValueError):  # a file's name, say
            image_id = index
        return Facts(
            image_id,
            size,
            boxes,
            np.array([self._label_of[one] for one in ids] if self._label_of else ids, dtype=np.int64),
            area,
            crowd != 0,
            difficult != 0,
        )

    def _boxes(self, index: int, target: Mapping[str, Any]) -> Floats:
        boxes = target.get("boxes")
        form = getattr(getattr(boxes, "format", None), "name", "XYXY")  # of torchvision's tv_tensors
        values = self._array(index, "boxes", () if boxes is None else boxes)
        if values.size == 0:
            return np.zeros((0, 4))
        if values.ndim != 2 or values.shape[1] != 4:
            raise self._wrong(index, f"must have boxes of shape [N, 4], got {list(values.shape)}")
        return values if form == "XYXY" else box_convert(torch.from_numpy(values), form.lower(), "xyxy").numpy()

    def _column(self, index: int, target: Mapping[str, Any], key: str, default: Floats) -> Floats:
        values = default if target.get(key) is None else self._array(index, key, target[key]).reshape(-1)
        if key != "labels" and len(values) != len(default):
            raise self._wrong(index, f"must have one {key} for each box, got {len(values)} for {len(default)} boxes")
        return values

    def _array(self, index: int, key: str, value: Any) -> Floats:
        try:
            return np.asarray(torch.as_tensor(value).detach().cpu().as_subclass(Tensor), dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._wrong(index, f"must have numbers as its {key}: {error}") from None

    def _wrong(self, index: int, what: str) -> DataError:
        return DataError(f"{self._name}[{index}]: {what}")


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


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield the datasets that a ``Subset`` or ``ConcatDataset`` is made of, any other as it is."""
    if isinstance(dataset, Subset):
        yield from _parts(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _parts(part)
    else:
        yield dataset


def _names_of(dataset: Any) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Return the class names that a dataset has, and their category ids if its labels are those."""
    categories = getattr(getattr(dataset, "coco", None), "cats", None)
    if categories:
        ids = tuple(sorted(categories))
        return tuple(categories[category_id]["name"] for category_id in ids), ids
    for key in ("classes", "class_names", "categories"):
        names = getattr(dataset, key, None)
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            has_background = names[0].strip("_").casefold() == "background"  # as torchvision's meta["categories"]
            return tuple(names[has_background:]), None
    return None, None
