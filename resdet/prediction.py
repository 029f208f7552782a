"""Images in, results out: run a detector on images as people have them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from resdet.data.sources import Found, Source, find_sources, read_source
from resdet.data.video import Frame, is_video
from resdet.drawing import shown_from
from resdet.errors import DataError, UserError
from resdet.evaluation.inference import device_for, inference
from resdet.evaluation.labels import model_categories
from resdet.evaluation.settings import InferenceSettings
from resdet.models.checkpoint import load_detector
from resdet.result import Result

Model: TypeAlias = nn.Module | str | os.PathLike[str]
"""A ``Detector``, any torchvision ``FasterRCNN``, or what ``load_detector`` takes."""

OnUnreadable: TypeAlias = Callable[[Path | str, DataError], None]


def predict(
    model: Model,
    images: Source | Iterable[Source],
    settings: InferenceSettings = InferenceSettings(),
    *,
    tiles: tuple[int, float] | None = None,
    score_threshold: float = 0.0,
    stored_pixels: bool = False,
) -> list[Result]:
    """Detect objects in one image or many.

    All images and results are held in memory: ``predict_each``, which has the same arguments and errors, is for more of
    them than that, and for videos.

    Args:
        model: A ``Detector``, any torchvision ``FasterRCNN``, or what ``load_detector`` takes: a file, a URL, a run's
            folder, a published detector's name. A model that is loaded here goes to the GPU if there is one and
            ``settings.device`` does not say otherwise; load it yourself for more than one call.
        images: One, or a list, an iterator or a 4-D array of

            * paths of files, of folders (for their images by name) and patterns such as ``photos/**/*.jpg``;
            * URLs of images: http, https, file;
            * PIL images of any mode but F, LAB and 32-bit I;
            * uint8 arrays, RGB ``[H, W, 3]`` or gray ``[H, W]`` (OpenCV's are BGR: ``image[:, :, ::-1]``);
            * tensors ``[3, H, W]``, uint8 or floating-point in [0, 1], which are rounded to 8 bits.
        settings: How to run the model; ``num_workers`` has no effect.
        tiles: ``(side, overlap)``, as in ``(800, 0.2)``, for large images with small objects; None: ``settings.tiles``.
        score_threshold: Detections below it are dropped, in [0, 1]. The model's own ``roi_heads.score_thresh`` (by
            default 0.05) applies before.
        stored_pixels: Take files and PIL images as they are stored, as COCO's annotations mean them and pycocotools
            reads them. By default they are turned upright, as EXIF's orientation says and viewers show them, and so
            are the images and boxes of the results.

    Returns:
        A result for each image, in order.

    Raises:
        DataError: If an image is missing or cannot be read, a folder or a pattern has none, or an array or tensor is
            not as above.
        WeightsError: If a model cannot be loaded, or computes NaN or infinity.
        UserError: If an element of ``images`` is none of the above, a video is among them, this model does not support
            ``settings.tricks``, ``settings.batch_size`` is below 1, or ``tiles`` are no tiles.
    """
    found = list(find_sources(images))
    if video := next((one.where for one in found if is_video(one.source)), None):
        raise UserError(f"{video}: is a video: loop over resdet.predict_each, which yields frame after frame")
    return list(_results(model, found, _tiled(settings, tiles), 1, score_threshold, stored_pixels))


def predict_each(
    model: Model,
    images: Source | Iterable[Source],
    settings: InferenceSettings = InferenceSettings(),
    *,
    tiles: tuple[int, float] | None = None,
    every: int = 1,
    score_threshold: float = 0.0,
    stored_pixels: bool = False,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[Result]:
    """Detect objects as ``predict`` does, in frames of videos too, and yield each result as soon as it is known.

    One batch is held in memory, so nothing bounds the number of images. If ``images`` is one or a list, its paths are
    looked up at once, else one by one. The model is in evaluation mode until the iterator ends or is closed; then its
    training flags are restored. Arguments and errors are those of ``predict``, and

    * ``images`` may hold paths of videos, which stand for their frames (``Result.frame``);
    * ``every`` takes each ``every``-th frame, and ``stored_pixels`` those as stored; a UserError if it is below 1;
    * ``on_unreadable`` is called with each file or URL that cannot be read and the error, and goes on without it. By
      default the error is raised.
    """
    if every < 1:
        raise UserError(f"every must be at least 1, got {every}")
    found: Iterable[Found] = find_sources(images)
    if isinstance(images, Sequence | os.PathLike):
        found = list(found)
    return _results(model, found, _tiled(settings, tiles), every, score_threshold, stored_pixels, on_unreadable)


def _tiled(settings: InferenceSettings, tiles: tuple[int, float] | None) -> InferenceSettings:
    return settings if tiles is None else replace(settings, tiles=tiles)


def _results(
    model: Model,
    found: Iterable[Found],
    settings: InferenceSettings,
    every: int,
    score_threshold: float,
    stored_pixels: bool,
    on_unreadable: OnUnreadable | None = None,
) -> Iterator[Result]:
    if settings.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {settings.batch_size}")
    if not isinstance(model, nn.Module):
        model = load_detector(model)
        settings = replace(settings, device=settings.device or device_for(model, "auto"))
    total = len(found) if isinstance(found, list) and not any(is_video(one.source) for one in found) else None
    return _detected(model, _images(found, every, not stored_pixels, on_unreadable), total, settings, score_threshold)


def _images(
    found: Iterable[Found], every: int, upright: bool, on_unreadable: OnUnreadable | None
) -> Iterator[tuple[Found, Frame | None, npt.NDArray[np.uint8]]]:
    for one in found:
        try:
            for frame, image in read_source(one, upright=upright, every=every):
                yield one, frame, image
        except DataError as error:
            if on_unreadable is None or one.path is None:
                raise
            on_unreadable(one.path, error)


def _detected(
    model: nn.Module,
    images: Iterator[tuple[Found, Frame | None, npt.NDArray[np.uint8]]],
    total: int | None,
    settings: InferenceSettings,
    score_threshold: float,
) -> Iterator[Result]:
    categories, threshold = model_categories(model), shown_from(model)[0]
    with inference(model, settings) as run, tqdm(total=total, unit="image", disable=not settings.progress) as bar:
        while batch := list(itertools.islice(images, settings.num_images_read)):
            tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for _, _, image in batch]  # [3, H, W]
            names = (one.where if frame is None else f"{one.where} frame {frame.index}" for one, frame, _ in batch)
            for (one, frame, image), found in zip(batch, run(tensors, ", ".join(names)), strict=True):
                bar.update()
                result = Result(image, **found, categories=categories, path=one.path, frame=frame, shown_from=threshold)
                yield result.above(score_threshold)
