"""Images in, results out: run a detector on images, write pictures and COCO's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from resdet.data.images import read_image
from resdet.drawing import above, draw, is_drawing, legible_scale, picture_names, save_picture
from resdet.errors import DataError, UserError
from resdet.evaluation.inference import inference
from resdet.evaluation.labels import model_categories
from resdet.evaluation.matching import to_xywh
from resdet.evaluation.settings import InferenceSettings
from resdet.files import check_outputs, make_output_folder, write_text
from resdet.types import Category, Prediction


class Result(NamedTuple):
    """An image and what was found in it."""

    path: Path | None  # None for an array
    image: npt.NDArray[np.uint8]  # uint8 RGB [H, W, 3], to whose pixels the boxes refer
    prediction: Prediction  # by falling score


def predict(
    model: nn.Module,
    images: Sequence[Path | npt.NDArray[np.uint8]],
    settings: InferenceSettings = InferenceSettings(),
    *,
    score_threshold: float = 0.0,
    stored_pixels: bool = False,
    on_unreadable: Callable[[Path, DataError], None] | None = None,
) -> Iterator[Result]:
    """Detect objects in images, yielding each image's as soon as they are known.

    Nothing is kept between batches, so memory does not bound the number of images. The model is in evaluation mode
    until the iterator ends or is closed; then its training flags are restored.

    Args:
        model: A ``Detector`` or any torchvision ``FasterRCNN``.
        images: Image files, or uint8 RGB arrays ``[H, W, 3]``. Files are read upright, as EXIF's orientation says and
            viewers show them, and so are the images and boxes of the results.
        settings: How to run the model; ``num_workers`` has no effect.
        score_threshold: Detections below it are dropped, in [0, 1]. The model's own ``roi_heads.score_thresh`` (by
            default 0.05) applies before.
        stored_pixels: Read files without turning them, as COCO's annotations mean them and pycocotools reads them.
        on_unreadable: Called with each file that cannot be read and the error; the file is left out. By default the
            error is raised.

    Yields:
        A result for each image that could be read, in the order given.

    Raises:
        DataError: If an image cannot be read, or an array is not uint8 ``[H, W, 3]``.
        WeightsError: If the model computes NaN or infinity.
        UserError: If this model does not support ``settings.tricks``, or ``settings.batch_size`` is below 1.
    """
    if settings.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {settings.batch_size}")
    with inference(model, settings) as run, tqdm(total=len(images), unit="image", disable=not settings.progress) as bar:
        for start in range(0, len(images), settings.batch_size):
            batch: list[tuple[Path | None, npt.NDArray[np.uint8]]] = []
            where: list[str] = []
            for index, source in enumerate(images[start : start + settings.batch_size], start):
                if isinstance(source, np.ndarray):
                    batch.append((None, _checked(source, index)))
                    where.append(f"images[{index}]")
                    continue
                try:
                    batch.append((source, read_image(source, upright=not stored_pixels)))
                    where.append(str(source))
                except DataError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(source, error)
                    bar.update()
            if not batch:
                continue
            tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for _, image in batch]
            for (path, image), prediction in zip(batch, run(tensors, ", ".join(where)), strict=True):
                bar.update()
                yield Result(path, image, above(prediction, score_threshold))


@dataclass(frozen=True)
class PredictionReport:
    """What ``predict_files`` has done."""

    num_detections: int  # in the JSON file
    unreadable: dict[Path, DataError]  # the files that were left out, and why


def predict_files(
    model: nn.Module,
    files: Sequence[Path],
    output_dir: Path,
    settings: InferenceSettings = InferenceSettings(),
    *,
    score_threshold: float = 0.5,
    stored_pixels: bool = False,
) -> PredictionReport:
    """Detect objects in image files; write a picture with boxes for each and ``detections.json`` for all.

    The folder is created if it does not exist. The JSON holds every detection of the model, in COCO's result format
    (``to_coco_json``). The pictures show those of at least ``score_threshold``, small images enlarged; they are named
    after their files, with a number where two would have the same name. Boxes and pictures are upright unless
    ``stored_pixels`` (``predict``). Files that cannot be read are left out of both and reported.

    Outputs of an earlier call are replaced, but no file of ``files``, and in a folder that holds one of them, no
    picture that this function has not drawn: a UserError says so before anything is written. Other errors are those of
    ``predict`` and OSErrors; the pictures written before stay.
    """
    make_output_folder(output_dir)
    pictures = dict(zip(files, (output_dir / f"{name}.png" for name in picture_names(files)), strict=True))
    detections_file = output_dir / "detections.json"
    check_outputs([*pictures.values(), detections_file], files)
    if output_dir.resolve() in {folder.resolve() for folder in {file.parent for file in files}}:
        for picture in pictures.values():
            if picture.exists() and not is_drawing(picture):
                raise UserError(f"{picture}: would be replaced by a picture of detections; give another output folder")
    categories = model_categories(model)
    found: dict[Path, Prediction] = {}
    unreadable: dict[Path, DataError] = {}
    results = predict(model, files, settings, stored_pixels=stored_pixels, on_unreadable=unreadable.__setitem__)
    for file, image, prediction in results:
        assert file is not None
        found[file] = prediction
        drawn = draw(image, prediction, categories, score_threshold=score_threshold, scale=legible_scale(image))
        save_picture(pictures[file], drawn)
    entries = to_coco_json(files, [found.get(file) for file in files], categories)
    write_text(detections_file, json.dumps(entries) + "\n")
    return PredictionReport(len(entries), unreadable)


def to_coco_json(
    paths: Sequence[Path], predictions: Sequence[Prediction | None], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """Convert detections in image files to COCO's result format, ready for ``json.dump`` and pycocotools' ``loadRes``.

    Each has ``image_id``, ``file_name``, ``category_id``, ``category_name``, ``bbox`` (x, y, width, height; pixels) and
    ``score``. ``image_id`` is the file's name as a number (``000000000139.jpg`` is 139, as COCO names its images) if
    all files have such names and no two the same; otherwise files are numbered from 1. A file whose prediction is None
    could not be read: its name does not matter, but it is numbered. Without ``categories``, the model's classes,
    ``category_id`` is the label and ``category_name`` is left out.
    """
    read = [(path, prediction) for path, prediction in zip(paths, predictions, strict=True) if prediction is not None]
    numbers = [int(path.stem) for path, _ in read if path.stem.isascii() and path.stem.isdecimal()]
    if len(set(numbers)) < len(read):
        numbers = [number for number, prediction in enumerate(predictions, start=1) if prediction is not None]
    of_label = {one.label: {"category_id": one.category_id, "category_name": one.name} for one in categories}
    entries: list[dict[str, Any]] = []
    for image_id, (path, prediction) in zip(numbers, read, strict=True):
        columns = to_xywh(prediction["boxes"].double().numpy()), prediction["labels"], prediction["scores"]
        for bbox, label, score in zip(*(column.tolist() for column in columns), strict=True):
            category = of_label[label] if categories else {"category_id": label}
            entry = {"image_id": image_id, "file_name": path.name, **category, "bbox": bbox, "score": score}
            entries.append(entry)
    return entries


def _checked(image: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(f"images[{index}]: expected uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image
