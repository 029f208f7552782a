"""Images with one class each: folders, CIFAR-10, handwritten digits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from resdet.data.images import read_image
from resdet.data.names import IMAGE_SUFFIXES, is_hidden, same_form
from resdet.errors import DataError, UserError, name_some, shortened
from resdet.types import Ints
from resdet.weights.arrays import read_pickle

Split: TypeAlias = Literal["train", "val", "trainval", "test"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_RECORDS = 10_000
_CIFAR_PLACE = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_VAL_EVERY, _DIGITS_VAL_EVERY, _DIGITS_TEST_EVERY = 10, 8, 5


class Pictures(Protocol):
    """Images by their row, uint8 RGB ``[H, W, 3]``; must pickle where workers are spawned."""

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Return image ``index``."""

    def name(self, index: int) -> str:
        """Return its name for messages."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with one class each."""

    name: str  # of the dataset, for messages
    classes: tuple[str, ...]  # in label order
    labels: npt.NDArray[np.int64]  # class of each image [N], 0-based: there is no background
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return image ``index``, 8-bit RGB."""
        return Image.fromarray(self.pictures(index))

    def select_images(self, indices: Ints) -> LabelledImages:
        """Return the images at ``indices``, in that order, of the same classes."""
        return replace(self, labels=self.labels[indices], pictures=_ChosenPictures(self.pictures, indices))


@dataclass(frozen=True)
class _ChosenPictures:
    """Some of the images."""

    pictures: Pictures
    indices: Ints  # [N]

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the chosen image ``index``."""
        return self.pictures(int(self.indices[index]))

    def name(self, index: int) -> str:
        """Return its name for messages."""
        return self.pictures.name(int(self.indices[index]))


@dataclass(frozen=True)
class StoredPictures:
    """Images in memory."""

    pixels: npt.NDArray[np.uint8]  # RGB [N, H, W, 3]
    source: str  # their name, to which messages append the row

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Return image ``index``."""
        return self.pixels[index]  # type: ignore[no-any-return]

    def name(self, index: int) -> str:
        """Return its name for messages."""
        return f"{self.source} image {index}"


@dataclass(frozen=True)
class FolderPictures:
    """Image files in the subfolders of a folder."""

    root: Path
    folders: Sequence[str]  # names of its subfolders
    of_folder: npt.NDArray[np.int64]  # subfolder of each image, a row of folders [N]
    files: npt.NDArray[np.bytes_]  # names [N]: a million of them are one array, which workers share without copies

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Read image ``index``; a DataError is raised if it cannot be read."""
        return read_image(Path(self.name(index)))

    def name(self, index: int) -> str:
        """Return its path."""
        return str(self.root / self.folders[self.of_folder[index]] / os.fsdecode(self.files[index]))


def read_folder(root: Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """List a folder with one subfolder of images for each class. No image is opened.

    A million files take a second or two: each subfolder is listed once. Hidden files and files without the suffix of an
    image are skipped. The classes are the subfolders' names, sorted; if ``classes`` (in label order) are given, some
    may have no subfolder here, as in a small validation set.
    """
    if not os.path.isdir(root):
        raise DataError(f"{shortened(root)}: no such folder of class folders")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    if not folders:
        raise DataError(f"{root}: must hold one folder of images for each class, named by it; it holds no folders")
    forms = Counter(map(same_form, folders))
    if alike := [ascii(folder) for folder in folders if forms[same_form(folder)] > 1]:
        raise DataError(f"{root}: each class must have one folder, but these names look alike: {name_some(alike)}")
    names = tuple(map(same_form, folders) if classes is None else classes)
    label_of = {same_form(name): label for label, name in enumerate(names)}
    unknown = [folder for folder in folders if same_form(folder) not in label_of]
    if unknown:
        raise DataError(
            f"{root}: {len(unknown)} of its {len(folders)} folders are none of the {len(names)} classes: "
            f"{name_some(unknown, 3)}; the classes are {name_some(names, 3)}"
        )
    files: list[bytes] = []
    counts: list[int] = []
    for folder in folders:
        listed = sorted(
            os.fsencode(entry.name)
            for entry in os.scandir(root / folder)
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(entry.name)
        )
        if not listed and classes is None:
            raise DataError(f"{root / folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}); a class needs some")
        files += listed
        counts.append(len(listed))
    if not files:
        raise DataError(f"{root}: holds no images ({', '.join(IMAGE_SUFFIXES)}) in its {len(folders)} folders")
    of_folder = np.repeat(np.arange(len(folders), dtype=np.int64), counts)  # [N]
    labels = np.array([label_of[same_form(folder)] for folder in folders], dtype=np.int64)[of_folder]  # [N]
    pictures = FolderPictures(root, folders, of_folder, np.array(files))
    return LabelledImages(str(root), names, labels, pictures)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read a text file with one class per line, in label order; anything after a space or comma is ignored."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of classes cannot be read: {error}") from None
    names = tuple(line.replace(",", " ").split()[0] for line in lines if line.strip(" ,"))
    if not names:
        raise DataError(f"{path}: must have one class a line, and is empty")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: names {', '.join(twice[:3])} more than once; each class has one line")
    return names


def stratified_split(labels: npt.NDArray[np.int64], every: int) -> npt.NDArray[np.bool_]:
    """Return a mask ``[N]`` of every ``every``-th image of each class, in the order of the data.

    It draws no random numbers, so it does not depend on the version of any library.
    """
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[every - 1 :: every]] = True
    return chosen


def read_cifar10(root: Path, split: Split) -> LabelledImages:
    """Read CIFAR-10 in its binary or its Python version. Pickles are read without running code that they name.

    ``root`` is ``cifar-10-batches-bin``, ``cifar-10-batches-py``, or the folder that holds one of them.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the formats are described at
        https://www.cs.toronto.edu/~kriz/cifar.html. The papers do not say which 5,000 images they validate on; here
        these are every tenth of each class.
    """
    stems = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    folder, suffix = _find_cifar(root)
    batches = [_read_cifar_batch(folder / f"{stem}{suffix}") for stem in stems]
    planes, labels = map(np.concatenate, zip(*batches, strict=True))
    if split != "test":
        rows = _rows(labels, split, _CIFAR_VAL_EVERY)
        planes, labels = planes[rows], labels[rows]
    pixels = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # [N, 32, 32, 3]
    name = f"CIFAR-10 {split}"
    return LabelledImages(name, CIFAR10_CLASSES, labels, StoredPictures(pixels, name))


def _rows(labels: npt.NDArray[np.int64], split: Split, val_every: int) -> npt.NDArray[np.int64]:
    """Return the rows of a split among those of trainval."""
    held_out = stratified_split(labels, val_every)
    return np.flatnonzero({"train": ~held_out, "val": held_out}.get(split, np.ones_like(held_out)))


def _find_cifar(root: Path) -> tuple[Path, str]:
    """Return the folder with the batches and the suffix of their names: that of the binary version, or none."""
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix in (".bin", ""):
            if any((folder / f"{stem}{suffix}").is_file() for stem in ("data_batch_1", "test_batch")):
                return folder, suffix
    archives = sorted(root.glob("cifar-10-*.tar.gz")) if root.is_dir() else []
    how = (
        f"unpack {archives[0]}: tar -xzf {archives[0].name}"
        if archives
        else f"get {_CIFAR_PLACE}cifar-10-binary.tar.gz (or cifar-10-python.tar.gz) and unpack it there"
    )
    raise DataError(f"{root}: no CIFAR-10 here (cifar-10-batches-bin or cifar-10-batches-py); {how}")


def _read_cifar_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the images of a batch as planes ``[N, 3 * 32 * 32]``, and their labels ``[N]``."""
    try:
        planes, labels = _cifar_binary(path) if path.suffix else _cifar_pickle(path)
    except OSError as error:
        why = f"cannot be read: {error.strerror}; download it again from {_CIFAR_PLACE}"
        raise DataError(f"{path}: {why}") from None
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise DataError(f"{path}: labels must lie in 0..9, got {labels.min()}..{labels.max()}; it is damaged")
    return planes, labels


def _cifar_binary(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    content = np.fromfile(path, dtype=np.uint8)
    expected = _CIFAR_RECORDS * 3073  # a label and 3 * 32 * 32 colours each
    if content.size != expected:
        raise DataError(f"{path}: must have {expected} bytes, has {content.size}; it is cut short or damaged")
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _cifar_pickle(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        content = read_pickle(path)
    except UserError as error:
        raise DataError(str(error)) from error
    planes, labels = (content.get("data"), content.get("labels")) if isinstance(content, dict) else (None, None)
    if (
        not isinstance(planes, Tensor)
        or planes.dtype != torch.uint8
        or planes.shape != (_CIFAR_RECORDS, 3072)
        or not isinstance(labels, list)
        or len(labels) != _CIFAR_RECORDS
        or not all(isinstance(label, int) for label in labels)
    ):
        raise DataError(
            f"{path}: must hold data, uint8 [{_CIFAR_RECORDS}, 3072], and labels, a list of {_CIFAR_RECORDS}; "
            "it is not a batch of CIFAR-10"
        )
    return planes.numpy(), np.array(labels, dtype=np.int64)


def read_digits(split: Split) -> LabelledImages:
    """Return the handwritten digits that come with scikit-learn, 8 x 8 pixels, as RGB.

    They were written by 13 people, each of whom wrote digits of all splits: a test is on new digits of known writers.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
        (its test set); ``sklearn.datasets.load_digits``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "format digits: the images come with scikit-learn, which is not installed: pip install 'resdet[digits]'"
        ) from None
    content = load_digits()
    labels = np.asarray(content.target, dtype=np.int64)
    gray = np.rint(np.asarray(content.images) * (255 / 16)).astype(np.uint8)  # of 0..16; [N, 8, 8]
    in_test = stratified_split(labels, _DIGITS_TEST_EVERY)
    rows = np.flatnonzero(in_test if split == "test" else ~in_test)
    if split != "test":
        rows = rows[_rows(labels[rows], split, _DIGITS_VAL_EVERY)]
    name = f"digits {split}"
    pixels = np.repeat(gray[rows][..., None], 3, axis=3)  # [N, 8, 8, 3]
    return LabelledImages(name, tuple(map(str, range(10))), labels[rows], StoredPictures(pixels, name))
