"""Datasets of (image, target) in torchvision's convention: what is taken, what is guessed, what is refused and how."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.loader import train_loader
from resdet.data.torch_datasets import wrap_dataset
from resdet.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
BOX = {"boxes": torch.tensor([[5.0, 6.0, 30.0, 20.0]]), "labels": torch.tensor([1])}


class Given(Dataset[Any]):
    """Items as they are listed."""

    def __init__(self, items: Sequence[Any], classes: Sequence[str] | None = None) -> None:
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def planes(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        planes(PIXELS),
        planes(PIXELS).float() / 255,
        planes(PIXELS).double() / 255,
        planes(PIXELS).float() / 255 * 1.0005,  # white that was resized
        PIXELS,
        v2.functional.to_image(PIXELS),
    ],
    ids=["PIL", "uint8", "float", "double", "overshoot", "array", "tv_tensor"],
)
def test_every_kind_of_image_is_the_same_pixels(image: Any) -> None:
    found, target = wrap_dataset(Given([(image, BOX)]))[0]
    assert found.dtype == torch.uint8
    assert torch.equal(found, planes(PIXELS))
    assert torch.equal(target["boxes"], BOX["boxes"])
    assert target["labels"].tolist() == [1]


@pytest.mark.parametrize("image", [Image.fromarray(PIXELS[:, :, 0]), PIXELS[:, :, 0], planes(PIXELS)[:1]])
def test_gray_is_repeated(image: Any) -> None:
    assert torch.equal(wrap_dataset(Given([(image, BOX)]))[0][0], planes(PIXELS)[:1].expand(3, -1, -1))


def test_columns_of_the_table() -> None:
    many = {
        "boxes": [[0, 0, 10, 10], [5, 5, 25, 15], [1, 1, 4, 9]],
        "labels": np.array([2, 1, 2]),
        "area": [7.5, 200, 24],
        "iscrowd": torch.tensor([0, 1, 0]),
        "difficult": [False, False, True],
        "image_id": torch.tensor([17]),
    }
    empty = (
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.zeros(0)},
        {},
        None,
    )
    dataset = wrap_dataset(Given([(PIXELS, many), *((PIXELS, target) for target in empty)], classes=["a", "b"]))
    table = dataset.table
    assert table.name == "dataset (Given)"
    assert [category.name for category in table.categories] == ["a", "b"]
    assert table.image_ids.tolist() == [17, 1, 2, 3, 4]
    assert table.offsets.tolist() == [0, 3, 3, 3, 3, 3]
    assert table.boxes_xywh.tolist() == [[0, 0, 10, 10], [5, 5, 20, 10], [1, 1, 3, 8]]
    assert (table.area.tolist(), table.crowd.tolist()) == ([7.5, 200, 24], [False, True, False])
    assert table.difficult.tolist() == [False, False, True]
    assert table.sizes.tolist() == [[40, 60]] * 5
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 10, 10]]  # neither the crowd nor the difficult one
    assert dataset[4][1]["boxes"].shape == (0, 4)


def test_boxes_of_a_tv_tensor_are_converted_from_their_format() -> None:
    boxes = BoundingBoxes([[5, 6, 25, 14]], format="XYWH", canvas_size=(40, 60))
    dataset = wrap_dataset(Given([(PIXELS, {"boxes": boxes, "labels": [1]})]))
    assert dataset[0][1]["boxes"].tolist() == [[5, 6, 30, 20]]


def with_box(*box: float, label: int = 1) -> tuple[Any, Any]:
    return PIXELS, {"boxes": torch.tensor([[1, 2, 3, 4], box]), "labels": torch.tensor([1, label])}


IN_ORDER = "a box must be (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, not (x, y, width, height)"


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (PIXELS, "must be a pair of image and target, got ndarray"),
        (with_box(30, 2, 20, 9), f"{IN_ORDER}; got [30.0, 2.0, 20.0, 9.0] for box 1"),
        (with_box(0, 0, float("nan"), 4), "a box must be finite; got [0.0, 0.0, nan, 4.0] for box 1"),
        (with_box(70, 2, 80, 9), "a box must meet its image, 60x40 px; got [70.0, 2.0, 80.0, 9.0] for box 1"),
        (with_box(1, 2, 3, 4, label=0), "a label must be in 1..K (0 is the background); got 0 for box 1"),
        ((PIXELS, {"boxes": [[1, 2, 3, 4]], "labels": [1.5]}), "must be in 1..K (0 is the background); got 1.5"),
        ((PIXELS, {"boxes": [[1, 2, 3]], "labels": [1]}), "must have boxes of shape [N, 4], got [1, 3]"),
        ((PIXELS, {"boxes": [[1, 2, 3, 4]]}), "must have one of labels for each box, got 0 for 1"),
        ((PIXELS, {"labels": [1]}), "must have one of labels for each box, got 1 for 0"),
        ((PIXELS, {**BOX, "area": [1, 2]}), "must have one of area for each box, got 2 for 1"),
        ((PIXELS, {"boxes": "here", "labels": [1]}), "must have numbers as its boxes: "),
        ((PIXELS, "cat"), "must have a dict with boxes and labels as its target, or None, got str"),
        ((PIXELS, [{"bbox": [1, 2, 3, 4]}]), "got list; torchvision.datasets.wrap_dataset_for_transforms_v2 makes"),
        (("a.jpg", BOX), "must have a PIL image, a tensor or an array, got str"),
        ((PIXELS.astype(np.int32), BOX), "expected uint8 RGB [H, W, 3] or gray [H, W], got int32 [40, 60, 3]"),
        ((torch.from_numpy(PIXELS), BOX), "a tensor must be uint8 or float RGB [3, H, W], got uint8 [40, 60, 3]"),
        (
            (planes(PIXELS).float() / 64 - 2, BOX),
            "a float tensor must be in [0, 1], got -2 to 1.98438",
        ),
    ],
)  # fmt: skip
def test_a_bad_item_is_named_by_its_index(item: Any, told: str) -> None:
    with pytest.raises(DataError) as caught:
        wrap_dataset(Given([(PIXELS, BOX), (PIXELS, None), item]), name="train_set")
    assert str(caught.value).startswith("train_set[2]: ")
    assert told in str(caught.value)


def test_a_box_may_reach_out_of_its_image_and_have_no_extent() -> None:
    item = with_box(50, 30, 80, 90), with_box(7, 7, 7, 9)
    dataset = wrap_dataset(Given(item), training=True)
    assert dataset[0][1]["boxes"].tolist() == [[1, 2, 3, 4], [50, 30, 60, 40]]
    assert dataset[1][1]["boxes"].tolist() == [[1, 2, 3, 4]]
    assert dataset.table.num_boxes == 4


def test_normalised_boxes_are_refused() -> None:
    target = {"boxes": [[0.1, 0.2, 0.5, 1.0]], "labels": [1]}
    with pytest.raises(DataError, match=r"^dataset: boxes must be in pixels, but all of them are within 1 pixel: norm"):
        wrap_dataset(Given([(PIXELS, target), (PIXELS, None)]))


def names(dataset: Any, **how: Any) -> list[str]:
    return [category.name for category in wrap_dataset(dataset, **how).categories]


def test_where_class_names_come_from(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    items = [with_box(1, 2, 3, 4, label=3)]
    three = ["cat", "dog", "owl"]
    assert names(Given(items)) == ["1", "2", "3"]
    assert "dataset: 3 classes without names, called by their labels (classes=[...])" in caplog.text
    assert names(Given(items), unnamed=three) == three
    assert names(Given(items, three), unnamed=["x", "y", "z"]) == three
    assert names(Given(items, ["__background__", *three])) == three
    assert names(Given(items, three), classes=["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert names(ConcatDataset([Given(items, three), Subset(Given(items, three), [0])])) == three
    with pytest.raises(DataError, match=r"^dataset: its parts must have the same classes in the same order: give"):
        names(ConcatDataset([Given(items, three), Given(items, three[::-1])]))
    with pytest.raises(DataError, match=r"^dataset\[0\]: a label must be in 1\.\.2 \(0 is the background\); got 3"):
        names(Given(items), classes=three[:2])
    with pytest.raises(DataError, match=r"^dataset: classes must have different names, got cat, cat$"):
        names(Given(items), classes=["cat", "cat"])
    with pytest.raises(DataError, match=r"^dataset: has no images$"):
        names(Given([]))
    with pytest.raises(DataError, match=r"^dataset: must have __getitem__ and __len__, .* got generator$"):
        names(item for item in items)


def test_a_dataset_of_ours_stays_as_it_is() -> None:
    dataset = wrap_dataset(Given([(PIXELS, BOX), (PIXELS, None)]))
    assert wrap_dataset(dataset) is dataset
    assert wrap_dataset(Subset(Subset(dataset, [1, 0]), [1])).table.num_boxes == 1


# torchvision's CocoDetection


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images; category ids with gaps, from 0; a crowd region; an image without objects."""
    folder = tmp_path_factory.mktemp("coco")
    for number in (4, 7, 9):
        Image.fromarray(PIXELS).save(folder / f"{number}.png")
    objects = [
        (4, 0, [1, 2, 10, 12], 0),
        (4, 44, [5, 5, 20.5, 10], 0),
        (9, 3, [0, 0, 60, 40], 1),
        (9, 3, [7, 7, 9, 9], 0),
    ]
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in (9, 4, 7)],
        "categories": [{"id": n, "name": name} for n, name in ((44, "owl"), (0, "cat"), (3, "dog"))],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": 50 + n, "iscrowd": crowd}
            for n, (image, category, box, crowd) in enumerate(objects)
        ],
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(document))
    return folder


def coco_detection(folder: Path, **transforms: Any) -> CocoDetection:
    with contextlib.redirect_stdout(io.StringIO()):
        return CocoDetection(str(folder), str(folder / "a.json"), **transforms)


def same(one: DetectionDataset, other: DetectionDataset) -> None:
    for column in ("sizes", "offsets", "boxes_xywh", "labels", "area", "crowd", "image_ids"):
        np.testing.assert_array_equal(getattr(one.table, column), getattr(other.table, column), err_msg=column)
    assert [c.name for c in one.categories] == [c.name for c in other.categories]


def test_coco_detection_is_what_its_json_says_and_is_not_read(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, wrapped = coco_detection(coco), wrap_dataset_for_transforms_v2(coco_detection(coco))
    own = read_coco(coco / "a.json")
    own = own.select_images(np.argsort(own.image_ids))  # torchvision's order
    with monkeypatch.context() as patch:
        patch.setattr(CocoDetection, "_load_image", lambda *_: pytest.fail("read"))
        tables = [wrap_dataset(plain), wrap_dataset(wrapped)]
        part = wrap_dataset(ConcatDataset([Subset(wrapped, [2, 1]), plain]))
    for dataset in tables:
        same(dataset, DetectionDataset(own, dataset.image, training=False))
        assert [(c.label, c.category_id, c.name) for c in dataset.categories] == [
            (1, 0, "cat"),
            (2, 3, "dog"),
            (3, 44, "owl"),
        ]
        assert dataset[2][1]["boxes"].tolist() == [[7, 7, 16, 16]]  # the crowd region is none of the targets
        assert dataset[0][1]["labels"].tolist() == [1, 3]
    assert part.table.num_boxes == 2 + 0 + 4
    assert part.table.image_ids.tolist() == [0, 1, 2, 3, 4]  # their own repeat


def test_coco_detection_with_transforms_is_read_as_it_returns(coco: Path) -> None:
    halved = v2.Compose([v2.ToImage(), v2.Resize((20, 30))])
    dataset = wrap_dataset(wrap_dataset_for_transforms_v2(coco_detection(coco, transforms=halved)))
    assert dataset.table.sizes.tolist() == [[20, 30]] * 3
    assert dataset.table.boxes_xywh[0].tolist() == [0.5, 1, 5, 6]
    assert dataset[0][0].shape == (3, 20, 30)
    assert [c.name for c in dataset.categories] == ["cat", "dog", "owl"]


def test_an_unknown_category_id_is_named(coco: Path) -> None:
    class Renumbered(CocoDetection):
        def __getitem__(self, index: int) -> Any:
            return PIXELS, {"boxes": [[1, 2, 3, 4]], "labels": [2]}

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = Renumbered(str(coco), str(coco / "a.json"))
    with pytest.raises(DataError, match=r"^dataset\[0\]: a label must be a category id of its annotations; got 2"):
        wrap_dataset(dataset)
    assert wrap_dataset(dataset, classes=["cat", "dog", "owl"]).table.labels.tolist() == [2, 2, 2]


# random transforms


class Shaken(Given):
    """Moved by torch's, NumPy's and Python's random numbers at each reading."""

    def __getitem__(self, index: int) -> Any:
        move = float(torch.rand(())) + np.random.rand() + random.random()  # noqa: NPY002
        return PIXELS, {"boxes": torch.tensor([[1.0, 2, 20, 30]]) + 5 * move, "labels": [1 + index % 2]}


def batches(num_workers: int) -> list[list[float]]:
    dataset = wrap_dataset(Shaken(range(12)), training=True)
    loader = train_loader(dataset, batch_size=4, num_workers=num_workers, seed=3)
    return [
        target["boxes"].flatten().tolist()
        for _, batch in zip(range(4), loader, strict=False)
        for target in batch.targets
    ]


def test_random_transforms_follow_from_the_key_and_leave_no_trace() -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    first = batches(0)
    after = float(torch.rand(())), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    assert after == (float(torch.rand(())), np.random.rand(), random.random())  # noqa: NPY002
    assert len({tuple(boxes) for boxes in first}) == 16, "each draw has its own"
    assert batches(1) == first


def test_evaluation_wants_the_same_image_again() -> None:
    class Grows(Given):
        def __getitem__(self, index: int) -> Any:
            self.items = [*self.items, 0]
            return np.zeros((30, 30 + len(self.items), 3), dtype=np.uint8), BOX

    dataset = wrap_dataset(Grows([0]), name="val_set")
    told = (
        "must be 32x30 pixels, as at its first reading or in its annotations, and is 33x30: a dataset for evaluation "
        "must return the same each time"
    )
    with pytest.raises(DataError, match=rf"^val_set\[0\]: {told}"):
        dataset[0]
