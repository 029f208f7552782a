"""Folders, CIFAR-10 and digits: what is read, and what is said when it cannot be."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resdet.classification import data
from resdet.classification.data import read_cifar10, read_class_names, read_digits, read_folder, stratified_split
from resdet.errors import DataError


def test_folder_is_listed_by_class(folder: Path) -> None:
    images = read_folder(folder / "train")
    assert images.classes == ("blue", "green", "red")
    assert images.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert images.pictures.name(9) == str(folder / "train" / "green" / "1.png")
    stored = np.array(Image.open(folder / "train" / "green" / "1.png"))
    assert np.array_equal(np.array(images.image(9)), stored)
    assert not np.array_equal(np.array(images.image(9)), np.array(read_folder(folder / "train").image(10)))


def test_some_of_the_images_are_images_of_the_same_classes(folder: Path) -> None:
    images = read_folder(folder / "train")
    some = images.select_images(np.array([9, 0]))
    assert (len(some), some.classes, some.labels.tolist()) == (2, images.classes, [1, 0])
    assert some.pictures.name(0) == images.pictures.name(9)
    assert np.array_equal(np.array(some.image(0)), np.array(images.image(9)))
    assert not np.array_equal(np.array(some.image(1)), np.array(images.image(9)))


def test_given_classes_decide_the_labels_and_some_may_be_absent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red a colour\nwhite\ngreen\nblue\n")
    names = read_class_names(tmp_path / "classes.txt")
    images = read_folder(folder / "val", names)
    assert images.classes == ("red", "white", "green", "blue")
    assert sorted(set(images.labels.tolist())) == [0, 2, 3]


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("notes.txt", ".x.png", "y.JPEG"):
        (tmp_path / "a" / name).write_bytes(b"")
    images = read_folder(tmp_path)
    assert [images.pictures.name(i) for i in range(len(images))] == [str(tmp_path / "a" / "y.JPEG")]


@pytest.mark.parametrize("clutter", [".git", "__MACOSX", "@eaDir"])
def test_folders_of_the_operating_system_are_no_classes(tmp_path: Path, clutter: str) -> None:
    for name in ("a", clutter):
        (tmp_path / name).mkdir()
        (tmp_path / name / "y.png").write_bytes(b"")
        for hidden in ("._y.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / name / hidden).write_bytes(b"")
    images = read_folder(tmp_path)
    assert (images.classes, len(images)) == (("a",), 1)


def test_class_folders_in_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    composed, decomposed = "Bär", "Ba\u0308r"
    (tmp_path / decomposed).mkdir()
    (tmp_path / decomposed / "y.png").write_bytes(b"")
    assert read_folder(tmp_path).classes == (composed,)
    for names in ([composed], [decomposed]):
        images = read_folder(tmp_path, names)
        assert images.labels.tolist() == [0]
        assert images.pictures.name(0) == str(tmp_path / decomposed / "y.png")
    (tmp_path / composed).mkdir()
    with pytest.raises(DataError, match=r"these names look alike: 'Ba\\u0308r', 'B\\xe4r'$"):
        read_folder(tmp_path)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a/broken\.png: not a readable image"):
        read_folder(tmp_path).image(0)


def test_faults_of_folders_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder of class folders"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="it holds no folders"):
        read_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no images \(.jpg"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="1 of its 3 folders are none of the 2 classes: red"):
        read_folder(folder / "train", ["blue", "green"])


def test_faults_of_class_lists_are_told(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_class_names(path)
    path.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="names a more than once"):
        read_class_names(path)


@pytest.mark.slow
def test_a_million_files_are_listed_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 folders of 1,200 names; the names come from a stand-in for the disk, whose own time is not ours."""

    class Entry:
        def __init__(self, name: str) -> None:
            self.name = name

        def is_dir(self) -> bool:
            return "." not in self.name

    def scandir(path: Path) -> list[Entry]:
        inside = path != tmp_path
        return [Entry(f"{path.name}_{i:06d}.JPEG" if inside else f"n{i:08d}") for i in range(1200 if inside else 1000)]

    monkeypatch.setattr(os, "scandir", scandir)
    begun = os.times().user
    images = read_folder(tmp_path)
    assert len(images) == 1_200_000
    assert os.times().user - begun < 20


def test_stratified_split_takes_the_same_share_of_each_class() -> None:
    labels = np.array([0, 1] * 10 + [1] * 20)
    chosen = stratified_split(labels, 5)
    assert np.bincount(labels[chosen]).tolist() == [2, 6]
    assert np.flatnonzero(chosen)[:3].tolist() == [8, 9, 18]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's two formats with the same random images, 20 in each file instead of 10,000."""
    monkeypatch.setattr(data, "_CIFAR_RECORDS", 20)
    generator = np.random.default_rng(0)
    binary, python = tmp_path / "bin" / "cifar-10-batches-bin", tmp_path / "py" / "cifar-10-batches-py"
    binary.mkdir(parents=True)
    python.mkdir(parents=True)
    for stem in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        planes = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = generator.permutation(np.repeat(np.arange(10), 2))
        records = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
        (binary / f"{stem}.bin").write_bytes(records.tobytes())
        content = {b"batch_label": b"x", b"labels": labels.tolist(), b"data": planes, b"filenames": [b"a.png"] * 20}
        (python / stem).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


def test_cifar10_is_the_same_in_both_formats(cifar: Path) -> None:
    binary, python = (read_cifar10(cifar / name, "trainval") for name in ("bin", "py"))
    assert len(binary) == 100
    assert binary.labels.tolist() == python.labels.tolist()
    assert all(np.array_equal(binary.pictures(i), python.pictures(i)) for i in range(100))
    # The format's definition: a label, then 1,024 reds row by row, then greens, then blues.
    record = np.frombuffer((cifar / "bin" / "cifar-10-batches-bin" / "data_batch_1.bin").read_bytes(), np.uint8)
    assert binary.labels[0] == record[0]
    assert binary.pictures(0)[3, 5].tolist() == [record[1 + plane * 1024 + 3 * 32 + 5] for plane in range(3)]
    assert not np.array_equal(read_cifar10(cifar / "bin", "test").pictures(0), binary.pictures(0))


def test_cifar10_is_split_by_class(cifar: Path) -> None:
    both, train, val = (read_cifar10(cifar / "bin" / "cifar-10-batches-bin", s) for s in ("trainval", "train", "val"))
    assert np.bincount(val.labels).tolist() == [1] * 10
    assert np.bincount(train.labels).tolist() == [9] * 10
    pixels = {images.pictures(i).tobytes() for images in (train, val) for i in range(len(images))}
    assert pixels == {both.pictures(i).tobytes() for i in range(100)}


def test_faults_of_cifar10_are_told(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 here .* get https://www\.cs\.toronto\.edu"):
        read_cifar10(tmp_path / "nowhere", "train")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"tar -xzf cifar-10-python\.tar\.gz"):
        read_cifar10(tmp_path / "packed", "train")
    binary = cifar / "bin" / "cifar-10-batches-bin"
    (binary / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_3\.bin: must have 61460 bytes, has 5"):
        read_cifar10(cifar / "bin", "train")
    (binary / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: cannot be read"):
        read_cifar10(cifar / "bin", "train")
    python = cifar / "py" / "cifar-10-batches-py"
    (python / "test_batch").write_bytes(pickle.dumps({b"data": [1]}))
    with pytest.raises(DataError, match="test_batch: must hold data"):
        read_cifar10(cifar / "py", "test")


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


def test_a_pickle_with_code_is_refused(cifar: Path) -> None:
    (cifar / "py" / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": _Evil()}))
    with pytest.raises(DataError, match=r"would run code of its own \(posix\.system\), which is refused"):
        read_cifar10(cifar / "py", "test")


def test_digits_are_split_for_good() -> None:
    pytest.importorskip("sklearn")
    both, train, val, test = (read_digits(split) for split in ("trainval", "train", "val", "test"))
    assert [len(images) for images in (both, train, val, test)] == [1442, 1265, 177, 355]
    assert np.bincount(test.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    pixels = [{i.pictures(n).tobytes() for n in range(len(i))} for i in (both, train, val, test)]
    assert pixels[1] | pixels[2] == pixels[0]
    assert not pixels[1] & pixels[2]
    assert not pixels[0] & pixels[3]
    assert test.image(0).size == (8, 8)
    assert max(test.pictures(i).max() for i in range(20)) == 255


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'resdet\[digits\]'"):
        read_digits("test")
