"""Detection by tiles: what the tiles cover, which boxes are kept, and the doors to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resdet.evaluation.inference import inference
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.tiles import tile_grid
from resdet.models.spec import Tiles
from resdet.types import Prediction

RNG = np.random.default_rng(0)


# ---- the grid


@pytest.mark.parametrize("size", [(4000, 6000), (800, 801), (9000, 12000), (333, 5000), (1440, 1440), (1441, 1440)])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.55, 0.9])
def test_tiles_cover_an_image_exactly_and_overlap_by_what_is_asked_for(size: tuple[int, int], overlap: float) -> None:
    height, width = size
    grid = tile_grid(height, width, Tiles(800, overlap))
    assert (grid[:, :2] >= 0).all()
    assert (grid[:, 2:] <= [width, height]).all()
    for axis, length in ((0, width), (1, height)):
        starts, ends = np.unique(grid[:, axis]), np.unique(grid[:, 2 + axis])
        assert (ends - starts == min(800, length)).all(), "no sliver"
        assert (starts[0], ends[-1]) == (0, length)
        assert (ends[:-1] - starts[1:] >= 800 * overlap - 1e-9).all()
        # One tile fewer would not do.
        assert len(starts) == 1 or 800 + (len(starts) - 2) * (800 - 800 * overlap) < length + 1
    assert len(np.unique(grid, axis=0)) == len(grid) == len(np.unique(grid[:, 0])) * len(np.unique(grid[:, 1]))


def test_small_images_are_one_tile() -> None:
    assert tile_grid(300, 799, Tiles(800)).tolist() == [[0, 0, 799, 300]]
    assert tile_grid(800, 800, Tiles(800)).tolist() == [[0, 0, 800, 800]]
    assert tile_grid(800, 1600, Tiles(800, 0.0)).tolist() == [[0, 0, 800, 800], [800, 0, 1600, 800]]


# ---- a perfect detector


def located(height: int, width: int) -> Tensor:
    """An image whose pixels say where they are: uint8 [3, H, W], 12 bits for each coordinate."""
    y, x = np.mgrid[:height, :width]
    return torch.from_numpy(np.stack([x >> 4, (x & 15) << 4 | y >> 8, y & 255]).astype(np.uint8))


SIDE = 128


class Perfect(nn.Module):
    """Returns every object as far as it can be seen, and nothing of one of which less than a quarter can.

    A tile's first pixel tells where it lies. What is no square of ``SIDE`` is the whole image, at some scale.
    """

    def __init__(self, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes, self.labels, self.size = boxes, labels, size
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        self.batches.append([tuple(image.shape[1:]) for image in images])
        return [self._seen(image) for image in images]

    def _seen(self, image: Tensor) -> Prediction:
        height, width = image.shape[1:]
        first, second, third = (image[:, 0, 0] * 255).round().int().tolist()
        x, y = first << 4 | second >> 4, (second & 15) << 8 | third
        scale = torch.ones(2)
        if (height, width) != (SIDE, SIDE):
            x, y, scale = 0, 0, torch.tensor([width / self.size[1], height / self.size[0]])
        boxes = (self.boxes - torch.tensor([x, y, x, y])) * scale.repeat(2)
        seen = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        part, whole = ((one[:, 2:] - one[:, :2]).clamp(min=0).prod(dim=1) for one in (seen, boxes))
        keep = part >= 0.25 * whole
        # Pieces are as sure as whole objects: scores alone do not tell them apart.
        scores = torch.linspace(0.9, 0.5, len(boxes))[keep]
        return Prediction(boxes=seen[keep], labels=self.labels[keep], scores=scores)


def scattered(size: tuple[int, int], sides: tuple[int, int], cell: int) -> tuple[Tensor, Tensor]:
    """Objects that do not touch each other: one at random in each cell of the image, and its class, 1 or 2."""
    rng = np.random.default_rng(len(str(size)) + cell)
    boxes = []
    for y in range(0, size[0] - cell + 1, cell):
        for x in range(0, size[1] - cell + 1, cell):
            width, height = rng.uniform(*sides, 2)
            left, top = x + rng.uniform(0, cell - width), y + rng.uniform(0, cell - height)
            boxes.append((left, top, left + width, top + height))
    order = rng.permutation(len(boxes))
    return torch.tensor(boxes)[order], torch.from_numpy(rng.integers(1, 3, len(boxes)))


def found_by_tiles(model: nn.Module, image: Tensor, **settings: object) -> Prediction:
    with inference(model, InferenceSettings(**{"tiles": (SIDE, 0.25), **settings})) as run:  # type: ignore[arg-type]
        return run([image], "a test")[0]


def same_boxes(found: Prediction, boxes: Tensor, labels: Tensor, tolerance: float) -> bool:
    """Whether the same boxes were found, each once and of its class."""
    if len(found["boxes"]) != len(boxes):
        return False
    distance = (found["boxes"][:, None] - boxes).abs().amax(dim=2)  # [found, boxes]
    nearest = distance.argmin(dim=1)
    return (
        sorted(nearest.tolist()) == list(range(len(boxes)))
        and bool((distance.amin(dim=1) <= tolerance).all())
        and bool((labels[nearest] == found["labels"]).all())
    )


SIZE = (640, 900)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("sides", [(3, 12), (20, 31)])
def test_objects_up_to_the_overlap_are_found_once_and_exactly(sides: tuple[int, int], batch_size: int) -> None:
    boxes, labels = scattered(SIZE, sides, 34)
    model = Perfect(boxes, labels, SIZE)
    found = found_by_tiles(model, located(*SIZE), batch_size=batch_size)
    assert same_boxes(found, boxes, labels, 1e-3)
    assert (found["scores"].diff() <= 0).all()
    num_tiles = len(tile_grid(*SIZE, Tiles(SIDE, 0.25)))
    *tiles, last = model.batches
    assert [len(batch) for batch in tiles[:-1]] == [batch_size] * (len(tiles) - 1)
    assert sum(map(len, tiles)) == num_tiles
    assert {size for batch in tiles for size in batch} == {(SIDE, SIDE)}
    assert last == [(128, 180)], "the whole image, its shorter side a tile's"


@pytest.mark.parametrize("sides", [(40, 100), (90, 150), (150, 300)])
def test_objects_larger_than_the_overlap_are_found_whole_and_their_pieces_dropped(sides: tuple[int, int]) -> None:
    boxes, labels = scattered(SIZE, sides, sides[1] + 5)
    found = found_by_tiles(Perfect(boxes, labels, SIZE), located(*SIZE))
    assert same_boxes(found, boxes, labels, 0.05)


def test_without_the_rules_for_cut_boxes_pieces_would_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, labels = scattered(SIZE, (20, 31), 34)
    monkeypatch.setattr("resdet.evaluation.tiles._MARGIN", -100.0)  # nothing is near a border
    found = found_by_tiles(Perfect(boxes, labels, SIZE), located(*SIZE))
    assert len(found["boxes"]) > len(boxes)
    assert not same_boxes(found, boxes, labels, 1e-3)
