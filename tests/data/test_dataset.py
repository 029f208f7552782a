import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, random_split

from resdet.data.augment import build_augment
from resdet.data.dataset import DetectionDataset, without_subset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError


def blank(index):
    return np.zeros((96, 96, 3), dtype=np.uint8)


def table_with(boxes, **columns):
    """One image with the given xywh boxes and a second one without."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    return replace(
        shapes_table(2, 96, seed=0),
        offsets=np.array([0, count, count]),
        boxes_xywh=boxes,
        labels=np.arange(count) % 3 + 1,
        area=boxes[:, 2] * boxes[:, 3],
        annotation_ids=np.arange(count),
        crowd=np.array(columns.get("crowd", [0] * count), dtype=bool),
        difficult=np.array(columns.get("difficult", [0] * count), dtype=bool),
        notes=columns.get("notes", ()),
    )


def test_an_item_is_an_image_tensor_and_its_target():
    table, images = shapes_table(3, 96, seed=0), ShapesImages(96, seed=0)
    dataset = DetectionDataset(table, images, training=True)
    image, target = dataset[2]
    assert len(dataset) == 3
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 96, 96))
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), images(2))
    assert np.array_equal(dataset.image(2), images(2))
    assert target["boxes"].dtype == torch.float32
    assert np.array_equal(target["boxes"].numpy(), table.boxes_in_image()[table.rows(2)].astype(np.float32))
    assert target["labels"].dtype == torch.int64
    assert np.array_equal(target["labels"].numpy(), table.labels[table.rows(2)])
    assert int(target["image_id"]) == 3
    assert dataset.categories == table.categories


@pytest.mark.parametrize("training", [True, False])
def test_targets_hold_what_training_uses_clipped(training):
    boxes = [(-5, -5, 25, 25), (1, 1, 5, 5), (1, 1, 0, 5), (90, 90, 50, 50), (2, 2, 6, 6)]
    table = table_with(boxes, crowd=[0, 1, 0, 0, 0], difficult=[0, 0, 0, 0, 1])
    target = DetectionDataset(table, blank, training=training)[0][1]
    assert target["boxes"].tolist() == [[0, 0, 20, 20], [90, 90, 96, 96]]
    assert target["labels"].tolist() == [1, 1]
    target = DetectionDataset(table, blank, training=training, use_difficult=True)[0][1]
    assert target["labels"].tolist() == [1, 1, 2]


def test_an_image_without_boxes_has_an_empty_target():
    target = DetectionDataset(table_with([(1, 1, 5, 5)]), blank, training=True)[1][1]
    assert tuple(target["boxes"].shape) == (0, 4)
    assert tuple(target["labels"].shape) == (0,)


def test_what_is_left_out_is_said(caplog):
    boxes = [(1, 1, 9, 9), (1, 1, 5, 5), (1, 1, 0, 5), (2, 2, 6, 6)]
    table = table_with(boxes, crowd=[0, 1, 0, 0], difficult=[0, 0, 0, 1], notes=("a note",))
    with caplog.at_level(logging.INFO, logger="resdet"):
        DetectionDataset(table, blank, training=True)
    assert caplog.messages == [
        "shapes(seed=0): a note",
        "shapes(seed=0): 2 images, training on 1 of 4 boxes (left out: 1 crowd regions, 1 difficult, "
        "1 not finite or thinner than 0.1 px inside the image)",
    ]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="none of its 1 boxes can be trained on"):
        DetectionDataset(table_with([(1, 1, 5, 5)], crowd=[True]), blank, training=True)
    DetectionDataset(table_with([(1, 1, 5, 5)], crowd=[True]), blank, training=False)


def test_labels_travel_with_their_boxes_through_augmentation():
    table = table_with([(80, 80, 10, 10), (5, 5, 20, 20), (30, 30, 9, 9)])
    crop = build_augment([{"Crop": {"x_max": 50, "y_max": 50, "p": 1}}])
    image, target = DetectionDataset(table, blank, crop, training=True)[0, 7]
    assert tuple(image.shape) == (3, 50, 50)
    assert target["labels"].tolist() == [2, 3]
    # float32 of numbers below 64, through fractions of the image
    torch.testing.assert_close(target["boxes"], torch.tensor([[5.0, 5, 25, 25], [30, 30, 39, 39]]), rtol=0, atol=1e-5)


def test_the_seed_of_the_key_decides_the_augmentation():
    flip = build_augment([{"HorizontalFlip": {"p": 0.5}}])
    dataset = DetectionDataset(shapes_table(2, 96, seed=0), ShapesImages(96, seed=0), flip, training=True)
    seen = {dataset[0, seed][0].numpy().tobytes() for seed in range(20)}
    assert len(seen) == 2
    assert torch.equal(dataset[0, 5][0], dataset[0, 5][0])
    assert torch.equal(dataset[1][0], dataset[1, 1][0])


def test_a_failing_step_names_the_image():
    crop = build_augment([{"Crop": {"x_max": 500, "y_max": 500, "p": 1}}])
    dataset = DetectionDataset(table_with([(1, 1, 5, 5)]), blank, crop, training=True)
    with pytest.raises(DataError, match=r"^image 1: augment\[0\] \(Crop\)"):
        dataset[0]


def test_chosen_images_are_the_same_items():
    whole = DetectionDataset(shapes_table(6, 96, seed=0), ShapesImages(96, seed=0), training=False)
    inner = Subset(Subset(whole, [5, 0, 3, 3]), torch.tensor([3, 0, 1]))
    chosen = pickle.loads(pickle.dumps(without_subset(inner)))
    assert len(chosen) == len(inner) == 3
    for index, (image, target) in enumerate(inner):
        assert torch.equal(chosen[index][0], image)
        assert all(torch.equal(chosen[index][1][name], value) for name, value in target.items())
    assert chosen.table.image_ids.tolist() == [4, 6, 1]
    assert without_subset(whole) is whole
    assert len(whole) == 6
    parts = random_split(whole, [2, 4])
    ids = np.concatenate([without_subset(part).table.image_ids for part in parts])
    assert sorted(ids) == whole.table.image_ids.tolist()


def test_difficult_objects_stay_targets_where_they_were():
    table = table_with([(2, 2, 6, 6), (3, 3, 9, 9)], difficult=[0, 1])
    for use_difficult, num_targets in ((True, 2), (False, 1)):
        dataset = DetectionDataset(table, blank, training=False, use_difficult=use_difficult)
        assert len(without_subset(Subset(dataset, [1, 0]))[1][1]["labels"]) == num_targets


def test_unfit_choices_are_refused():
    dataset = DetectionDataset(shapes_table(3, 96, seed=0), ShapesImages(96, seed=0), training=False)
    for indices, got in (([0, 3], "got 3"), ([-4], "got -4"), ([], "got none")):
        with pytest.raises(DataError, match=rf"out of its 3 \(0..2\), {got}"):
            without_subset(Subset(dataset, indices))
    with pytest.raises(DataError, match="expected a DetectionDataset or a Subset of one, got list"):
        without_subset(Subset([1, 2], [0]))
