import copy
import json
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from resdet.build import anchor_layout
from resdet.check.anchor_coverage import anchor_coverage, best_iou
from resdet.check.check import check_dataset
from resdet.check.kinds import KINDS
from resdet.check.repair import repaired, write_fixed
from resdet.check.report import report_text
from resdet.check.splits import coco_split, table_split, voc_split
from resdet.config import ModelConfig
from resdet.data import image_facts as facts_module
from resdet.data.coco import read_coco
from resdet.data.image_facts import ImageFacts, all_image_facts, image_facts, near_duplicates
from resdet.data.shapes import shapes_table
from resdet.errors import UserError
from resdet.models.proposals import Anchors
from resdet.models.spec import Tiles

WIDTH, HEIGHT, NUM_IMAGES = 64, 48, 6


def picture(seed, width=WIDTH, height=HEIGHT):
    """A picture with large soft blobs, as unlike the others as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def sound_data(first=0):
    names = [f"{index}.png" for index in range(first, first + NUM_IMAGES)]
    images = [{"id": i, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names, start=10)]
    annotations = []
    for image in images:
        for category_id in (3, 8):
            box = [5 + category_id, 4.5, 20, 15 + image["id"] / 10]
            number = len(annotations) + 100
            annotations.append({"id": number, "image_id": image["id"], "category_id": category_id, "bbox": box})
    for annotation in annotations:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    return {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": categories}


class Dataset:
    """A train and a val split on disk, sound until a test damages them."""

    def __init__(self, folder):
        self.folder = folder
        self.data = {"train": sound_data(), "val": sound_data(NUM_IMAGES)}
        for split, first in (("train", 0), ("val", NUM_IMAGES)):
            (folder / split).mkdir()
            for index in range(first, first + NUM_IMAGES):
                picture(index).save(folder / split / f"{index}.png")

    def file(self, name, split="train"):
        return self.folder / split / name

    @property
    def images(self):
        return self.data["train"]["images"]

    @property
    def annotations(self):
        return self.data["train"]["annotations"]

    def splits(self):
        for name, data in self.data.items():
            (self.folder / f"{name}.json").write_text(json.dumps(data))
        return [coco_split(name, self.folder / name, self.folder / f"{name}.json") for name in self.data]

    def check(self, **options):
        return check_dataset(self.splits(), **options)


@pytest.fixture
def dataset(tmp_path):
    return Dataset(tmp_path)


def kinds(report):
    return {(finding.split, finding.kind, finding.severity, finding.count) for finding in report.findings}


def the(report, kind, split=("train", "val", "train and val")):
    (finding,) = (finding for finding in report.findings if finding.kind == kind and finding.split in split)
    return finding


def test_a_sound_dataset_has_no_findings(dataset):
    report = dataset.check(anchors=anchor_layout(ModelConfig()))
    assert kinds(report) == set()
    assert not report.wrong
    assert "nothing is wrong" in report_text(report)
    assert [split.boxes_per_class for split in report.splits] == [{"cat": 6, "dog": 6}] * 2
    assert [split.num_files for split in report.splits] == [6, 6]


def set_box(box):
    def damage(dataset):
        dataset.annotations[3]["bbox"] = box

    return damage


def set_key(section, position, key, value):
    def damage(dataset):
        dataset.data["train"][section][position][key] = value

    return damage


def repeat(section, position, **changes):
    def damage(dataset):
        records = dataset.data["train"][section]
        records.append(copy.deepcopy(records[position]) | changes)

    return damage


def resave(name, change):
    def damage(dataset):
        change(Image.open(dataset.file(name))).save(dataset.file(name))

    return damage


def cut(num_bytes):
    def damage(dataset):
        path = dataset.file("2.png")
        path.write_bytes(path.read_bytes()[:num_bytes])

    return damage


def orient(orientation, size=None):
    def damage(dataset):
        image = Image.open(dataset.file("2.png"))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(dataset.file("2.png"), exif=exif)
        if size is not None:
            dataset.images[2] |= {"width": size[0], "height": size[1]}

    return damage


def save_as(name, seed):
    return lambda dataset: picture(seed).save(dataset.file(name))


def add_class(dataset):
    for data in dataset.data.values():
        data["categories"].append({"id": 9, "name": "cow"})


# kind: (damage, split, severity, count, image ids, annotation ids)
PLANTED = {
    "negative_box": (set_box([40, 4, -20, 15]), "train", "error", 1, {11}, {103}),
    "zero_box": (set_box([40, 4, 0, 15]), "train", "error", 1, {11}, {103}),
    "bad_box": (set_box([40, 4, float("nan"), 15]), "train", "error", 1, {11}, {103}),
    "box_outside_image": (set_box([70, 4, 20, 15]), "train", "error", 1, {11}, {103}),
    "box_partly_outside": (set_box([50, 4, 20, 15]), "train", "warning", 1, {11}, {103}),
    "tiny_box": (set_box([50, 4, 1.5, 15]), "train", "info", 1, {11}, {103}),
    "extreme_aspect": (set_box([1, 4, 60, 2.5]), "train", "info", 1, {11}, {103}),
    "repeated_box": (repeat("annotations", 3, id=900), "train", "warning", 1, {11}, {103, 900}),
    "duplicate_annotation_id": (set_key("annotations", 3, "id", 100), "train", "error", 1, set(), {100}),
    "duplicate_image_id": (repeat("images", 1), "train", "error", 1, {11}, set()),
    "duplicate_category_id": (repeat("categories", 1, name="cow"), "train", "error", 1, set(), set()),
    "duplicate_file_name": (repeat("images", 1, id=99), "train", "error", 1, {11, 99}, set()),
    "unknown_image": (set_key("annotations", 3, "image_id", 55), "train", "error", 1, {55}, {103}),
    "unknown_category": (set_key("annotations", 3, "category_id", 4), "train", "error", 1, {11}, {103}),
    "bad_image_size": (set_key("images", 1, "width", 0), "train", "error", 1, {11}, set()),
    "bad_file_name": (set_key("images", 1, "file_name", "../val/7.png"), "train", "error", 1, {11}, set()),
    "bad_iscrowd": (set_key("annotations", 3, "iscrowd", "no"), "train", "error", 1, {11}, {103}),
    "bad_area": (set_key("annotations", 3, "area", "big"), "train", "error", 1, {11}, {103}),
    "bad_category_name": (set_key("categories", 1, "name", None), "train", "error", 1, set(), set()),
    "not_an_object": (lambda d: d.annotations.append(5), "train", "error", 1, set(), set()),
    "missing_file": (lambda d: d.file("2.png").unlink(), "train", "error", 1, {12}, set()),
    "unreadable_file": (cut(200), "train", "error", 1, {12}, set()),
    "size_mismatch": (set_key("images", 2, "width", 63), "train", "error", 1, {12}, set()),
    "exif_rotation": (orient(3), "train", "warning", 1, {12}, set()),
    "exif_turned": (orient(6, (HEIGHT, WIDTH)), "train", "info", 1, {12}, set()),
    "not_rgb": (resave("2.png", lambda image: image.convert("L")), "train", "info", 1, {12}, set()),
    "duplicate_image": (save_as("2.png", 1), "train", "warning", 1, {11, 12}, set()),
    "train_val_overlap": (save_as("2.png", NUM_IMAGES), "train and val", "warning", 1, {12, 10}, set()),
    "unlisted_file": (save_as("z.png", 50), "train", "info", 1, set(), set()),
    "image_without_boxes": (repeat("images", 1, id=50, file_name="z.png"), "train", "info", 1, {50}, set()),
    "unused_category": (add_class, "train", "warning", 1, set(), set()),
    "different_classes": (set_key("categories", 1, "name", "cow"), "train and val", "error", 1, set(), set()),
    "nothing_to_train_on": (lambda d: d.annotations.clear(), "train", "error", 1, set(), set()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_is_found(dataset, kind):
    damage, split, severity, count, image_ids, annotation_ids = PLANTED[kind]
    if kind == "image_without_boxes":
        picture(50).save(dataset.file("z.png"))
    damage(dataset)
    report = dataset.check()
    finding = the(report, kind, (split,))
    assert (finding.severity, finding.count) == (severity, count)
    assert {i for problem in finding.problems for i in problem.image_ids} == image_ids
    assert {i for problem in finding.problems for i in problem.annotation_ids} == annotation_ids
    assert report.wrong == any(finding.severity == "error" for finding in report.findings)
    if severity != "error":
        others = {("val", "unused_category", "info", 1)} if kind == "unused_category" else set()
        assert kinds(report) == {(split, kind, severity, count)} | others
    assert kind in report_text(report)
    assert any(of_kind["kind"] == kind for of_kind in json.loads(json.dumps(report.to_plain()))["findings"])


# In these no record is wrong by itself.
BEYOND_RECORDS = ("nothing_to_train_on", "different_classes")


@pytest.mark.parametrize("kind", [k for k in PLANTED if PLANTED[k][2] == "error" and k not in BEYOND_RECORDS])
def test_the_fixed_copy_is_sound_and_the_source_as_it_was(dataset, kind):
    PLANTED[kind][0](dataset)
    dataset.data["train"]["annotations"][0]["color"] = [1, {"a": None}]
    splits = dataset.splits()
    source = dataset.folder / "train.json"
    before = source.read_bytes()
    report = check_dataset(splits)
    changes = write_fixed(splits[0], report, dataset.folder / "fixed.json")
    assert changes
    assert all("\n" not in change for change in changes)
    assert source.read_bytes() == before

    document = json.loads((dataset.folder / "fixed.json").read_text())
    assert document["info"] == {"year": 2026}
    assert document["annotations"][0] == dataset.annotations[0], "what is right is not touched"
    fixed = coco_split("train", dataset.folder / "train", dataset.folder / "fixed.json")
    after = check_dataset([fixed])
    assert not after.wrong
    assert {finding.kind for finding in after.findings} <= {"unused_category", "image_without_boxes", "unlisted_file"}
    read_coco(dataset.folder / "fixed.json")


def test_each_change_is_the_one_that_was_needed(dataset):
    dataset.annotations[0]["bbox"] = [50, 4, 20, 15]
    dataset.annotations[0]["area"] = 300
    dataset.annotations[1]["id"] = 100
    dataset.annotations[2]["image_id"] = 55
    dataset.annotations[4]["bbox"] = [5, 5, 0, 5]
    dataset.annotations[5]["category_id"] = "8"
    dataset.file("3.png").unlink()
    splits = dataset.splits()
    document, changes = repaired(splits[0], check_dataset(splits))
    assert changes == [
        "image 13 (3.png): dropped with its annotations: no such file in the image folder",
        "annotations[5]: category_id '8' -> 8",
        "annotation 100 of image 10: clipped [50, 4, 20, 15] -> [50, 4, 14, 15]",
        "annotation 100 of image 10: id -> 112",
        "annotation 102: dropped: its image 55 does not exist",
        "annotation 104: dropped: box [5, 5, 0, 5] of image 12 has no extent",
        "annotation 106: dropped: its image 13 does not exist",
        "annotation 107: dropped: its image 13 does not exist",
    ]
    assert document["annotations"][0]["area"] == 14 * 15
    assert [annotation["id"] for annotation in document["annotations"]] == [100, 112, 103, 105, 108, 109, 110, 111]
    # Of a sound file nothing changes, and records are the same objects' values in the same order.
    sound = coco_split("val", dataset.folder / "val", dataset.folder / "val.json")
    assert repaired(sound, check_dataset([sound])) == (dataset.data["val"], [])


def test_ids_written_as_texts_are_mended(dataset):
    for image in dataset.images:
        image["id"] = str(image["id"])
    for annotation in dataset.annotations:
        annotation["image_id"] = str(annotation["image_id"])
    splits = dataset.splits()
    document, _ = repaired(splits[0], check_dataset(splits, decode=False))
    assert document["images"] == sound_data()["images"]
    assert document["annotations"] == sound_data()["annotations"]


def test_two_files_of_one_id_lose_their_annotations(dataset):
    repeat("images", 1, file_name="z.png")(dataset)
    splits = dataset.splits()
    document, changes = repaired(splits[0], check_dataset(splits, decode=False))
    assert [image["id"] for image in document["images"]] == [10, 12, 13, 14, 15]
    assert 11 not in {annotation["image_id"] for annotation in document["annotations"]}
    assert "image 11 (z.png): dropped with its annotations: other files have the same id" in changes


def test_a_copy_never_overwrites_its_source(dataset):
    splits = dataset.splits()
    with pytest.raises(UserError, match="would overwrite an input of this command"):
        write_fixed(splits[0], check_dataset(splits, decode=False), dataset.folder / "train.json")


def test_a_file_that_is_no_json_is_a_finding_and_the_other_split_is_checked(dataset):
    splits = dataset.splits()
    (dataset.folder / "train.json").write_text("{")
    dataset.data["val"]["annotations"][0]["bbox"] = [1, 1, 0, 5]
    (dataset.folder / "val.json").write_text(json.dumps(dataset.data["val"]))
    splits = [coco_split(split.name, split.root, split.records.path) for split in splits]
    report = check_dataset(splits)
    assert the(report, "unreadable_annotations").problems[0].message.startswith("not a json file, or cut short")
    assert the(report, "zero_box").split == "val"
    with pytest.raises(UserError, match="not a json file"):
        write_fixed(splits[0], report, dataset.folder / "fixed.json")


def test_without_decoding_files_are_only_looked_for(dataset):
    cut(0)(dataset)
    dataset.file("3.png").unlink()
    report = dataset.check(decode=False)
    assert kinds(report) == {("train", "missing_file", "error", 1)}
    assert [split.num_files for split in report.splits] == [0, 0]


def test_splits_that_share_a_folder_list_each_other_s_files(dataset):
    for image in dataset.data["val"]["images"]:
        dataset.file(image["file_name"], "val").rename(dataset.file(image["file_name"]))
    save_as("z.png", 50)(dataset)
    splits = [coco_split(split.name, dataset.folder / "train", split.records.path) for split in dataset.splits()]
    assert kinds(check_dataset(splits)) == {("train", "unlisted_file", "info", 1)}


def test_classes_that_are_not_used_do_not_count(dataset):
    dataset.annotations[1]["bbox"] = [40, 4, 0, 15]
    splits = [replace(split, classes=("cat",)) for split in dataset.splits()]
    assert kinds(check_dataset(splits)) == set()
    splits = [replace(split, classes=("cat", "DOG")) for split in splits]
    assert the(check_dataset(splits[:1]), "unknown_class").problems[0].message.endswith("got unknown classes ['DOG']")
    splits = [replace(split, classes=("cat", "cow")) for split in splits]
    assert kinds(check_dataset(splits)) == {
        ("train", "unused_category", "warning", 1),
        ("val", "unused_category", "info", 1),
    }


def test_imbalance(dataset):
    for number in range(95):
        box = [number % 10 * 2, number // 10 * 2, 20, 20]
        dataset.annotations.append({"id": 1000 + number, "image_id": 10, "category_id": 3, "bbox": box})
    del dataset.annotations[3:12:2]
    assert the(dataset.check(decode=False), "class_imbalance").problems[0].message == "101 boxes of 'cat', 1 of 'dog'"
    del dataset.annotations[-2:]
    assert kinds(dataset.check(decode=False)) == set()


def boxes_report(boxes, *, one_based=False):
    """What is said of boxes xywh, spread over images of 200 x 100 pixels."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in range(1, 9)]
    annotations = [
        {"id": i, "image_id": i % 8 + 1, "category_id": 1, "bbox": list(map(float, box))} for i, box in enumerate(boxes)
    ]
    table = shapes_table(1, 32, 0)
    split = table_split("train", table)
    records = replace(split.records, images=images, annotations=annotations, categories=[{"id": 1, "name": "a"}])
    return {f.kind for f in check_dataset([replace(split, records=records, one_based=one_based)]).findings}


def border_boxes(low, far, seed=0):
    """Boxes of objects cut by borders at ``low`` and at ``far`` before the far side, among others."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(60):
        x1, y1 = rng.integers(5, 60, 2)
        x2, y2 = rng.integers(70, 95, 2)
        if rng.random() < 0.2:
            x1 = low
        if rng.random() < 0.2:
            x2 = 200 - far
        boxes.append([x1, y1, x2 - x1, y2 - y1])
    return boxes


def test_corners_one_pixel_off():
    assert boxes_report(border_boxes(0, 0)) == set()
    assert boxes_report(border_boxes(1, 0)) == {"one_based_corners"}
    assert boxes_report(border_boxes(0, 1)) == {"short_boxes"}
    assert boxes_report(border_boxes(1, 1)) == {"one_based_corners", "short_boxes"}
    # A single box at the very border shows that the rule is the right one.
    assert boxes_report([*border_boxes(1, 1), [0, 5, 200, 90]]) == set()
    # Objects that never touch a border tell nothing; nor do coordinates spread evenly.
    assert boxes_report(border_boxes(20, 20)) == set()
    rng = np.random.default_rng(0)
    assert boxes_report([[x, 20, 30, 40] for x in rng.integers(1, 60, 500)]) <= {"repeated_box"}


def test_corners_of_voc_that_begin_at_zero():
    # Read as VOC's, a corner at 0 lies at -1.
    assert boxes_report(border_boxes(0, 0), one_based=True) == set()
    assert boxes_report(border_boxes(-1, 0), one_based=True) == {"zero_based_corners"}
    assert boxes_report(border_boxes(-1, 1), one_based=True) == {"zero_based_corners", "short_boxes"}


def test_boxes_written_by_another_rule():
    rng = np.random.default_rng(1)
    x1, y1 = rng.uniform(0, 120, 50), rng.uniform(0, 50, 50)
    w, h = rng.uniform(10, 80, 50), rng.uniform(10, 50, 50)
    right = np.stack([x1, y1, w, h], axis=1)
    corners = np.stack([x1, y1, x1 + w, y1 + h], axis=1)
    assert boxes_report(right) == set()
    assert "boxes_are_corners" in boxes_report(corners)
    assert "boxes_are_fractions" in boxes_report(right / [200, 100, 200, 100])


def test_boxes_that_are_corners_are_not_fixed_by_clipping(dataset):
    for annotation in dataset.annotations:
        annotation["bbox"] = [20, 20, 50, 45]
    splits = dataset.splits()
    with pytest.raises(UserError, match="leave their images if read as"):
        repaired(splits[0], check_dataset(splits, decode=False))


def test_near_duplicates_are_found_across_scale_and_compression(dataset):
    picture(0).resize((96, 72), Image.Resampling.BICUBIC).save(dataset.file("7.jpg", "val"), quality=60)
    dataset.data["val"]["images"][1] |= {"file_name": "7.jpg", "width": 96, "height": 72}
    dataset.file("7.png", "val").unlink()
    report = dataset.check()
    finding = the(report, "train_val_overlap")
    assert finding.problems[0].message == "nearly the same picture: image 10 of train (0.png), image 11 of val (7.jpg)"
    assert len(report.findings) == 1


def test_pictures_of_one_kind_are_not_near_duplicates(assets):
    """Blood cells under one microscope, among them one field at two focal planes."""
    folder = assets / "bccd" / "JPEGImages"
    facts = [image_facts(str(path)) for path in sorted(folder.iterdir())[:40]]
    (pair,) = near_duplicates(facts)
    assert [facts[i].path[-9:] for i in pair] == ["00037.jpg", "00038.jpg"]
    again = replace(facts[3], path="again", digest=b"other")
    assert near_duplicates([*facts, again]) == [(3, 40), pair]


def test_flat_pictures_are_not_compared():
    thumbnail = bytes([200] * 272)
    facts = [replace(ImageFacts("a"), digest=bytes([i]), thumbnail=thumbnail) for i in range(3)]
    assert near_duplicates(facts) == []


def test_processes_find_what_one_finds(dataset):
    cut(100)(dataset)
    dataset.splits()
    paths = [str(path) for split in ("train", "val") for path in sorted((dataset.folder / split).iterdir())]
    assert all_image_facts(paths, num_workers=2, progress=False) == all_image_facts(
        paths, num_workers=0, progress=False
    )


def deadly(path):
    if "deadly" in path:
        os._exit(1)
    return ImageFacts(path)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the stand-in does not reach other processes")
def test_an_image_that_ends_its_process_is_found(monkeypatch):
    monkeypatch.setattr(facts_module, "image_facts", deadly)
    monkeypatch.setattr(facts_module, "_CHUNK", 2)
    paths = [f"{i}.png" for i in range(12)]
    paths[5] = "deadly.png"
    facts = all_image_facts(paths, num_workers=1, progress=False)
    assert list(facts) == paths
    assert [path for path in paths if facts[path].error] == ["deadly.png"]


@pytest.mark.parametrize(("rounded", "stride"), [(True, "measured"), (False, "nominal")])
def test_coverage_is_that_of_every_anchor(rounded, stride):
    """Against torchvision's own grid of anchors, all of them; float32 anchors, hence 1e-5."""
    config = ModelConfig(anchor_rounding=rounded, anchor_stride=stride, min_size=200, max_size=300)
    layout = anchor_layout(config)
    strides = (4, 8, 16, 32, 64) if stride == "nominal" else ()
    sizes = tuple((size,) for size in config.anchor_sizes)
    anchors = Anchors(sizes, (config.aspect_ratios,) * 5, rounded=rounded, strides=strides, widened=True)
    rng = np.random.default_rng(0)
    for height, width in ((217, 391), (640, 480), (50, 90)):
        corners = rng.uniform(0, 1, (40, 2, 2)) * [width, height]
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        scale = min(200 / min(height, width), 300 / max(height, width))
        new_height, new_width = int(height * scale), int(width * scale)
        padded = [-(-side // 32) * 32 for side in (new_height, new_width)]
        grids = [[-(-side // step) for side in padded] for step in (4, 8, 16, 32, 64)]
        images = ImageList(torch.zeros(1, 3, *padded), [(new_height, new_width)])
        every = anchors(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
        factors = torch.tensor([new_width / width, new_height / height] * 2)
        expected = box_iou(torch.from_numpy(boxes) * factors, every.double()).amax(dim=1).numpy()
        shape = np.tile([[float(height), float(width)]], (40, 1))
        np.testing.assert_allclose(best_iou(boxes, shape, layout, 200), expected, atol=1e-5)
        shifted = replace(layout, cell_anchors=tuple(cells + np.array([1, 0, 1, 0]) for cells in layout.cell_anchors))
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(best_iou(boxes, shape, shifted, 200), expected, atol=1e-5)


def test_coverage_by_size_and_over_training_s_sizes():
    table = shapes_table(40, 128, 0)
    fitting = anchor_layout(ModelConfig(min_size=128, max_size=128, anchor_sizes=(16, 24, 32, 48, 64)))
    coverage = anchor_coverage(table, fitting)
    assert (
        coverage.num_boxes["all"] == table.num_boxes == sum(coverage.num_boxes[s] for s in ("small", "medium", "large"))
    )
    assert coverage.unreached["all"] < 0.1
    assert np.isnan(coverage.unreached["large"])
    large = anchor_layout(ModelConfig(min_size=128, max_size=128, anchor_sizes=(128, 256, 512, 1024, 2048)))
    assert anchor_coverage(table, large).unreached["all"] > 0.9
    both = replace(large, min_sizes=(128, 1024), max_size=1024)
    assert anchor_coverage(table, both).unreached["all"] == pytest.approx(
        (
            anchor_coverage(table, large).unreached["all"]
            + anchor_coverage(table, replace(both, min_sizes=(1024,))).unreached["all"]
        )
        / 2
    )
    assert the(check_dataset([table_split("train", table)], anchors=large), "unfit_anchors").severity == "warning"
    assert not check_dataset([table_split("train", table)], anchors=fitting).findings


def voc_folder(folder):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for index in range(4):
        picture(index).save(folder / "JPEGImages" / f"{index}.jpg")
        write_xml(folder, index, [("ant", 1, 1, 30, 30), ("bee", 5, 5, 64, 48)])
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    return folder


def write_xml(folder, index, objects, difficult=0):
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    (folder / "Annotations" / f"{index}.xml").write_text(f"<annotation>{size}{items}</annotation>")


def test_a_sound_voc_folder_has_no_findings(tmp_path):
    assert kinds(check_dataset([voc_split("train", voc_folder(tmp_path), "train")])) == set()


def test_every_damaged_voc_file_is_named(tmp_path):
    folder = voc_folder(tmp_path)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n2\n7\n")
    write_xml(
        folder, 0, [("ant", 10, 10, 10, 30), ("ant", 30, 10, 20, 30), ("bee", 0, 5, 20, 30), ("bee", 9, 9, 80, 30)]
    )
    (folder / "Annotations" / "1.xml").write_text("<annotation>")
    (folder / "Annotations" / "3.xml").write_text("<annotation><object/></annotation>")
    picture(9).save(folder / "JPEGImages" / "9.jpg")
    report = check_dataset([voc_split("train", folder, "train")])
    assert {finding.kind: finding.count for finding in report.findings} == {
        "bad_annotation_file": 3,
        "listed_twice": 1,
        "zero_box": 1,
        "negative_box": 1,
        "zero_based_corners": 1,
        "box_partly_outside": 1,
        "unlisted_file": 1,
    }
    named = [problem.file for problem in the(report, "bad_annotation_file").problems]
    assert named == [str(folder / "Annotations" / name) for name in ("1.xml", "7.xml", "3.xml")]
    assert the(report, "zero_box").problems[0].message.endswith("xmin, ymin, xmax, ymax = 10, 10, 10, 30")
    assert f"{folder / 'Annotations' / '1.xml'}: not well-formed XML" in report_text(report)
    assert the(report, "negative_box").problems[0].message.endswith("xmin, ymin, xmax, ymax = 30, 10, 20, 30")


def test_a_voc_folder_is_fixed_into_a_coco_json(tmp_path):
    folder = voc_folder(tmp_path)
    write_xml(folder, 0, [("ant", 10, 10, 10, 30), ("bee", 9, 9, 80, 30)], difficult=1)
    split = voc_split("train", folder, "train")
    changes = write_fixed(split, check_dataset([split]), tmp_path / "fixed.json")
    assert changes == [
        "annotation 1: dropped: box [9.0, 9.0, 0.0, 20.0] of image 1 has no extent",
        "annotation 2 of image 1: clipped [8.0, 8.0, 72.0, 22.0] -> [8.0, 8.0, 56.0, 22.0]",
        "1 difficult objects: iscrowd set to 1",
    ]
    fixed = coco_split("train", folder, tmp_path / "fixed.json")
    assert {f.kind for f in check_dataset([fixed]).findings} == {"unlisted_file"}, "3.jpg is not of this split"
    table = read_coco(tmp_path / "fixed.json")
    assert table.crowd.tolist() == [True, False, False, False, False]
    assert table.boxes_xywh[1].tolist() == [0, 0, 30, 30]


def test_the_two_boxes_of_bccd_without_extent_are_found(assets):
    splits = [voc_split(name, assets / "bccd", name) for name in ("train", "val")]
    report = check_dataset(splits, decode=False)
    assert [(f.split, f.kind, f.count) for f in report.findings] == [("train", "zero_box", 1), ("val", "zero_box", 1)]
    assert "BloodImage_00343.jpg" in report.findings[0].problems[0].message
    assert "BloodImage_00338.jpg" in report.findings[1].problems[0].message


def test_every_kind_has_words_and_one_severity(dataset):
    assert all("\n" not in kind.meaning and kind.meaning for kind in KINDS.values())
    planted = {kind: PLANTED[kind][2] for kind in PLANTED}
    assert set(planted) <= set(KINDS)


def test_junk_in_every_place_is_described_and_fixed(dataset):
    """Whatever stands in the file: a report, and a copy that has nothing wrong with its records."""
    junk = [None, "x", "3", 0, -3, 2.5, 10, 11.0, [1, 2, 3, 4], {}, float("nan"), 10**30, True, "", [["a"]], 10**400]
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = sound_data()
        for _ in range(rng.integers(1, 6)):
            section = data[str(rng.choice(["images", "annotations", "categories"]))]
            position = int(rng.integers(len(section)))
            value = junk[int(rng.integers(len(junk)))]
            if rng.random() < 0.1 or not isinstance(section[position], dict):
                section[position] = value
            else:
                section[position][str(rng.choice(sorted(section[position])))] = value
        dataset.data = {"train": data}
        splits = dataset.splits()
        report = check_dataset(splits, decode=False)
        try:
            write_fixed(splits[0], report, dataset.folder / "fixed.json")
        except UserError as error:
            assert "would be left" in str(error)  # noqa: PT017 - not every file leaves something to keep
            continue
        fixed = coco_split("train", dataset.folder / "train", dataset.folder / "fixed.json")
        assert [f.kind for f in check_dataset([fixed], decode=False).findings if f.severity == "error"] == []


def test_coverage_of_what_is_seen_by_tiles():
    """Objects of 40 pixels in 6000x4000: whole images show 8 of them, below every anchor; tiles show all 40."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1, (200, 2)) * [5960, 3960]
    boxes = np.concatenate([corners, corners + 40], axis=1)
    sizes = np.tile([[4000.0, 6000.0]], (200, 1))
    whole, tiled = anchor_layout(ModelConfig()), anchor_layout(ModelConfig(), Tiles(800, 0.2))
    table = replace(
        shapes_table(1, 128, 0),
        sizes=np.array([[4000, 6000]], dtype=np.int32),
        boxes_xywh=np.concatenate([corners, np.full((200, 2), 40.0)], axis=1),
        **{name: np.ones(200, dtype=np.int64) for name in ("labels", "annotation_ids")},
        area=np.full(200, 1600.0),
        **{name: np.zeros(200, dtype=bool) for name in ("crowd", "difficult")},
        offsets=np.array([0, 200]),
    )
    assert anchor_coverage(table, whole).unreached["all"] == 1
    assert anchor_coverage(table, tiled).unreached["all"] < 0.2
    assert (best_iou(boxes, sizes, whole, 800) < 0.2).all()
    small = replace(table, sizes=np.array([[700, 800]], dtype=np.int32), boxes_xywh=table.boxes_xywh / [8, 8, 1, 1])
    assert anchor_coverage(small, tiled) == anchor_coverage(small, whole), "images of one tile are seen whole"
