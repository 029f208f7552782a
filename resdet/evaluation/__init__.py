"""What a detector found, and how good that is."""

from resdet.evaluation.coco import (
    ClassMetrics,
    CocoMetrics,
    coco_metrics,
    detections_to_coco,
    read_coco_detections,
)
from resdet.evaluation.detect import Evaluation, detect, evaluate
from resdet.evaluation.voc import VocClassMetrics, VocMetrics, voc_metrics

__all__ = [
    "ClassMetrics",
    "CocoMetrics",
    "Evaluation",
    "VocClassMetrics",
    "VocMetrics",
    "coco_metrics",
    "detect",
    "detections_to_coco",
    "evaluate",
    "read_coco_detections",
    "voc_metrics",
]
