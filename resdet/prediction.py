"""Images in, results out: run a detector on images, write pictures and COCO's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from resdet.data.images import read_image
from resdet.drawing import above, draw, legible_scale
from resdet.errors import DataError
from resdet.evaluation.inference import inference
from resdet.evaluation.labels import model_categories
from resdet.evaluation.matching import to_xywh
from resdet.evaluation.settings import InferenceSettings
from resdet.types import Category, Prediction


class Result(NamedTuple):
    """An image and what was found in it."""

    path: Path | None  # None for an array
    image: npt.NDArray[np.uint8]  # uint8 RGB [H, W, 3]
    prediction: Prediction  # by falling score


def predict(
    model: nn.Module,
    images: Sequence[Path | npt.NDArray[np.uint8]],
    settings: InferenceSettings = InferenceSettings(),
    *,
    score_threshold: float = 0.0,
) -> Iterator[Result]:
    """Detect objects in images, yielding each image's as soon as they are known.

    Nothing is kept between batches, so memory does not bound the number of images. The model is in evaluation mode
    until the iterator ends or is closed; then its training flags are restored.

    Args:
        model: A ``Detector`` or any torchvision ``FasterRCNN``.
        images: Image files, or uint8 RGB arrays ``[H, W, 3]``. Files are read as training reads them: their stored
            pixels, without EXIF orientation.
        settings: How to run the model; ``num_workers`` has no effect.
        score_threshold: Detections below it are dropped, in [0, 1]. The model's own ``roi_heads.score_thresh`` (by
            default 0.05) applies before.

    Yields:
        A result for each image, in the order given.

    Raises:
        DataError: If an image cannot be read, or an array is not uint8 ``[H, W, 3]``.
        WeightsError: If the model computes NaN or infinity.
        UserError: If this model does not support ``settings.tricks``.
    """
    with inference(model, settings) as run, tqdm(total=len(images), unit="image", disable=not settings.progress) as bar:
        for start in range(0, len(images), settings.batch_size):
            sources = images[start : start + settings.batch_size]
            paths = [None if isinstance(source, np.ndarray) else source for source in sources]
            pixels = [_pixels(source, start + offset) for offset, source in enumerate(sources)]
            where = ", ".join(str(path or f"images[{start + offset}]") for offset, path in enumerate(paths))
            tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in pixels]
            for path, image, prediction in zip(paths, pixels, run(tensors, where), strict=True):
                bar.update()
                yield Result(path, image, above(prediction, score_threshold))


def predict_files(
    model: nn.Module,
    files: Sequence[Path],
    output_dir: Path,
    settings: InferenceSettings = InferenceSettings(),
    *,
    score_threshold: float = 0.5,
) -> int:
    """Detect objects in image files; write a picture with boxes for each and ``detections.json`` for all.

    The folder is created if it does not exist. The JSON holds every detection of the model, in COCO's result format
    (``to_coco_json``). The pictures show those of at least ``score_threshold``, small images enlarged; they are named
    after their files, with a number where two would have the same name. If an image cannot be read, the pictures
    written before it stay. Returns the number of detections in the JSON file.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    categories = model_categories(model)
    taken: set[str] = set()
    predictions = []
    for file, (_, image, prediction) in zip(files, predict(model, files, settings), strict=True):
        predictions.append(prediction)
        name, number = file.stem, 1
        while name in taken:
            number += 1
            name = f"{file.stem}_{number}"
        taken.add(name)
        drawn = draw(image, prediction, categories, score_threshold=score_threshold, scale=legible_scale(image))
        Image.fromarray(drawn).save(output_dir / f"{name}.png")
    entries = to_coco_json(files, predictions, categories)
    (output_dir / "detections.json").write_text(json.dumps(entries) + "\n", encoding="utf-8")
    return len(entries)


def to_coco_json(
    paths: Sequence[Path], predictions: Sequence[Prediction], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """Convert detections in image files to COCO's result format, ready for ``json.dump`` and pycocotools' ``loadRes``.

    Each has ``image_id``, ``file_name``, ``category_id``, ``category_name``, ``bbox`` (x, y, width, height; pixels) and
    ``score``. ``image_id`` is the file's name as a number (``000000000139.jpg`` is 139, as COCO names its images) if
    all files have such names and no two the same; otherwise files are numbered from 1. Without ``categories``, the
    model's classes, ``category_id`` is the label and ``category_name`` is left out.
    """
    numbers = [int(path.stem) for path in paths if path.stem.isascii() and path.stem.isdecimal()]
    image_ids = numbers if len(set(numbers)) == len(paths) else range(1, len(paths) + 1)
    of_label = {one.label: {"category_id": one.category_id, "category_name": one.name} for one in categories}
    entries: list[dict[str, Any]] = []
    for image_id, path, prediction in zip(image_ids, paths, predictions, strict=True):
        columns = to_xywh(prediction["boxes"].double().numpy()), prediction["labels"], prediction["scores"]
        for bbox, label, score in zip(*(column.tolist() for column in columns), strict=True):
            category = of_label[label] if categories else {"category_id": label}
            entry = {"image_id": image_id, "file_name": path.name, **category, "bbox": bbox, "score": score}
            entries.append(entry)
    return entries


def _pixels(source: Path | npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    if not isinstance(source, np.ndarray):
        return read_image(source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
        raise DataError(f"images[{index}]: expected uint8 RGB [H, W, 3], got {source.dtype} {list(source.shape)}")
    return source
