import json
import logging
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, random_split

from resdet.build import build_dataset
from resdet.config import parse_config
from resdet.data.augment.pipeline import build_augment
from resdet.data.dataset import MAX_SUBSTITUTES, DetectionDataset, without_subset
from resdet.data.loader import train_loader
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import ConfigError, DataError, UnreadableImageError


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


@pytest.mark.parametrize("kind", ["as it is", "read-only", "columns reversed", "every second row", "Fortran order"])
def test_an_image_becomes_planes_however_it_lies_in_memory(kind):
    whole = np.random.default_rng(0).integers(0, 256, (192, 96, 3), dtype=np.uint8)
    whole.setflags(write=kind != "read-only")
    image = {
        "columns reversed": whole[:, ::-1],
        "every second row": whole[::2],
        "Fortran order": np.asfortranarray(whole),
    }.get(kind, whole)
    planes = DetectionDataset(table_with([(1, 1, 5, 5)]), lambda index: image, training=True)[0][0]
    assert planes.is_contiguous()
    assert np.array_equal(planes.numpy(), image.transpose(2, 0, 1))
    with pytest.raises(AssertionError):  # another order of channels would be noticed
        assert np.array_equal(planes.flip(0).numpy(), image.transpose(2, 0, 1))


@pytest.mark.parametrize("image", [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))])
def test_what_is_no_image_is_refused(image):
    dataset = DetectionDataset(table_with([(1, 1, 5, 5)]), lambda index: image, training=True)
    shape = re.escape(str(list(image.shape)))
    with pytest.raises(DataError, match=rf"^image 1: must be uint8 \[H, W, 3\], got {image.dtype} {shape}$"):
        dataset[0]


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
        "shapes(seed=0): no box to train on for 'square', 'triangle': never learned",
    ]


def test_nothing_to_train_on_is_refused(caplog):
    with pytest.raises(DataError, match="none of its 1 boxes can be trained on"):
        DetectionDataset(table_with([(1, 1, 5, 0)]), blank, training=True)
    crowds = (
        r"all of its 1 objects are crowd regions \(iscrowd 1\), which are not trained on; if they are single objects"
    )
    with pytest.raises(DataError, match=crowds):
        DetectionDataset(table_with([(1, 1, 5, 5)], crowd=[True]), blank, training=True)
    difficult = "all boxes that can be trained on, of 2, are difficult; use_difficult: true uses them"
    with pytest.raises(DataError, match=difficult):
        DetectionDataset(table_with([(1, 1, 5, 5), (1, 1, 0, 5)], difficult=[True, False]), blank, training=True)
    DetectionDataset(table_with([(1, 1, 5, 5)], crowd=[True]), blank, training=False)
    assert caplog.messages[-1].endswith(
        "all of its 1 objects are crowd regions (iscrowd 1): every AP is undefined, and shown as -1"
    )


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


# --- samples: everything known of each box


def test_a_sample_holds_crowd_and_difficult_boxes_and_the_target_does_not():
    boxes = [(40, 1, 9, 9), (50, 20, 20, 20), (2, 2, 0, 5), (70, 60, 12, 6)]
    table = table_with(boxes, crowd=[0, 1, 0, 0], difficult=[0, 0, 0, 1])
    dataset = DetectionDataset(table, blank, build_augment([{"HorizontalFlip": {"p": 1}}]), training=True)
    sample = dataset.sample((0, 5))
    assert sample.boxes.dtype == np.float32
    assert sample.boxes.tolist() == [[47, 1, 56, 10], [26, 20, 46, 40], [14, 60, 26, 66]]
    assert sample.annotation_ids.tolist() == [0, 1, 3]
    assert sample.crowd.tolist() == [False, True, False]
    assert sample.difficult.tolist() == [False, False, True]
    assert dataset.is_target(sample).tolist() == [True, False, False]
    assert dataset[0, 5][1]["boxes"].tolist() == [[47, 1, 56, 10]]
    assert dataset.stored(0).boxes[0].tolist() == [40, 1, 49, 10]
    difficult = DetectionDataset(table, blank, training=True, use_difficult=True)
    assert difficult[0][1]["labels"].tolist() == [1, 1]


def test_targets_are_the_trainable_boxes_of_the_table():
    """Boxes are made for one image at a time; they must be those that the whole table's methods give."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-30, 110, size=(200, 4))
    boxes[:, 2:] = rng.uniform(-0.05, 60, size=(200, 2))
    boxes[::7, 2] = rng.uniform(0, 0.3, size=len(boxes[::7]))
    boxes[5, 0], boxes[6, 3] = np.nan, np.inf
    table = table_with(boxes, crowd=rng.random(200) < 0.1, difficult=rng.random(200) < 0.1)
    for use_difficult in (False, True):
        target = DetectionDataset(table, blank, training=True, use_difficult=use_difficult)[0][1]
        keep = table.trainable(use_difficult=use_difficult)
        assert 0 < keep.sum() < 200
        assert np.array_equal(target["boxes"].numpy(), table.boxes_in_image()[keep].astype(np.float32))
        assert np.array_equal(target["labels"].numpy(), table.labels[keep])


def test_mixed_images_come_from_the_dataset_with_labels_and_ids():
    table, images = shapes_table(12, 96, seed=0), ShapesImages(96, seed=0)
    steps = [{"Mosaic": {"p": 1}}, {"CopyPaste": {"p": 1}}]
    dataset = DetectionDataset(table, images, build_augment(steps), training=True)
    label_of = dict(zip(table.annotation_ids.tolist(), table.labels.tolist(), strict=True))
    image_of = dict(zip(table.annotation_ids.tolist(), table.image_of_box().tolist(), strict=True))
    num_images = set()
    for seed in range(10):
        sample = dataset.sample((3, seed))
        assert [label_of[i] for i in sample.annotation_ids.tolist()] == sample.labels.tolist()
        num_images.add(len({image_of[i] for i in sample.annotation_ids.tolist()}))
        assert int(dataset[3, seed][1]["image_id"]) == table.image_ids[3]
    assert max(num_images) >= 4


def test_batches_do_not_depend_on_the_number_of_workers():
    steps = [
        {"ColorJitter": {"p": 0.5}},
        {"Mosaic": {"p": 0.5}},
        {"CopyPaste": {"p": 0.5}},
        {"LargeScaleJitter": {"size": [64, 64]}},
    ]
    table = shapes_table(10, 64, seed=0)
    dataset = DetectionDataset(
        table,
        SomeUnreadable(ShapesImages(64, seed=0), {2, 5}),
        build_augment(steps),
        training=True,
        skip_unreadable=True,
    )

    def first_batches(num_workers):
        loader = train_loader(dataset, batch_size=4, num_workers=num_workers, seed=3)
        batches = [next(loader) for _ in range(6)]
        return [
            (torch.stack(b.images), [t["boxes"] for t in b.targets], [t["labels"] for t in b.targets]) for b in batches
        ]

    expected = first_batches(0)
    for num_workers in (1, 3):
        torch.testing.assert_close(first_batches(num_workers), expected, rtol=0, atol=0)
    assert dataset.unreadable.tolist() == [2, 5]


# --- images that cannot be read


class SomeUnreadable:
    """Images of which some cannot be read."""

    def __init__(self, images, broken):
        self.images = images
        self.broken = broken

    def __call__(self, index):
        if index in self.broken:
            raise UnreadableImageError(f"image {index + 1}: gone")
        return self.images(index)


def test_an_unreadable_image_is_an_error_unless_skipped():
    table, images = shapes_table(6, 64, seed=0), SomeUnreadable(ShapesImages(64, seed=0), {1})
    dataset = DetectionDataset(table, images, training=True)
    with pytest.raises(UnreadableImageError, match=r"^image 2: gone$"):
        dataset[1]
    assert dataset.unreadable.tolist() == []
    mixing = DetectionDataset(table, images, build_augment([{"Mosaic": {"p": 1}}]), training=True)
    with pytest.raises(UnreadableImageError, match=r"^image 2: gone$"):
        [mixing[0, seed] for seed in range(30)]


def test_a_skipped_image_is_replaced_counted_and_said_once(caplog):
    table = shapes_table(6, 64, seed=0)
    images = SomeUnreadable(ShapesImages(64, seed=0), {1, 4})
    dataset = DetectionDataset(table, images, training=True, skip_unreadable=True)
    with caplog.at_level(logging.WARNING, logger="resdet"):
        seen = [int(dataset[1, seed][1]["image_id"]) for seed in range(40)]
        again = [int(dataset[1, seed][1]["image_id"]) for seed in range(40)]
        dataset[4, 0]
    assert set(seen) == {1, 3, 4, 6}
    assert seen == again
    picture, target = dataset[1, 7]
    substitute = int(target["image_id"]) - 1
    assert np.array_equal(picture.permute(1, 2, 0).numpy(), images(substitute))
    assert np.array_equal(target["labels"].numpy(), table.labels[table.rows(substitute)])
    end = "skipped: another image takes its place"
    assert sorted(caplog.messages) == [
        f"image 2: gone; {end} (1 of the 6 images of shapes(seed=0) unreadable so far)",
        f"image 5: gone; {end} (2 of the 6 images of shapes(seed=0) unreadable so far)",
    ]
    assert dataset.unreadable.tolist() == [1, 4]


def test_a_folder_that_is_gone_is_an_error_all_the_same():
    table, images = shapes_table(3, 64, seed=0), SomeUnreadable(None, {0, 1, 2})
    dataset = DetectionDataset(table, images, training=True, skip_unreadable=True)
    with pytest.raises(DataError, match=f"in place of image 2: {MAX_SUBSTITUTES} in a row are unreadable.*gone"):
        dataset[1]


def coco_with_damage(folder):
    """Six images, of which one is missing and one cut short."""
    images = []
    for image_id in range(1, 7):
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 40, "width": 40})
        if image_id != 2:
            Image.fromarray(np.full((40, 40, 3), image_id, dtype=np.uint8)).save(folder / f"{image_id}.png")
    cut = folder / "5.png"
    cut.write_bytes(cut.read_bytes()[:60])
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 20, 20], "iscrowd": 0, "area": 400}
        for i in range(1, 7)
    ]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def config_for(folder, train="error", val="error"):
    source = "{{format: coco, images: {0}, annotations: {0}/annotations.json, unreadable: {1}}}"
    return parse_config(
        f"data: {{train: {source.format(folder, train)}, val: {source.format(folder, val)}}}\n"
        f"train: {{steps: 1}}\noutput_dir: {folder}/run\n"
    )


def test_the_configuration_says_what_unreadable_images_do(tmp_path, caplog):
    coco_with_damage(tmp_path)
    with pytest.raises(DataError, match=r"1 of the 6 images .* are missing: 2.png"):
        build_dataset(config_for(tmp_path).data.train, training=True)
    source = config_for(tmp_path, train="skip").data.train
    with caplog.at_level(logging.WARNING, logger="resdet"):
        dataset = build_dataset(source, training=True)
        seen = {int(dataset[index, seed][1]["image_id"]) for index in range(6) for seed in range(5)}
    assert seen == {1, 3, 4, 6}
    assert len(caplog.messages) == 3
    assert "are missing: 2.png (image 2); other images will replace them (unreadable: skip)" in caplog.messages[0]
    assert "2.png: no such image file; skipped" in caplog.messages[1]
    assert "5.png: cannot be decoded" in caplog.messages[2]
    assert "(2 of the 6 images of" in caplog.messages[2]
    with pytest.raises(DataError, match="are missing"):
        build_dataset(source, training=False)
    with pytest.raises(ConfigError, match=r"val.unreadable must be error: a metric over fewer images"):
        config_for(tmp_path, val="skip")


def test_what_workers_cannot_read_is_said_and_counted_in_the_main_process(tmp_path):
    coco_with_damage(tmp_path)
    dataset = build_dataset(config_for(tmp_path, train="skip").data.train, training=True)
    log = tmp_path / "log"
    handler = logging.FileHandler(log)
    logging.getLogger("resdet").addHandler(handler)
    try:
        loader = train_loader(dataset, batch_size=2, num_workers=2)
        seen = {int(target["image_id"]) for _ in range(9) for target in next(loader).targets}
    finally:
        logging.getLogger("resdet").removeHandler(handler)
        handler.close()
    assert seen == {1, 3, 4, 6}
    assert dataset.unreadable.tolist() == [1, 4]
    said = [line for line in log.read_text().splitlines() if "; skipped: " in line]
    # Two workers that meet a file at the same moment may both say so.
    assert {line.split(":")[0] for line in said} == {"image 2", "image 5"}
    assert any("(2 of the 6 images of" in line for line in said)


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
