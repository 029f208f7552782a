"""Compare an exported file with the model it was written from: outputs, tolerances, speed, and the report of it all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resdet.errors import UserError
from resdet.files import write_text
from resdet.types import Prediction
from resdet.version import VERSION

# A folded norm rounds differently from a norm after a convolution, and runtimes add in another order. That came to 1e-5
# of a map's scale in trained networks, and to 1e-4 in a ResNet-101 of random weights, where rounding grows by blocks.
FEATURE_TOLERANCE = 5e-4
BOX_TOLERANCE = 0.1
"""Pixels of the image."""
SCORE_TOLERANCE = 1e-3
UNMATCHED_TOLERANCE = 0.01
"""Share of detections: where two scores or overlaps are equal up to rounding, either detection may survive."""

CHECK_SIZES = ((224, 320), (321, 225))
"""``(height, width)`` of the images that exports are compared on by default."""

_FORGIVEN = 4  # detections of an image; without a limit a model of equal scores would match anything


class ExportError(UserError):
    """An exported file does not compute what the model computes; it was removed."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how the file compared with the model when it was loaded again."""

    path: Path
    what: str  # "body", "backbone" (body and pyramid) or "detector"
    format: str
    sizes: tuple[tuple[int, int], ...]  # (height, width) of the images it was compared on
    # For features "features", relative to the largest absolute value of each map. For a detector "boxes" in pixels,
    # "scores", and "unmatched": the share of detections without a counterpart.
    differences: dict[str, float]
    tolerances: dict[str, float]  # the largest values allowed, by the same names
    num_detections: int | None  # how many were compared; None for features
    # The model's time on these images over the file's; None for safetensors, which are run by the same code.
    speed_ratio: float | None
    beside: tuple[Path, ...] = ()  # further files that were written

    def __str__(self) -> str:
        """Return the report in one line."""
        sizes = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in self.sizes))
        found = "" if self.num_detections is None else f", {self.num_detections} detections"
        differences = ", ".join(
            f"{name} {value:.2g} (at most {self.tolerances[name]:g})" for name, value in self.differences.items()
        )
        speed = "" if self.speed_ratio is None else f"; {self.speed_ratio:.2f} times the model's speed"
        return f"{self.what} as {self.format}, compared at {sizes}{found}: {differences}{speed}"

    def check(self) -> None:
        """Raise an ``ExportError`` if a difference is above its tolerance, or NaN."""
        if any(not value <= self.tolerances[name] for name, value in self.differences.items()):
            raise ExportError(f"{self.path}: not written, because the exported file computes something else: {self}")

    def write(self, description: Mapping[str, Any]) -> None:
        """Write ``<file>.json``: the description of what was exported, this report, and versions."""
        about_files = ("path", "what", "format", "beside")
        checked = {name: value for name, value in asdict(self).items() if name not in about_files}
        versions = {"resdet": VERSION, "torch": torch.__version__}
        content = {"what": self.what, "format": self.format, **description, "checked": checked, "versions": versions}
        write_text(report_file(self.path), json.dumps(content, indent=2, default=str) + "\n")


def is_report(path: Path) -> bool:
    """Return whether a file was written by ``ExportReport.write``."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"what", "format", "checked", "versions"} <= content.keys()


def report_file(path: Path) -> Path:
    """Return where the report of an exported file stands: beside it, as ``<file>.json``."""
    return path.with_name(f"{path.name}.json")


def feature_difference(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the scale of its map; infinity where shapes differ or for NaN."""
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
    tolerance. Up to four unpaired detections, of both sides together, are forgiven if their scores are within tolerance
    of ``score_thresh``, or of the lowest score where a list is full (``most``): rounding decides on which side of it
    they fall.

    Returns the largest difference of a coordinate in pixels and of a score among the pairs, and how many detections of
    either side are neither paired nor forgiven.
    """
    boxes = scores = 0.0
    free = torch.ones(len(found["scores"]), dtype=torch.bool)  # [M]
    lonely: list[float] = []
    for box, label, score in zip(expected["boxes"], expected["labels"], expected["scores"], strict=True):
        box_gap = (found["boxes"] - box).abs().amax(dim=1)  # [M]
        score_gap = (found["scores"] - score).abs()  # [M]
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


def detection_differences(
    pairs: Sequence[tuple[Prediction, Prediction]], score_thresh: float, most: int
) -> dict[str, float]:
    """Return ``ExportReport.differences`` of the file's and the model's detections in several images."""
    compared = [compare_detections(*pair, score_thresh=score_thresh, most=most) for pair in pairs]
    total = sum(len(expected["scores"]) for _, expected in pairs)
    return {
        "boxes": max(boxes for boxes, _, _ in compared),
        "scores": max(scores for _, scores, _ in compared),
        "unmatched": sum(unmatched for _, _, unmatched in compared) / max(total, 1),
    }


def speed_ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Return the time of ``ours`` over that of ``theirs``: the best of three each, in turns, after a warm-up."""
    best = [math.inf, math.inf]
    for turn in range(4):
        for index, call in enumerate((ours, theirs)):
            start = time.perf_counter()
            call()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0] / best[1]
