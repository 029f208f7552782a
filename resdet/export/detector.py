"""Export a whole detector: one image in, boxes, labels and scores out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from resdet.data.shapes import ShapesImages
from resdet.errors import UserError
from resdet.export.backbone import BACKBONE_FORMATS
from resdet.export.card import files_beside, write_card
from resdet.export.compare import (
    BOX_TOLERANCE,
    CHECK_SIZES,
    SCORE_TOLERANCE,
    UNMATCHED_TOLERANCE,
    ExportReport,
    detection_differences,
    speed_ratio,
)
from resdet.export.programs import (
    DetectorFormat,
    OneImage,
    check_openvino,
    companion,
    detection_runner,
    detector_to_onnx,
    detector_to_openvino,
    write_torchscript,
)
from resdet.files import written_whole
from resdet.models.detector import Detector
from resdet.models.finite import check_weights
from resdet.models.norm import folded_copy, frozen_copy
from resdet.models.transform import NOT_EXPORTABLE, PilTransform
from resdet.types import Prediction, categories_to_plain
from resdet.weights.files import WeightsPath, read_weights

logger = logging.getLogger(__name__)

DETECTOR_FORMATS: tuple[DetectorFormat, ...] = ("torchscript", "onnx", "openvino")


def export_detector(
    model: Detector,
    path: str | os.PathLike[str],
    *,
    format: DetectorFormat = "onnx",
    images: Sequence[npt.NDArray[np.uint8]] | None = None,
    checkpoint: WeightsPath | None = None,
) -> ExportReport:
    """Write a whole detector, and check the file against the model; write its model card beside it.

    The file takes one image, uint8 RGB ``[3, H, W]`` of any size, and returns boxes float32 ``[N, 4]``, labels int64
    ``[N]`` and scores float32 ``[N]``, sorted by falling score, as ``model`` returns them for ``image / 255``. It runs
    in evaluation mode and float32 on the CPU; import ``torchvision`` before loading TorchScript.

    Args:
        model: The detector; not changed.
        path: The file to write; its directory must exist. It appears whole or not at all.
        format: ``"torchscript"``, ``"onnx"`` or ``"openvino"`` (``path`` ends in ``.xml``, and a ``.bin`` is written
            too).
        images: What to compare on, uint8 RGB ``[H, W, 3]``; by default two generated pictures. Give real images for a
            detector that finds nothing in those; the log warns of it.
        checkpoint: The file that the model is from, whose configuration and evaluation the model card states.

    Raises:
        UserError: If it is not a Detector, or one that scales images with Pillow; if the directory is missing, the
            format unknown, there are no images or one is not uint8 ``[H, W, 3]``, a package that the format needs is
            not installed, or a file that is no card of an earlier export has the name of this one's.
        WeightsError: If the model's weights are not finite.
        ExportError: If the file detects something else than the model.
    """
    _check_arguments(model, format)
    path = Path(path)
    if format == "openvino":
        check_openvino(path)
    beside, source = files_beside(path, format), None if checkpoint is None else read_weights(checkpoint)
    if images is None:  # two pictures with something in them
        draw = ShapesImages(max(max(size) for size in CHECK_SIZES), seed=0)
        images = [draw(index)[:height, :width] for index, (height, width) in enumerate(CHECK_SIZES)]
    check_weights(model, "export")
    tensors = _as_tensors(images)
    reference = frozen_copy(model)
    runner = OneImage(folded_copy(model)).eval()
    with written_whole(path, companion(format)) as temporary:
        if format == "torchscript":
            write_torchscript(runner, temporary)
        else:
            (detector_to_onnx if format == "onnx" else detector_to_openvino)(runner, temporary, tensors[0])
        report = _compare(reference, detection_runner(temporary, format), tensors, path, format)
        report.check()
    report.write(
        {
            "spec": model.spec.model_dump(mode="json"),
            "categories": categories_to_plain(model.categories),
            "inputs": ["image"],
            "outputs": ["boxes", "labels", "scores"],
        }
    )
    write_card(beside[-1], report, model, source=source)
    return replace(report, beside=tuple(beside))


def _check_arguments(model: Detector, format: str) -> None:
    if not isinstance(model, Detector):
        raise UserError(f"export_detector takes a Detector (build_detector, load_detector), got {type(model).__name__}")
    if format not in DETECTOR_FORMATS:
        raise UserError(
            f"format of a detector must be one of {', '.join(DETECTOR_FORMATS)}, got {format!r}; "
            f"its backbone can be any of {', '.join(BACKBONE_FORMATS)}"
        )
    if isinstance(model.transform, PilTransform):
        raise UserError(NOT_EXPORTABLE)


def _as_tensors(pictures: Sequence[npt.NDArray[np.uint8]]) -> list[Tensor]:
    """Return pictures ``[H, W, 3]`` as tensors ``[3, H, W]``."""
    if not pictures:
        raise UserError("images: at least one is needed to compare on, got none")
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise UserError(f"images[{index}]: expected uint8 RGB [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures]


@torch.no_grad()
def _compare(
    model: Detector, run: Callable[[Tensor], Prediction], images: Sequence[Tensor], path: Path, format: str
) -> ExportReport:
    """Compare the exported file, as ``run``, with the model."""

    def detect(image: Tensor) -> Prediction:
        found: Prediction = model([image.float() / 255])[0]
        return found

    pairs = [(run(image), detect(image)) for image in images]
    num_detections = sum(len(expected["scores"]) for _, expected in pairs)
    if num_detections == 0:
        logger.warning("%s: the model detects nothing in the images compared on; give images it knows", path)
    heads = model.roi_heads
    return ExportReport(
        path=path,
        what="detector",
        format=format,
        sizes=tuple((image.shape[1], image.shape[2]) for image in images),
        differences=detection_differences(pairs, heads.score_thresh, heads.detections_per_img),
        tolerances={"boxes": BOX_TOLERANCE, "scores": SCORE_TOLERANCE, "unmatched": UNMATCHED_TOLERANCE},
        num_detections=num_detections,
        speed_ratio=speed_ratio(lambda: [detect(image) for image in images], lambda: [run(image) for image in images]),
    )
