"""Which images are held out: by their contents alone, and never what is alike on both sides."""

import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from resdet.build import build_splits, build_train_set, build_val_set
from resdet.check.check import check_dataset
from resdet.config import parse_config
from resdet.data import split
from resdet.data.coco import read_coco
from resdet.data.split import check_lists, held_out_images, write_lists
from resdet.errors import DataError, UserError

NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    monkeypatch.setenv("RESDET_CACHE", str(folder))
    return folder


def pixels(seed, side=32):
    """A picture with large soft blobs, as unlike the others as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def written(folder, labels, side=32):
    """Write a json for files by name, with a list of labels each; return its table."""
    images = [{"id": i, "file_name": name, "height": side, "width": side} for i, name in enumerate(labels)]
    boxes = [
        {"id": 100 * i + n, "image_id": i, "category_id": label, "bbox": [1, 2, 9, 9]}
        for i, of_image in enumerate(labels.values())
        for n, label in enumerate(of_image)
    ]
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES, start=1)]
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return read_coco(path)


def held(folder, labels, fraction=0.3, seed=0):
    """Return the names that are held out."""
    table = written(folder, labels)
    rows, _ = held_out_images(table, folder, fraction=fraction, seed=seed)
    return {table.file_names[row] for row in np.flatnonzero(rows)}


def raw(number):
    """A file whose bytes no library decides: 16 x 16 gray pixels."""
    return b"P5 16 16 255\n" + hashlib.shake_256(b"%d" % number).digest(256)


@pytest.fixture
def forty(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(raw(number))
    return tmp_path


EVERY = {f"{number}.png": [1, 2, 3] for number in range(40)}


def test_the_split_is_the_same_everywhere(forty):
    """Pinned: it must not depend on the machine, the library that decodes, or the version of this one."""
    assert held(forty, EVERY, 0.2) == {f"{number}.png" for number in (3, 4, 14, 21, 28, 29, 34)}
    assert held(forty, EVERY, 0.1, seed=5) == {f"{number}.png" for number in (8, 12, 13, 26)}


def test_names_order_and_other_images_decide_nothing(forty):
    before = held(forty, EVERY)
    assert 0 < len(before) < 40
    assert held(forty, dict(reversed(EVERY.items()))) == before
    renamed = {}
    for number in range(40):
        (forty / "sub").mkdir(exist_ok=True)
        shutil.copy(forty / f"{number}.png", forty / "sub" / f"z{99 - number}.png")
        renamed[f"sub/z{99 - number}.png"] = [1, 2, 3]
    assert {f"{99 - int(name[5:-4])}.png" for name in held(forty, renamed)} == before
    for number in range(40, 80):
        (forty / f"{number}.png").write_bytes(raw(number))
    more = {f"{number}.png": [1, 2, 3] for number in range(79, -1, -1)}
    assert {name for name in held(forty, more) if name in EVERY} == before
    assert held(forty, EVERY, seed=1) != before
    assert held(forty, EVERY, 0.5) > before


def test_what_is_alike_is_on_one_side(tmp_path):
    pairs = []
    for number in range(20):
        picture = pixels(number, side=64)
        save(picture, tmp_path / f"{number}.png")
        save(picture, tmp_path / f"{number}_again.jpg", quality=60)
        save(picture.resize((32, 32)), tmp_path / f"{number}_small.png")
        (tmp_path / f"{number}_same.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
        pairs.append([f"{number}{end}" for end in (".png", "_again.jpg", "_small.png", "_same.png")])
    labels = {name: [1] for names in pairs for name in names}
    for seed in range(5):
        found = held(tmp_path, labels, seed=seed)
        assert 0 < len(found) < 80
        assert all(len(found & set(names)) in (0, 4) for names in pairs)


@pytest.mark.parametrize(
    "names",
    [
        ["{}_jpg.rf.0123456789abcdef0123456789abcde{}.jpg", "{}_jpg.rf.A9bZ00yyXX1122qqww{}.jpg"],
        ["{}_mp4-{}_jpg.rf.0123456789abcdef0123456789abcdef.png"],
        ["clip{}_frame_{}.png", "clip{}-frame00{}.png"[:4] + "{}_frame_0{}5.png"],
        ["v{}/frame_00{}.png"],
    ],
)
def test_copies_and_frames_stay_together(names, tmp_path):
    groups = [[name.format(group, n) for name in names for n in range(4 // len(names))] for group in range(12)]
    numbers = iter(range(48))
    for name in (name for group in groups for name in group):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw(next(numbers)))
    labels = {name: [1] for group in groups for name in group}
    for seed in range(5):
        found = held(tmp_path, labels, seed=seed)
        assert 0 < len(found) < 48
        assert all(len(found & set(group)) in (0, 4) for group in groups)


def test_one_long_video_is_cut_into_stretches(tmp_path):
    labels = {f"frame_{10 * number:06}.png": [1] for number in range(100)}  # 0 to 990: ten stretches
    for number, name in enumerate(labels):
        (tmp_path / name).write_bytes(raw(number))
    found = held(tmp_path, labels)
    assert {int(name[6:12]) // 100 for name in found} < set(range(10))
    assert len(found) == 10 * len({int(name[6:12]) // 100 for name in found})
    _, notes = held_out_images(written(tmp_path, labels), tmp_path, fraction=0.3, seed=0)
    assert notes[-1] == (
        f"{tmp_path / 'train.json'}: 100 images are frames of one video (frame), by their names: stretches of 100 "
        "frames are held out whole, and what lies next to them is nearly the same"
    )


def test_photographs_with_numbers_are_no_video(forty):
    labels = {}
    for number in range(40):
        (forty / f"{number}.png").rename(forty / f"IMG_{number}.png")
        labels[f"IMG_{number}.png"] = [1]
    assert split._groups(written(forty, labels), split._File.all_of(written(forty, labels), forty), 0.3)[0].max() == 39


def test_rare_classes_are_on_both_sides(forty):
    labels = {name: [1] for name in EVERY} | {"3.png": [1, 2], "4.png": [2], "5.png": [3]}
    for seed in range(25):
        found = held(forty, labels, 0.2, seed)
        assert len(found & {"3.png", "4.png"}) == 1
        assert "5.png" not in found  # a class that is not trained on is never learned


def test_unreadable_files_are_trained_on(forty):
    for number in range(30):
        (forty / f"{number}.png").write_bytes(raw(number)[:99])
    (forty / "39.png").unlink()
    found = held(forty, EVERY, 0.5)
    assert found
    assert found <= {f"{number}.png" for number in range(30, 39)}


def test_what_cannot_be_divided_is_refused(forty):
    (forty / "1.png").write_bytes(raw(0))
    with pytest.raises(DataError) as refusal:
        held(forty, {"0.png": [1], "1.png": [1]})
    assert str(refusal.value) == (
        f"{forty / 'train.json'}: data.val.fraction cannot hold out any of its 2 images: they look alike, belong "
        "together or cannot be read; data.val must state other images"
    )


def test_two_images_are_one_each(forty):
    assert len(held(forty, {"0.png": [1], "1.png": [2]}, 0.01)) == 1
    assert len(held(forty, {"0.png": [1], "1.png": [1]}, 0.99)) == 1


def test_it_is_told(forty):
    (forty / "1.png").write_bytes(raw(0))
    table = written(forty, {name: [1] for name in EVERY} | {"3.png": [1, 3]})
    rows, notes = held_out_images(table, forty, fraction=0.3, seed=7)
    name = forty / "train.json"
    assert notes == [
        f"{name}: {rows.sum()} of 40 images ({rows.mean():.1%}) are held out of training as data.val "
        "(data.val.fraction 0.3, data.val.seed 7), each by a hash of its file",
        f"{name}: images that look alike or belong together stay on one side: 2 images, in 1 groups",
        f"{name}: no box in data.val, and so no AP, for 'dog', 'owl'",
    ]


def test_images_are_decoded_once(forty, monkeypatch, cache):
    before = held(forty, EVERY)
    decode, decoded = split.all_image_facts, []

    def counted(paths, **options):
        decoded.extend(paths)
        return decode(paths, **options)

    monkeypatch.setattr(split, "all_image_facts", counted)
    assert held(forty, EVERY) == before
    assert held(forty, EVERY, seed=1) != before
    assert decoded == []
    (entry,) = cache.glob("*.text")
    entry.write_text(entry.read_text()[:-9])  # damaged
    assert held(forty, EVERY) == before
    assert len(decoded) == 40
    (forty / "7.png").write_bytes(raw(99))
    held(forty, EVERY)
    assert len(decoded) == 80
    monkeypatch.setenv("RESDET_CACHE", "off")
    held(forty, EVERY)
    assert len(decoded) == 120


def test_many_images_are_not_decoded(forty, monkeypatch):
    before = held(forty, EVERY)
    monkeypatch.setattr(split, "MAX_COMPARED", 39)
    monkeypatch.setattr(split, "all_image_facts", None)
    assert held(forty, EVERY) == before
    _, notes = held_out_images(written(forty, EVERY), forty, fraction=0.3, seed=0)
    assert notes[1].endswith("has more than 39 images: near duplicates were not looked for (check does)")


def test_the_number_of_workers_decides_nothing(tmp_path, monkeypatch):
    for number in range(130):
        (tmp_path / f"{number}.png").write_bytes(raw(number))
    labels = {f"{number}.png": [1] for number in range(130)}
    monkeypatch.setenv("RESDET_CACHE", "off")
    monkeypatch.setattr(split, "default_num_workers", lambda: 0)
    alone = held(tmp_path, labels)
    monkeypatch.setattr(split, "default_num_workers", lambda: 2)
    assert held(tmp_path, labels) == alone


def configured(folder, *overrides):
    return parse_config(
        f"data:\n  train: {{format: coco, images: {folder}, annotations: {folder}/train.json}}\n"
        f"  val: {{fraction: 0.3}}\ntrain: {{steps: 1}}\noutput_dir: {folder}/run\n",
        overrides,
    )


def test_both_sides_are_built_and_checked(forty, caplog):
    labels = {f"pic{number}.png": [1, 2, 3] for number in range(40)}
    for number in range(40):
        save(pixels(number // 2), forty / f"pic{number}.png", compress_level=1 + number % 2)
    written(forty, labels)
    config = configured(forty)
    with caplog.at_level(logging.INFO, logger="resdet"):
        train, val = build_train_set(config), build_val_set(config)
    assert caplog.text.count("are held out of training as data.val") == 1
    ids = [set(part.table.image_ids.tolist()) for part in (train, val)]
    assert ids[0] | ids[1] == set(range(40))
    assert not ids[0] & ids[1]
    assert ids[1]
    assert train[0][1]["image_id"] == train.table.image_ids[0]
    splits = build_splits(config)
    assert [{image["id"] for image in part.records.images} for part in splits] == ids
    report = check_dataset(splits)
    assert [part.num_images for part in report.splits] == [len(one) for one in ids]
    # Each picture is there twice, and never on two sides.
    assert {finding.kind for finding in report.findings} == {"duplicate_image", "unlisted_file"}


def test_skipped_images_are_never_held_out(forty):
    for number in range(30):
        (forty / f"{number}.png").write_bytes(b"")
    (forty / "35.png").unlink()
    written(forty, EVERY)
    with pytest.raises(DataError, match=r"1 of the 40 images of .* are missing: 35\.png"):
        build_val_set(configured(forty))
    config = configured(forty, "data.train.unreadable=skip")
    names = build_val_set(config).table.file_names.tolist()
    assert names
    assert set(names) <= {f"{number}.png" for number in range(30, 40) if number != 35}
    assert len(build_train_set(config)) + len(names) == 40


def test_damage_is_still_checked(forty):
    (forty / "train.json").write_text("{}")
    splits = build_splits(configured(forty))
    assert [len(part.records.images) for part in splits] == [0, 0]
    assert [part.problems[0].kind for part in splits if part.problems] == ["unreadable_annotations"]


def test_lists_of_a_run(forty):
    table = written(forty, EVERY)
    first, second = table.select_images(np.arange(30)), table.select_images(np.arange(30, 40))
    write_lists(forty, first, second)
    assert (forty / "val_images.txt").read_text().splitlines() == [f"{number}.png" for number in range(30, 40)]
    check_lists(forty, first, second)
    check_lists(forty / "elsewhere", second, first)
    more = table.select_images(np.arange(28)), table.select_images(np.arange(33, 40))
    check_lists(forty, *more)
    with pytest.raises(UserError) as refusal:
        check_lists(forty, table.select_images(np.arange(32)), table.select_images(np.arange(29, 40)))
    assert str(refusal.value) == (
        f"{forty}: 1 images of data.val were trained on (29.png); 2 images of data.train were held out (30.png, "
        "31.png): the files, data.train or data.val have changed since the run began; undo that, or begin another "
        "run with another output_dir"
    )
    with pytest.raises(UserError, match=r"1 images of data.val were trained on \(29.png\): the files"):
        check_lists(forty, None, table.select_images(np.arange(29, 40)))
