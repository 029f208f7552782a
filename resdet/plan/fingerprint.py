"""Facts of a dataset from which a run is planned, read in seconds.

Boxes are all looked at; of images, ``MAX_IMAGES`` evenly spread ones are decoded. Legend: ``I`` images, ``N`` boxes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset
from resdet.data.image_facts import THUMBNAIL_SIZE, ImageFacts, near_duplicates
from resdet.data.images import ImageHeader
from resdet.data.order import evenly_spread
from resdet.errors import DataError
from resdet.types import Bools, Floats

MAX_IMAGES = 256
MAX_MEGAPIXELS = 400.0
"""How many images are decoded, and at most so many pixels of them; a JPEG of a megapixel takes some 10 ms."""

CROWDED_IOU = 0.5
"""IoU of two objects of one class from which non-maximum suppression at its usual threshold loses one of them."""

_MAX_CROWDS = 2000  # images, evenly spread, in which overlaps are looked at
_MAX_PAIRS_IN_IMAGE = 1000  # objects of an image whose overlaps are looked at
_GRAY = 2.0  # levels by which the channels of a gray image differ on average, JPEG's rounding included


@dataclass(frozen=True)
class Fingerprint:
    """What a training set is like. Percentiles are the 5th, 25th, 50th, 75th and 95th."""

    num_images: int
    num_boxes: int  # that are trained on
    image_size: tuple[int, int]  # medians of (height, width), pixels
    largest_side: int  # of all images, pixels
    object_sides: Floats  # percentiles of sqrt(area), pixels of the stored image
    relative_sides: Floats  # percentiles of sqrt(area) over the image's shorter side
    aspects: Floats  # percentiles of height / width
    objects_per_image: Floats  # percentiles
    most_objects: int  # in one image, of training or validation
    images_of_class: dict[str, int]  # training images with a box of each class
    crowded: float  # share of objects that another of their class overlaps by ``CROWDED_IOU``
    gray: bool  # whether all images that were looked at are gray
    alike: float  # share of the images looked at that are nearly the same as another

    @property
    def rarest(self) -> tuple[str, int]:
        """The class in the fewest images, of those that have any, and in how many it is."""
        return min(((name, count) for name, count in self.images_of_class.items() if count), key=lambda pair: pair[1])

    def lines(self) -> list[str]:
        """Return the facts as lines of text."""
        height, width = self.image_size
        low, _, middle, _, high = self.object_sides
        per_image = self.objects_per_image
        name, count = self.rarest
        return [
            f"{self.num_images} images, typically {width}x{height} px, {'gray' if self.gray else 'in colour'}; "
            f"{self.alike:.0%} are nearly the same as another",
            f"{self.num_boxes} objects of {middle:.0f} px (90 % have {low:.0f} to {high:.0f}), "
            f"{self.relative_sides[2]:.1%} of the shorter side; {self.aspects[2]:.2f} times as high as wide "
            f"({self.aspects[0]:.2f} to {self.aspects[4]:.2f})",
            f"{per_image[2]:.0f} objects in an image ({per_image[0]:.0f} to {per_image[4]:.0f}, at most "
            f"{self.most_objects}); {self.crowded:.1%} overlap one of their class by {CROWDED_IOU:g}",
            f"{len(self.images_of_class)} classes, the rarest ({name}) in {count} images",
        ]


def fingerprint(train_set: DetectionDataset, val_table: AnnotationTable | None = None) -> Fingerprint:
    """Return the facts of a training set; of validation images only the number of objects is looked at."""
    table, used = train_set.table, train_set.trained
    boxes, image_of_box = table.boxes_in_image()[used], table.image_of_box()[used]  # [N, 4], [N]
    labels = table.labels[used]
    width, height = (boxes[:, 2:] - boxes[:, :2]).T  # [N] each
    sides, aspects = np.sqrt(width * height), height / width
    shorter = table.sizes.min(axis=1)[image_of_box]
    per_image = np.bincount(image_of_box, minlength=table.num_images)  # [I]
    of_class = np.unique(np.stack([labels, image_of_box]), axis=1)[0]
    counts = np.bincount(of_class, minlength=table.num_classes)
    found = list(_thumbnails(train_set))
    most = max(int(one.objects_per_image().max(initial=0)) for one in (table, val_table or table))
    return Fingerprint(
        num_images=table.num_images,
        num_boxes=len(boxes),
        image_size=(int(np.median(table.sizes[:, 0])), int(np.median(table.sizes[:, 1]))),
        largest_side=int(table.sizes.max()),
        object_sides=_percentiles(sides),
        relative_sides=_percentiles(sides / shorter),
        aspects=_percentiles(aspects),
        objects_per_image=_percentiles(per_image),
        most_objects=most,
        images_of_class={category.name: int(counts[category.label]) for category in table.categories},
        crowded=float(_crowded(boxes, labels, image_of_box).mean()),
        gray=bool(found) and all(is_gray for _, is_gray in found),
        alike=_alike([facts for facts, _ in found]),
    )


def _percentiles(values: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Floats:
    percentiles: Floats = np.percentile(values, [5, 25, 50, 75, 95])
    return percentiles


def _crowded(boxes: Floats, labels: npt.NDArray[np.int64], image_of_box: npt.NDArray[np.int64]) -> Bools:
    """Return which boxes, of those looked at, one of their class overlaps by ``CROWDED_IOU``, bool ``[n]``."""
    found = [np.zeros(0, dtype=np.bool_)]
    images = np.unique(image_of_box)
    images = images[:: max(1, len(images) // _MAX_CROWDS)]
    starts, ends = (np.searchsorted(image_of_box, images, side) for side in ("left", "right"))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        rows = slice(start, min(end, start + _MAX_PAIRS_IN_IMAGE))
        own = boxes[rows]  # [n, 4]
        corners = np.maximum(own[:, None, :2], own[None, :, :2]), np.minimum(own[:, None, 2:], own[None, :, 2:])
        shared = np.prod(np.maximum(corners[1] - corners[0], 0), axis=2)  # [n, n]
        area = np.prod(own[:, 2:] - own[:, :2], axis=1)
        overlaps = shared >= CROWDED_IOU * (area[:, None] + area[None] - shared)
        same = labels[rows][:, None] == labels[rows][None]
        found.append((overlaps & same & ~np.eye(len(own), dtype=np.bool_)).any(axis=1))
    crowded: Bools = np.concatenate(found)
    return crowded


def _thumbnails(dataset: DetectionDataset) -> Iterator[tuple[ImageFacts, bool]]:
    """Yield what is known of evenly spread images, and whether each is gray; those that cannot be read are left out."""
    megapixels = float(dataset.table.sizes.prod(axis=1, dtype=np.float64).mean()) / 1e6
    number = max(1, min(MAX_IMAGES, len(dataset), int(MAX_MEGAPIXELS / megapixels)))
    for index in evenly_spread(len(dataset), number).tolist():
        try:
            pixels = dataset.image(index)
        except DataError:
            continue  # training replaces it, or has refused it
        small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
        is_gray = float(np.ptp(small, axis=2).mean()) <= _GRAY
        gray = Image.fromarray(pixels).convert("L").resize(THUMBNAIL_SIZE[::-1], Image.Resampling.BOX)
        header = ImageHeader(size=pixels.shape[:2], format="", mode="RGB", orientation=1)
        digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
        name = dataset.table.file_names[index]
        yield ImageFacts(name, header=header, digest=digest, thumbnail=gray.tobytes()), is_gray


def _alike(facts: list[ImageFacts]) -> float:
    """Return the share of images that are the same or nearly the same as another."""
    pairs = near_duplicates(facts)
    digests = [one.digest for one in facts]
    same = {i for i, digest in enumerate(digests) if digests.count(digest) > 1}
    return len({i for pair in pairs for i in pair} | same) / max(len(facts), 1)
