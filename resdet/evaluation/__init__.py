"""Run detectors on datasets, measure what they find, and report it."""

from resdet.evaluation.coco import ClassMetrics, CocoMetrics, coco_metrics, detections_to_coco, read_coco_detections
from resdet.evaluation.confusion import ConfusionMatrix, confusion_matrix
from resdet.evaluation.curves import BestF1, Curve, Curves, best_score_threshold, precision_recall
from resdet.evaluation.detect import Evaluation, detect, evaluate
from resdet.evaluation.errors import ERROR_KINDS, ClassErrors, ErrorAnalysis, ErrorCost, Errors, find_errors
from resdet.evaluation.loss import validation_loss
from resdet.evaluation.matching import Matches, Overlaps, match, overlaps
from resdet.evaluation.report import write_report
from resdet.evaluation.report_runs import ReportedRun
from resdet.evaluation.voc import VocClassMetrics, VocMetrics, voc_metrics

__all__ = [
    "ERROR_KINDS",
    "BestF1",
    "ClassErrors",
    "ClassMetrics",
    "CocoMetrics",
    "ConfusionMatrix",
    "Curve",
    "Curves",
    "ErrorAnalysis",
    "ErrorCost",
    "Errors",
    "Evaluation",
    "Matches",
    "Overlaps",
    "ReportedRun",
    "VocClassMetrics",
    "VocMetrics",
    "best_score_threshold",
    "coco_metrics",
    "confusion_matrix",
    "detect",
    "detections_to_coco",
    "evaluate",
    "find_errors",
    "match",
    "overlaps",
    "precision_recall",
    "read_coco_detections",
    "validation_loss",
    "voc_metrics",
    "write_report",
]
