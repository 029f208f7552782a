"""Find images of which a detector cannot see or return everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from resdet.check.anchor_coverage import AnchorLayout
from resdet.check.files import image_problem
from resdet.data.annotations import AnnotationTable
from resdet.data.coco_rules import Problem


@dataclass(frozen=True)
class DetectorLimits:
    """How much a detector returns of one image, and which keys of the configuration say so."""

    num_detections: int
    detections_key: str
    num_proposals: int
    proposals_key: str


def dense_images(table: AnnotationTable, limits: DetectorLimits) -> Iterator[Problem]:
    """Yield images with more objects than a detector returns detections or considers proposals."""
    counts = table.objects_per_image()
    for kind, limit, what, key in (
        ("more_objects_than_detections", limits.num_detections, "detections are kept", limits.detections_key),
        ("more_objects_than_proposals", limits.num_proposals, "proposals are judged", limits.proposals_key),
    ):
        for index in np.flatnonzero(counts > limit).tolist():
            message = f"{counts[index]} objects, but {limit} {what} per image ({key})"
            yield image_problem(kind, table, index, message)


def strips(table: AnnotationTable, layout: AnchorLayout) -> Iterator[Problem]:
    """Yield images whose shorter side is less than a pixel once the longer one is scaled to the largest allowed."""
    sizes = table.sizes if layout.tile is None else np.minimum(table.sizes, layout.tile)
    longer = sizes.max(axis=1).astype(np.float64)  # [I], like the next
    scaled = sizes.min(axis=1) * np.minimum(layout.max_size / longer, 1)
    for index in np.flatnonzero(scaled < 1).tolist():
        height, width = table.sizes[index].tolist()
        message = (
            f"{width}x{height} px, of which {scaled[index]:.2g} px are left at a long side of {layout.max_size} px"
        )
        yield image_problem("strip", table, index, message)
