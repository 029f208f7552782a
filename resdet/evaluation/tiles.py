"""Detect in large images tile by tile.

A detector scales an image to its own size, 800 pixels on the shorter side, say: of a 6000x4000 photograph a car of 40
pixels keeps 8. Overlapping tiles keep its scale. What a border cuts is a box in each of its tiles, so the boxes of all
tiles are merged, and the whole image is detected in once more, scaled down, for objects larger than the overlap.

Legend: ``T`` tiles, ``N`` boxes of all of them, in pixels of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torchvision.ops import box_area

from resdet.errors import UserError
from resdet.models.spec import Tiles
from resdet.types import Ints, Prediction

Detect = Callable[[Sequence[Tensor], str], list[Prediction]]
"""Takes uint8 images ``[3, H, W]`` and what to call them in messages; returns their detections, on the CPU."""

_MARGIN = 0.02  # of a tile's side: a box that comes so near to an inner border is taken to be cut by it
_COVERED = 0.7  # share of a cut box that another must cover to replace it
_WHOLE_ASPECT = 2  # of the whole image's longer side, in tiles, when it is scaled down


def checked_tiles(tiles: tuple[int, float] | None) -> Tiles | None:
    """Return ``(side, overlap)`` as ``Tiles``, and None as it is.

    Raises:
        UserError: If they are not a side in pixels and a share of it.
    """
    try:
        return TypeAdapter(Tiles | None).validate_python(tiles)
    except ValidationError:
        raise UserError(
            "tiles must be (side, overlap), a whole number of pixels from 32 on and a share of it in [0, 0.9], as in "
            f"(800, 0.2), got {tiles!r}"
        ) from None


def tile_grid(height: int, width: int, tiles: Tiles) -> Ints:
    """Return the tiles of an image, int64 ``[T, 4]``, ``(x1, y1, x2, y2)``: together they cover it exactly.

    They begin at multiples of one stride, but the last, which ends where the image ends: it may overlap the one before
    by more. An image smaller than a tile along one side is one tile along it.
    """
    stride = max(1, math.floor(tiles.side * (1 - tiles.overlap) + 1e-6))  # 800 * (1 - 0.9) is 79.99999999999999

    def starts(length: int) -> list[int]:
        last = max(length - tiles.side, 0)
        return [*range(0, last, stride), last]

    corners = [
        (x, y, min(x + tiles.side, width), min(y + tiles.side, height)) for y in starts(height) for x in starts(width)
    ]
    return np.array(corners, dtype=np.int64)


@dataclass(frozen=True)
class TiledDetection:
    """How images are detected in tile by tile.

    Attributes:
        run: Detects in images of a tile's size.
        tiles: Side and overlap.
        batch_size: Tiles per call of ``run``.
        iou_threshold: IoU above which a box drops a worse one of another tile.
        class_agnostic: Whether it drops those of other classes too.
        limit: Detections to return for an image; None returns all.
    """

    run: Detect
    tiles: Tiles
    batch_size: int
    iou_threshold: float
    class_agnostic: bool = False
    limit: int | None = None

    def __call__(self, images: Sequence[Tensor], where: str) -> list[Prediction]:
        """Detect in uint8 images ``[3, H, W]`` one after the other: beside them, memory holds one batch of tiles."""
        return [self._detect(image, where) for image in images]

    def _detect(self, image: Tensor, where: str) -> Prediction:
        height, width = image.shape[-2:]
        grid = tile_grid(height, width, self.tiles)
        found: list[Prediction] = []
        for start in range(0, len(grid), self.batch_size):
            batch = grid[start : start + self.batch_size].tolist()
            found += self.run([image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in batch], f"a tile of {where}")
        if len(grid) > 1:
            found.append(self._detect_large(image, where))
        return self.merge(found, grid)

    def _detect_large(self, image: Tensor, where: str) -> Prediction:
        """Detect in the whole image, scaled down; return what is larger than the overlap, as every tile may cut it.

        Smaller objects are whole in some tile, which sees them better. The image is scaled down in 8 bits, plane by
        plane: its floats would take 12 bytes a pixel, and the detector's own interpolation skips pixels.
        """
        height, width = image.shape[-2:]
        side = self.tiles.side
        scale = min(1.0, side / min(height, width), _WHOLE_ASPECT * side / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        planes = [cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in image.numpy()]
        found = self.run([torch.from_numpy(np.stack(planes))], where)[0]
        boxes = found["boxes"] * torch.tensor([width / size[0], height / size[1]] * 2)
        large = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) > self.tiles.overlap * side
        return Prediction(boxes=boxes[large], labels=found["labels"][large], scores=found["scores"][large])

    def merge(self, found: Sequence[Prediction], grid: Ints) -> Prediction:
        """Return the detections of an image, by falling score.

        A box is cut if it ends at an inner border of its tile. A cut box that lies inside another tile, away from its
        inner borders, is dropped: that tile sees the whole object. Of the rest, a box drops worse ones of other tiles
        which it overlaps by more than ``iou_threshold``, and cut ones of which it covers more than 0.7. A cut box is
        worse than any whole one. Boxes of one tile have passed the detector's own suppression and stay.

        Args:
            found: Of each tile, in pixels of the tile; and of the whole image, if there are several tiles.
            grid: The tiles, ``[T, 4]``.
        """
        tile_of = torch.repeat_interleave(torch.tensor([len(part["scores"]) for part in found]))  # [N]
        tiles = torch.from_numpy(grid).float()
        whole = torch.cat([tiles[:, :2].amin(dim=0), tiles[:, 2:].amax(dim=0)])  # (0, 0, W, H)
        tiles = torch.cat([tiles, whole[None]])  # [T + 1, 4]
        inwards = torch.tensor([1, 1, -1, -1])
        inner = torch.where(
            tiles == whole, -math.inf * inwards, tiles + _MARGIN * self.tiles.side * inwards
        )  # [T + 1, 4]
        boxes = torch.cat([part["boxes"] for part in found]) + tiles[tile_of][:, [0, 1, 0, 1]]  # [N, 4]
        labels, scores = (torch.cat([part[key] for part in found]) for key in ("labels", "scores"))
        cut = ~_inside(boxes, inner[tile_of])
        seen_whole = torch.zeros_like(cut)
        for tile, rectangle in enumerate(inner[: len(grid)]):
            seen_whole |= cut & (tile_of != tile) & _inside(boxes, rectangle)
        rows = torch.where(~seen_whole)[0]
        rows = rows[_order(cut[rows], scores[rows])]
        groups = torch.zeros_like(labels) if self.class_agnostic else labels
        rows = rows[self._survive(boxes[rows], groups[rows], cut[rows], tile_of[rows], tiles)]
        rows = rows[scores[rows].argsort(descending=True, stable=True)][: self.limit]
        return Prediction(boxes=boxes[rows], labels=labels[rows], scores=scores[rows])

    def _survive(self, boxes: Tensor, groups: Tensor, cut: Tensor, tile_of: Tensor, tiles: Tensor) -> Tensor:
        """Return which boxes, the best first, no better one of another tile drops: bool ``[N]``."""
        area = box_area(boxes)
        pairs: list[Tensor] = []
        for tile, rectangle in enumerate(tiles):
            # Boxes of two tiles can only meet where the tiles do: a few hundred by a few thousand, not N by N.
            own = torch.where(tile_of == tile)[0]
            others = torch.where((tile_of > tile) & _meets(boxes, rectangle))[0]
            sides = torch.minimum(boxes[own, None, 2:], boxes[others, 2:]) - torch.maximum(
                boxes[own, None, :2], boxes[others, :2]
            )
            shared = sides.clamp(min=0).prod(dim=2)  # [own, others]
            alike = shared > self.iou_threshold * (area[own, None] + area[others] - shared)
            for first, second, covered in ((own, others, shared), (others, own, shared.T)):
                drops = (alike if first is own else alike.T) | (cut[second] & (covered > _COVERED * area[second]))
                drops &= (groups[first, None] == groups[second]) & (first[:, None] < second)
                pairs.append(torch.stack([first[drops.nonzero()[:, 0]], second[drops.nonzero()[:, 1]]], dim=1))
        alive = [True] * len(boxes)
        better_first = torch.cat(pairs)
        for better, worse in better_first[better_first[:, 0].argsort()].tolist():
            if alive[better]:
                alive[worse] = False
        return torch.tensor(alive, dtype=torch.bool)


def _order(cut: Tensor, scores: Tensor) -> Tensor:
    """Return the rows, whole boxes before cut ones, by falling score."""
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[cut[by_score].long().argsort(stable=True)]


def _inside(boxes: Tensor, rectangles: Tensor) -> Tensor:
    """Return which boxes ``[N, 4]`` lie inside a rectangle, or each in its own ``[N, 4]``."""
    return ((boxes[:, :2] > rectangles[..., :2]) & (boxes[:, 2:] < rectangles[..., 2:])).all(dim=1)


def _meets(boxes: Tensor, rectangle: Tensor) -> Tensor:
    return ((boxes[:, :2] < rectangle[2:]) & (boxes[:, 2:] > rectangle[:2])).all(dim=1)
