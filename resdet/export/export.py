"""Take a backbone or a whole detector elsewhere, and prove that what arrived computes the same.

============  ==========================================  ==============================================
format        backbone                                    detector
============  ==========================================  ==============================================
safetensors   torchvision's names, rebuilt by             (its checkpoint is that)
              ``load_backbone``, bit for bit
torchscript   ``Dict[str, Tensor]``, any batch and size   one image, any size, post-processing inside
export        ``.pt2``, any batch and size                (torch.export stops at non-maximum suppression)
onnx          any batch and size                          one image, any size, post-processing inside
============  ==========================================  ==============================================

A backbone takes what it takes in Python: float32 ``[B, 3, H, W]``, normalised. A detector takes one image as it was
read, uint8 ``[3, H, W]``, and gives ``boxes [N, 4]``, ``labels [N]`` and ``scores [N]`` in that image's pixels:
scaling, normalisation and suppression are inside. Frozen norms are folded into the convolutions, so the file has
convolutions with biases and nothing else to run.

Every file is loaded again and compared with the model at two sizes before it gets its name. What came out is returned
(``ExportReport``) and written beside it as ``<file>.json``, with what a reader of the file needs: inputs, outputs, the
classes. A file that computes something else is not left behind.

Files are float32. onnxruntime's CPU provider has no bfloat16 convolution. Its int8 (static, weights per channel, ranges
from 12 images) moved the pyramid of a trained ResNet-101 by a fifth of its norm, bfloat16 in torch by a twentieth: what
is to run in bfloat16 runs in torch, under autocast.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import resdet
from resdet.errors import UserError, WeightsError
from resdet.export.programs import (
    BackboneGraph,
    DetectorGraph,
    OneImage,
    backbone_to_onnx,
    detection_runner,
    detector_to_onnx,
    exported_program,
    feature_runner,
    output_names,
    write_torchscript,
)
from resdet.files import written_whole
from resdet.models.backbone import ResNetFPN, SingleLevel, freeze_stages
from resdet.models.bodies import Body, make_body
from resdet.models.detector import Detector
from resdet.models.norm import folded_copy, frozen_copy
from resdet.models.transform import PilTransform
from resdet.types import Prediction, categories_to_plain

logger = logging.getLogger(__name__)

BACKBONE_FORMAT = "resdet-backbone-1"

BackboneFormat = Literal["safetensors"] | BackboneGraph
DetectorFormat = DetectorGraph
BACKBONE_FORMATS: tuple[BackboneFormat, ...] = ("safetensors", "torchscript", "export", "onnx")
DETECTOR_FORMATS: tuple[DetectorFormat, ...] = ("torchscript", "onnx")

# Folding rounds otherwise than a norm after a convolution, and runtimes add in another order. In trained networks that
# came to 1e-5 of a map's scale, in a ResNet-101 of random weights, where rounding grows from block to block, to 1e-4.
FEATURE_TOLERANCE = 5e-4
BOX_TOLERANCE = 0.1
"""Pixels of the image."""
SCORE_TOLERANCE = 1e-3
UNMATCHED_TOLERANCE = 0.01
"""Share of detections: where two scores or overlaps are equal up to rounding, one detection may stand for another."""

_FORGIVEN = 4  # detections of an image; without a limit a model of equal scores would match anything

_CHECK_SIZES = ((224, 320), (321, 225))


class ExportError(UserError):
    """An exported file does not compute what the model computes; it was removed."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how it compared with the model when it was loaded again.

    Attributes:
        path: The file.
        what: ``"body"``, ``"backbone"`` (body and pyramid) or ``"detector"``.
        format: Its format.
        sizes: ``(height, width)`` of the images it was compared on.
        differences: For features ``"features"``, relative to the largest absolute value of each map. For a detector
            ``"boxes"`` in pixels, ``"scores"``, and ``"unmatched"``: the share of detections without a counterpart.
        tolerances: The largest values allowed, by the same names.
        num_detections: How many detections were compared; None for features.
        speed_ratio: The model's time on these images over the file's, so above 1 the file is faster; None for
            safetensors, which are run by the same code.
    """

    path: Path
    what: str
    format: str
    sizes: tuple[tuple[int, int], ...]
    differences: dict[str, float]
    tolerances: dict[str, float]
    num_detections: int | None
    speed_ratio: float | None

    def __str__(self) -> str:
        """Say it in one line."""
        sizes = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in self.sizes))
        found = "" if self.num_detections is None else f", {self.num_detections} detections"
        differences = ", ".join(
            f"{name} {value:.2g} (at most {self.tolerances[name]:g})" for name, value in self.differences.items()
        )
        speed = "" if self.speed_ratio is None else f"; {self.speed_ratio:.2f} times the model's speed"
        return f"{self.what} as {self.format}, compared at {sizes}{found}: {differences}{speed}"


def export_backbone(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    include_fpn: bool = False,
    format: BackboneFormat = "safetensors",
    names: Literal["torchvision", "timm"] = "torchvision",
) -> ExportReport:
    """Write a body, or a body with its pyramid, and check the file against the model.

    As safetensors, the body alone has the names of torchvision's classifier (``conv1.weight``,
    ``layer1.0.conv1.weight``, ...), which loads it with nothing but ``fc`` missing; with the pyramid they are those of
    ``BackboneWithFPN`` (``body.``, ``fpn.``). Tensors are written as they are, nothing folded.

    In the other formats the network runs by itself, in evaluation mode and float32 on the CPU. TorchScript and ``.pt2``
    give the features under the names they have in Python (``"0"``, ...), ONNX as ``C2``.. or ``P2``.., by stride. A
    ``.pt2`` refuses images of which the last map would be one pixel high or wide (64 pixels with P6, 32 without):
    ``torch.export`` takes a size of 1 for a case of its own.

    Args:
        model: A ResNet, a ResNetFPN, or a detector on one; not changed.
        path: The file to write; its directory must exist. It appears whole or not at all.
        include_fpn: Whether to write the pyramid too.
        format: ``"safetensors"``, ``"torchscript"``, ``"export"`` (a ``torch.export`` program, ``.pt2``) or ``"onnx"``.
        names: Of the tensors in safetensors. timm's ResNets have torchvision's names, and it has no pyramids, so the
            bodies of both are one file.

    Raises:
        UserError: If the model has no backbone of ours, or no pyramid though it is asked for; if the directory is
            missing, format or names unknown, or a package that the format needs is not installed.
        ExportError: If the file computes something else than the model.
    """
    backbone = model if isinstance(model, Body | ResNetFPN) else getattr(model, "backbone", None)
    if isinstance(backbone, SingleLevel):
        backbone = backbone.body
    if not isinstance(backbone, Body | ResNetFPN):
        raise UserError(f"export_backbone takes a ResNet, a ResNetFPN or a detector on one, got {type(model).__name__}")
    if include_fpn and not isinstance(backbone, ResNetFPN):
        raise UserError("include_fpn needs a ResNetFPN or a detector on one, got a ResNet, which has no pyramid")
    if format not in BACKBONE_FORMATS:
        raise UserError(f"format of a backbone must be one of {', '.join(BACKBONE_FORMATS)}, got {format!r}")
    if names not in ("torchvision", "timm"):
        raise UserError(f"names must be torchvision or timm, got {names!r}")
    if names == "timm" and (include_fpn or format != "safetensors"):
        raise UserError("timm's names are for the body as safetensors: timm has no pyramid, and other formats no names")
    exported = backbone if include_fpn or isinstance(backbone, Body) else backbone.body
    description = _describe(exported)
    reference = frozen_copy(exported)
    runner = folded_copy(exported)
    if isinstance(model, Detector):
        description |= {"image_mean": model.spec.image_mean, "image_std": model.spec.image_std}
    about: dict[str, Any] = {"what": "backbone" if include_fpn else "body", "format": format, **description}
    map_names = output_names(exported)

    with written_whole(Path(path)) as beside:
        if format == "safetensors":
            metadata = {
                "format": BACKBONE_FORMAT,
                "backbone": json.dumps(description),
                "resdet_version": resdet.__version__,
            }
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in exported.state_dict().items()}
            beside.write_bytes(save(tensors, metadata))
        elif format == "torchscript":
            write_torchscript(runner, beside)
        elif format == "export":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it takes channels-last weights for parts of larger tensors
                torch.export.save(exported_program(runner), beside)
        else:
            backbone_to_onnx(runner, beside, map_names)
            about["outputs"] = map_names
        body = exported.body if isinstance(exported, ResNetFPN) else exported
        run = _rebuilt(beside, fast=body.fast) if format == "safetensors" else feature_runner(beside, format)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(1 + i, 3, *size, generator=generator) for i, size in enumerate(_CHECK_SIZES)]
        tolerance = 0.0 if format == "safetensors" else FEATURE_TOLERANCE
        speed_ratio = None
        with torch.no_grad():
            difference = max(_feature_difference(run(batch), list(reference(batch).values())) for batch in batches)
            if format != "safetensors":
                speed_ratio = _speed_ratio(lambda: [reference(b) for b in batches], lambda: [run(b) for b in batches])
        report = ExportReport(
            path=Path(path),
            what=about["what"],
            format=format,
            sizes=_CHECK_SIZES,
            differences={"features": difference},
            tolerances={"features": tolerance},
            num_detections=None,
            speed_ratio=speed_ratio,
        )
        _accept(report)
    _write_beside(report, about)
    return report


def export_detector(
    model: Detector,
    path: str | os.PathLike[str],
    *,
    format: DetectorFormat = "onnx",
    images: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> ExportReport:
    """Write a whole detector, and check the file against the model.

    The file takes one image, uint8 RGB ``[3, H, W]`` of any size, and gives boxes float32 ``[N, 4]``, labels int64
    ``[N]`` and scores float32 ``[N]``, sorted by falling score, as ``model`` gives them for ``image / 255``. It runs in
    evaluation mode and float32 on the CPU; ``torchvision`` must be imported before TorchScript is loaded.

    Args:
        model: The detector; not changed.
        path: The file to write; its directory must exist. It appears whole or not at all.
        format: ``"torchscript"`` or ``"onnx"``.
        images: What to compare on, uint8 RGB ``[H, W, 3]``; by default two generated pictures. A detector that finds
            nothing in those is compared on real images only if they are given, and the log says so.

    Raises:
        UserError: If it is not a Detector, or one that scales images with Pillow; if the directory is missing, the
            format is not one of these, there are no images or one is not uint8 ``[H, W, 3]``, or a package that the
            format needs is not installed.
        ExportError: If the file detects something else than the model.
    """
    if not isinstance(model, Detector):
        raise UserError(f"export_detector takes a Detector (build_detector, load_detector), got {type(model).__name__}")
    if format not in DETECTOR_FORMATS:
        raise UserError(
            f"format of a detector must be one of {', '.join(DETECTOR_FORMATS)}, got {format!r}; "
            f"its backbone can be any of {', '.join(BACKBONE_FORMATS)}"
        )
    if isinstance(model.transform, PilTransform):
        raise UserError(
            "this detector scales images with Pillow (spec.resize), which no exported file can hold: build it with "
            "resize='torch' to export it whole, or export its backbone"
        )
    pictures = _pictures() if images is None else list(images)
    if not pictures:
        raise UserError("images: at least one is needed to compare on, got none")
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise UserError(f"images[{index}]: expected uint8 RGB [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    tensors = [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures]
    reference = frozen_copy(model)
    runner = OneImage(folded_copy(model)).eval()

    def detect(image: Tensor) -> Prediction:
        found: Prediction = reference([image.float() / 255])[0]
        return found

    with written_whole(Path(path)) as beside:
        if format == "torchscript":
            write_torchscript(runner, beside)
        else:
            detector_to_onnx(runner, beside, tensors[0])
        run = detection_runner(beside, format)
        with torch.no_grad():
            pairs = [(run(image), detect(image)) for image in tensors]
            num_detections = sum(len(expected["scores"]) for _, expected in pairs)
            heads = model.roi_heads
            differences = _detection_differences(pairs, heads.score_thresh, heads.detections_per_img)
            speed_ratio = _speed_ratio(
                lambda: [detect(image) for image in tensors], lambda: [run(image) for image in tensors]
            )
        if num_detections == 0:
            logger.warning("%s: the model detects nothing in the images compared on; give images it knows", path)
        report = ExportReport(
            path=Path(path),
            what="detector",
            format=format,
            sizes=tuple((image.shape[1], image.shape[2]) for image in tensors),
            differences=differences,
            tolerances={"boxes": BOX_TOLERANCE, "scores": SCORE_TOLERANCE, "unmatched": UNMATCHED_TOLERANCE},
            num_detections=num_detections,
            speed_ratio=speed_ratio,
        )
        _accept(report)
    about = {
        "what": "detector",
        "format": format,
        "spec": model.spec.model_dump(mode="json"),
        "categories": categories_to_plain(model.categories),
        "inputs": ["image"],
        "outputs": ["boxes", "labels", "scores"],
    }
    _write_beside(report, about)
    return report


def load_backbone(path: str | os.PathLike[str], *, trainable_layers: int = 3, fast: bool = True) -> Body | ResNetFPN:
    """Build the backbone that ``export_backbone`` wrote, with the same outputs bit for bit.

    Args:
        path: The file.
        trainable_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        fast: As in ``resnet_fpn``; bit for bit holds where it is what the exported backbone had.

    Returns:
        A ResNetFPN if the file has the pyramid, else a ResNet; in training mode, as modules are made.

    Raises:
        WeightsError: If the file is missing, damaged or not of this format.
        UserError: If ``trainable_layers`` is not in 0..5.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged, cut short or not a safetensors file ({error})") from error
    if about.get("format") != BACKBONE_FORMAT:
        raise WeightsError(
            f"{path}: was not written by export_backbone ('format' is {about.get('format')!r}, "
            f"not {BACKBONE_FORMAT!r}); resnet_fpn(arch, weights=path) takes any ResNet weights"
        )
    try:
        description = json.loads(about["backbone"])
        backbone: Body | ResNetFPN
        body = make_body(
            description["arch"],
            norm=description["norm"],
            norm_eps=description["norm_eps"],
            returned_layers=description["returned_layers"],
            stride_in_1x1=description.get("stride_in_1x1", False),
            dilate_c5=description.get("dilate_c5", False),
            fast=fast,
        )
        if "out_channels" in description:
            backbone = ResNetFPN(
                body, out_channels=description["out_channels"], extra_blocks=description["extra_blocks"]
            )
        else:
            backbone = body
        backbone.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: its description and its tensors do not fit together ({error})") from error
    freeze_stages(body, trainable_layers)
    return backbone


def _describe(exported: Body | ResNetFPN) -> dict[str, Any]:
    """Give what ``load_backbone`` builds it from."""
    body = exported.body if isinstance(exported, ResNetFPN) else exported
    description: dict[str, Any] = {
        "arch": body.arch,
        "norm": body.norm,
        "norm_eps": body.norm_eps,
        "returned_layers": list(body.returned_layers),
        "stride_in_1x1": body.stride_in_1x1,
        "dilate_c5": body.dilate_c5,
    }
    if isinstance(exported, ResNetFPN):
        description |= {"out_channels": exported.out_channels, "extra_blocks": exported.extra_blocks}
    return description


def _rebuilt(path: Path, *, fast: bool) -> Callable[[Tensor], list[Tensor]]:
    """Load an exported state dict as a function from images to its maps."""
    backbone = load_backbone(path, fast=fast).eval()
    return lambda images: list(backbone(images).values())


def _feature_difference(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Give the largest difference relative to the scale of its map; infinite where shapes differ or NaN appears."""
    worst = 0.0
    if len(maps) != len(expected):
        return math.inf
    for one, other in zip(maps, expected, strict=True):
        if one.shape != other.shape or not bool(one.isfinite().all()):
            return math.inf
        difference = float((one - other).abs().max())
        worst = max(worst, difference / float(other.abs().max()) if difference else 0.0)
    return worst


def compare_detections(
    found: Prediction, expected: Prediction, *, score_thresh: float, most: int
) -> tuple[float, float, int]:
    """Compare two lists of detections in one image, whatever the order of equal scores.

    Every expected detection is paired with the nearest unpaired one of its label whose box and score are within
    tolerance. Up to four of both sides together that have no pair are forgiven, if their scores are within tolerance of
    the threshold, or of the lowest one where as many as may be were kept: either side of such a border is right.

    Args:
        found: Detections of the exported file.
        expected: Those of the model.
        score_thresh: The score below which detections are dropped.
        most: How many are kept at most.

    Returns:
        The largest difference of a coordinate in pixels and of a score among the pairs, and how many detections of
        either side are without a pair and not forgiven.
    """
    boxes = scores = 0.0
    free = torch.ones(len(found["scores"]), dtype=torch.bool)
    lonely: list[float] = []
    for box, label, score in zip(expected["boxes"], expected["labels"], expected["scores"], strict=True):
        box_gap = (found["boxes"] - box).abs().amax(dim=1)
        score_gap = (found["scores"] - score).abs()
        fits = free & (found["labels"] == label) & (box_gap <= BOX_TOLERANCE) & (score_gap <= SCORE_TOLERANCE)
        if not bool(fits.any()):
            lonely.append(float(score))
            continue
        nearest = int(torch.where(fits, box_gap, math.inf).argmin())
        free[nearest] = False
        boxes, scores = max(boxes, float(box_gap[nearest])), max(scores, float(score_gap[nearest]))
    lonely += found["scores"][free].tolist()
    borders = [score_thresh]
    borders += [float(part["scores"].min()) for part in (found, expected) if len(part["scores"]) == most]
    at_border = sum(any(abs(score - border) <= SCORE_TOLERANCE for border in borders) for score in lonely)
    return boxes, scores, len(lonely) - min(at_border, _FORGIVEN)


def _detection_differences(
    pairs: Sequence[tuple[Prediction, Prediction]], score_thresh: float, most: int
) -> dict[str, float]:
    compared = [compare_detections(*pair, score_thresh=score_thresh, most=most) for pair in pairs]
    total = sum(len(expected["scores"]) for _, expected in pairs)
    return {
        "boxes": max(boxes for boxes, _, _ in compared),
        "scores": max(scores for _, scores, _ in compared),
        "unmatched": sum(unmatched for _, _, unmatched in compared) / max(total, 1),
    }


def _speed_ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Give the time of ``ours`` over that of ``theirs``: the best of three each, in turns, after one to warm up."""
    best = [math.inf, math.inf]
    for turn in range(4):
        for index, call in enumerate((ours, theirs)):
            start = time.perf_counter()
            call()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0] / best[1]


def _pictures() -> list[npt.NDArray[np.uint8]]:
    """Make two pictures with something in them, of the two sizes everything is compared at."""
    from resdet.data.shapes import ShapesImages

    draw = ShapesImages(max(max(size) for size in _CHECK_SIZES), seed=0)
    return [draw(index)[:height, :width].copy() for index, (height, width) in enumerate(_CHECK_SIZES)]


def _accept(report: ExportReport) -> None:
    over = [name for name, value in report.differences.items() if not value <= report.tolerances[name]]
    if over:
        raise ExportError(f"{report.path}: not written, because the exported file computes something else: {report}")


def _write_beside(report: ExportReport, about: dict[str, Any]) -> None:
    checked = {name: value for name, value in asdict(report).items() if name not in ("path", "what", "format")}
    versions = {"resdet": resdet.__version__, "torch": torch.__version__}
    text = json.dumps({**about, "checked": checked, "versions": versions}, indent=2, default=str)
    with written_whole(report.path.with_name(f"{report.path.name}.json")) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
