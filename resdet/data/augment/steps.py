"""Augmentation that albumentations lacks: large-scale jitter, tiles, and steps that mix several images.

A step takes a ``Sample`` with float64 boxes and returns another: boxes clipped to its image, ``visible`` multiplied by
the share of each box that the step has left. ``Augment`` drops boxes with too little left after each step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from resdet.data.augment.sample import Sample, joined, uncovered
from resdet.types import Floats

Image = npt.NDArray[np.uint8]
Size = tuple[int, int]  # (height, width); of a corner (top, left)
Partner = Callable[[np.random.Generator], Sample]
"""Draws another image of the dataset, with its boxes, as the steps before this one leave it."""


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must not fall, got {list(pair)}")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=1, le=16384)]
ScaleRange = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_rising)]
ShareRange = Annotated[tuple[Probability, Probability], AfterValidator(_rising)]
CountRange = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], AfterValidator(_rising)]


class Step(BaseModel):
    """Base class of the steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    p: Probability = 0.5  # of being applied

    @abstractmethod
    def apply(self, sample: Sample, rng: np.random.Generator, partner: Partner) -> Sample:
        """Return the sample after this step."""


class LargeScaleJitter(Step):
    """Scale an image at random, keeping its shape, into a picture of one fixed size, by cropping or padding.

    At scale 1 the image just fits into the picture. A larger one is cut to a random window; a smaller one lies at the
    top left and the rest is filled. Set the detector's ``min_size`` to the shorter side of ``size`` and ``max_size``
    to the longer: otherwise it scales the picture once more.

    Source: Ghiasi et al. 2021 (Simple Copy-Paste), section 3; the details are those of detectron2's ``ResizeScale``
    and ``FixedSizeCrop``. Deviation: pixels are averaged over their area where the image shrinks and interpolated by
    OpenCV where it grows; detectron2 uses Pillow's bilinear filter for both.
    """

    scale_range: ScaleRange = (0.1, 2.0)  # bounds of the scale, which is drawn uniformly
    size: tuple[Side, Side] = (1024, 1024)  # (height, width) of the picture, pixels
    fill: Annotated[int, Field(ge=0, le=255)] = 128  # value of the padding in all channels
    p: Probability = 1.0

    def apply(self, sample: Sample, rng: np.random.Generator, partner: Partner) -> Sample:
        """Return the jittered sample."""
        height, width = sample.image.shape[:2]
        fit = min(self.size[0] / height, self.size[1] / width)
        new_size = _scaled(height, width, fit * rng.uniform(*self.scale_range))
        seen = _random_window(sample, new_size, self.size, rng)
        seen_height, seen_width = seen.image.shape[:2]
        if (seen_height, seen_width) == self.size:
            return seen
        picture = np.full((*self.size, 3), self.fill, dtype=np.uint8)
        picture[:seen_height, :seen_width] = seen.image
        return replace(seen, image=picture)


class RandomTile(Step):
    """Cut a square tile out of a large image, for a detector that will detect tile by tile (``eval.tiles``).

    A tile is drawn around an object, one of all with equal chances, or anywhere. Around an object it is drawn uniformly
    from those that hold all of it, or, of one larger than the tile, from those that lie within it. Images smaller than
    the tile along a side are kept whole along it. Set ``side`` to that of ``eval.tiles`` and let this step stand first:
    those that follow have fewer pixels to compute.

    Each draw decodes a whole file for one tile: 24 megapixels of a 6000x4000 photograph, and 72 MB in each worker. If
    the log shows that training waits for data, cut such files into smaller ones once.
    """

    side: Annotated[int, Field(ge=32, le=16384)] = 800  # of the tile, pixels
    object_share: Probability = 0.75  # of the tiles that are drawn around an object, in images that have one
    p: Probability = 1.0

    def apply(self, sample: Sample, rng: np.random.Generator, partner: Partner) -> Sample:
        """Return the tile, with the boxes that meet it."""
        objects = np.flatnonzero(~sample.crowd & ~sample.difficult)
        height, width = sample.image.shape[:2]
        window = min(self.side, height), min(self.side, width)
        low, high = np.zeros(2), np.array([height - window[0], width - window[1]])  # of the corner, (top, left)
        if rng.random() < self.object_share and len(objects):
            x1, y1, x2, y2 = sample.boxes[rng.choice(objects)]
            bounds = np.array([(y2 - window[0], x2 - window[1]), (y1, x1)])
            low, high = (
                np.clip(np.ceil(bounds.min(axis=0)), low, high),
                np.clip(np.floor(bounds.max(axis=0)), low, high),
            )
        top, left = (int(rng.integers(int(a), max(int(a), int(b)) + 1)) for a, b in zip(low, high, strict=True))
        tile = sample.moved(
            sample.image[top : top + window[0], left : left + window[1]], _shifted(sample.boxes, -left, -top)
        )
        return tile.select(tile.visible > 0)


class Mosaic(Step):
    """Put four images together, one in each quarter around a random centre.

    Each image, this one at the top left and three others, is scaled, keeping its shape, and cut at random to fill its
    quarter. At scale 1 it would just fit into the whole picture; it becomes larger where it would not fill its quarter.

    Source: Bochkovskiy et al. 2020 (YOLOv4), section 3.3, with the cuts between 0.2 and 0.8 of darknet's
    ``data.c``. Deviation: images keep their shape, and colours and flips are steps of their own.
    """

    size: tuple[Side, Side] | None = None  # (height, width) of the picture, pixels; null takes the image's own
    center_range: ShareRange = (0.2, 0.8)  # bounds of the centre, drawn uniformly, as shares of height and width
    scale_range: ScaleRange = (0.4, 1.0)  # bounds of the scale of each image, drawn uniformly

    def apply(self, sample: Sample, rng: np.random.Generator, partner: Partner) -> Sample:
        """Return the mosaic, with the boxes of all four images."""
        height, width = self.size or sample.image.shape[:2]
        middle = round(height * rng.uniform(*self.center_range)), round(width * rng.uniform(*self.center_range))
        picture = np.empty((height, width, 3), dtype=np.uint8)
        parts = []
        for quarter in range(4):
            top, bottom = (0, middle[0]) if quarter < 2 else (middle[0], height)
            left, right = (0, middle[1]) if quarter % 2 == 0 else (middle[1], width)
            part = sample if quarter == 0 else partner(rng)
            scale = rng.uniform(*self.scale_range)
            # A centre on the border leaves a quarter without pixels, and so without boxes.
            if bottom == top or right == left:
                parts.append(part.select(np.zeros(0, dtype=np.int64)))
                continue
            (own_height, own_width), window = part.image.shape[:2], (bottom - top, right - left)
            fit = min(height / own_height, width / own_width)
            fill = max(window[0] / own_height, window[1] / own_width)
            new_height, new_width = _scaled(own_height, own_width, max(scale * fit, fill))
            # Rounding may leave it a pixel short.
            seen = _random_window(part, (max(new_height, window[0]), max(new_width, window[1])), window, rng)
            picture[top:bottom, left:right] = seen.image
            parts.append(replace(seen, boxes=_shifted(seen.boxes, left, top)))
        return replace(joined(parts), image=picture)


class CopyPaste(Step):
    """Paste objects of another image: the rectangles of their boxes, as there are no masks here.

    Objects are drawn that are neither crowd regions nor difficult. The rectangles are scaled and lie at random places
    wholly inside the image, one over the other in the order drawn. Whatever else of the other image lies within one
    comes along with its box, crowd regions and difficult objects too: nothing is pasted without a label. Of a box under
    pasted rectangles, the share that is covered is lost, and the box shrinks to what surrounds the rest.

    Source: Dwibedi et al. 2017 (Cut, Paste and Learn), section 4, random places and occlusion; Ghiasi et al. 2021,
    section 3, objects of another training image. Deviations: rectangles and not segments, and so a limit to their
    area; no blending of edges.
    """

    num_objects: CountRange = (1, 3)  # bounds of the number pasted, fewer where the other image has fewer
    scale_range: ScaleRange = (0.5, 1.5)  # bounds of the scale of each rectangle, drawn uniformly
    max_area: Share = 0.25  # share of the image that a rectangle may cover; larger ones are scaled down to it

    def apply(self, sample: Sample, rng: np.random.Generator, partner: Partner) -> Sample:
        """Return the sample with objects pasted over it."""
        other = partner(rng)
        candidates = np.flatnonzero(~other.crowd & ~other.difficult)
        num_objects = min(int(rng.integers(self.num_objects[0], self.num_objects[1] + 1)), len(candidates))
        if num_objects == 0:
            return sample
        height, width = sample.image.shape[:2]
        picture = sample.image.copy()
        layers, covers = [sample], []
        for row in rng.choice(candidates, size=num_objects, replace=False):
            # The pixels that the object's box touches, and the boxes that lie in them.
            x1, y1 = np.floor(other.boxes[row, :2]).astype(int).tolist()
            x2, y2 = np.ceil(other.boxes[row, 2:]).astype(int).tolist()
            patch = other.moved(other.image[y1:y2, x1:x2], _shifted(other.boxes, -x1, -y1))
            patch = patch.select(patch.visible > 0)
            patch_height, patch_width = patch.image.shape[:2]
            by_area = (self.max_area * height * width / (patch_height * patch_width)) ** 0.5
            largest = min(height / patch_height, width / patch_width, by_area)
            scaled = _scaled(patch_height, patch_width, min(rng.uniform(*self.scale_range), largest))
            new_size = new_height, new_width = min(scaled[0], height), min(scaled[1], width)
            patch = _scaled_window(patch, new_size, (0, 0), new_size)
            top, left = int(rng.integers(height - new_height + 1)), int(rng.integers(width - new_width + 1))
            picture[top : top + new_height, left : left + new_width] = patch.image
            layers.append(replace(patch, boxes=_shifted(patch.boxes, left, top)))
            covers.append((left, top, left + new_width, top + new_height))
        for i, layer in enumerate(layers):
            boxes, share = uncovered(layer.boxes, np.array(covers[i:], dtype=np.float64).reshape(-1, 4))
            layers[i] = replace(layer, boxes=boxes, visible=layer.visible * share)
        return replace(joined(layers), image=picture)


def _shifted(boxes: Floats, x: int, y: int) -> Floats:
    return boxes + np.array([x, y, x, y], dtype=np.float64)


def _scaled(height: int, width: int, scale: float) -> Size:
    return max(1, round(height * scale)), max(1, round(width * scale))


def _random_window(sample: Sample, new_size: Size, window: Size, rng: np.random.Generator) -> Sample:
    """Scale a sample to ``new_size`` and cut a random ``window`` out of it, or less along a side that is shorter."""
    inside = min(new_size[0], window[0]), min(new_size[1], window[1])
    top, left = int(rng.integers(new_size[0] - inside[0] + 1)), int(rng.integers(new_size[1] - inside[1] + 1))
    return _scaled_window(sample, new_size, (top, left), inside)


def _scaled_window(sample: Sample, new_size: Size, corner: Size, window: Size) -> Sample:
    """Scale a sample to ``new_size`` and cut out ``window`` ``(height, width)``, its top left pixel at ``corner``."""
    (height, width), (new_height, new_width), (top, left) = sample.image.shape[:2], new_size, corner
    ratio = np.array([new_width / width, new_height / height] * 2)
    image = _scaled_pixels(sample.image, new_size, corner, window)
    return sample.moved(image, _shifted(sample.boxes * ratio, -left, -top))


_WHOLE = 4
"""Up to this many times the window's area, resizing the whole image is faster than computing the window alone (1.9 ms
against 3.5 ms for 1024x1024 out of 1536x2048 on one core)."""


def _scaled_pixels(image: Image, new_size: Size, corner: Size, window: Size) -> Image:
    (height, width), (new_height, new_width), (top, left) = image.shape[:2], new_size, corner
    if new_size == (height, width):
        return image[top : top + window[0], left : left + window[1]]
    shrinks = new_height <= height and new_width <= width
    if shrinks or new_height * new_width <= _WHOLE * window[0] * window[1]:
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        whole = cv2.resize(image, (new_width, new_height), interpolation=how)
        return np.asarray(whole[top : top + window[0], left : left + window[1]])
    # Compute the window alone: its pixel centres, at x + 0.5, mapped back into the image.
    per_y, per_x = height / new_height, width / new_width
    back = np.array([[per_x, 0, (left + 0.5) * per_x - 0.5], [0, per_y, (top + 0.5) * per_y - 0.5]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(image, back, window[::-1], flags=how, borderMode=cv2.BORDER_REPLICATE))
