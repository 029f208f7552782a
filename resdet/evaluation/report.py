"""Evaluations as one page for people: ``report.html``, a single file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor
from torch.utils.data import Subset

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset, without_subset
from resdet.evaluation import report_tables as tables
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.errors import ERROR_KINDS
from resdet.evaluation.report_gallery import gallery
from resdet.evaluation.report_runs import IOU_THRESHOLDS, MeasuredRun, ReportedRun, measure, read_log, read_plan
from resdet.files import write_text
from resdet.types import Target


def write_report(
    path: Path,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    runs: Sequence[ReportedRun],
    *,
    max_images: int = 40,
    max_image_bytes: int = 3_000_000,
) -> None:
    """Write one self-contained page on one or several evaluations of the same dataset, in place of an old file.

    It shows the overall metrics, training curves, differences in configuration, the plans of runs that chose their own
    settings, precision-recall curves, a table per class with the score threshold of the best F1, the cost of each kind
    of error, a confusion matrix, and the images that cost most AP with ground truth and detections, to be filtered by
    class, kind of error and score.

    The page loads nothing, and its own content security policy forbids it to: styles and the script are allowed by
    their hashes, images as data only. All names are escaped.

    Runs must have different names, and the folder of ``path`` must exist. At most ``max_images`` are in the gallery,
    embedded as JPEG, their longer side at most 640 pixels. Those that, boxes included, would exceed ``max_image_bytes``
    together are left out, and the page says so.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"runs: must be at least one, with different names, got {names}")
    dataset = without_subset(dataset)
    measured = [measure(dataset.table, run) for run in runs]
    content = _content(dataset.table, measured) | {"gallery": gallery(dataset, measured, max_images, max_image_bytes)}
    write_text(path, _render(content))


def write_run_report(
    output_dir: Path,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    evaluation: Evaluation,
    config: Mapping[str, Any],
) -> None:
    """Write ``report.html`` into a run's folder, whose name is the run's, with the curves of its ``metrics.jsonl``."""
    name, log, plan = output_dir.resolve().name, read_log(output_dir), read_plan(output_dir)
    run = ReportedRun(name, evaluation, config, log, plan)
    write_report(output_dir / "report.html", dataset, [run])


def _content(table: AnnotationTable, measured: Sequence[MeasuredRun]) -> dict[str, Any]:
    """Return the values that the template shows, apart from the gallery's."""
    runs, classes = [one.run for one in measured], [category.name for category in table.categories]
    rows_of_runs = [tables.class_rows(one) for one in measured]
    costs = [(*one.errors.kinds, one.errors.false_positives, one.errors.false_negatives) for one in measured]
    return {
        "dataset": table.name,
        "num_images": table.num_images,
        "num_boxes": int(np.count_nonzero(~(table.crowd | table.difficult))),
        "runs": [run.name for run in runs],
        "classes": classes,
        "references": [run.evaluation.reference for run in runs],
        "max_detections": runs[0].evaluation.coco.max_detections,
        "metrics": tables.metric_rows(runs),
        "iou_thresholds": IOU_THRESHOLDS,
        "config": tables.config_differences(runs),
        "plans": tables.plans(runs),
        "compared": tables.compared_rows(rows_of_runs),
        "class_rows": rows_of_runs,
        "pooled": [one.curves.pooled[0].best_f1() for one in measured],
        "kinds": list(zip(*costs, strict=True)),
        "highest_cost": max(cost.dAP for row in costs for cost in row),
        "error_kinds": ERROR_KINDS,
        "error_rows": [tables.error_rows(one) for one in measured],
        "confusions": [tables.confusions(one) for one in measured],
        "threshold": int(100 * measured[0].score_threshold) / 100,
        "data": {
            "runs": [run.name for run in runs],
            "classes": ["all classes pooled", *classes],
            "curves": tables.curves(measured),
            "logs": tables.log_charts(runs),
        },
    }


def _render(content: dict[str, Any]) -> str:
    folder = resources.files("resdet.evaluation")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"fixed": _fixed, "short": _short, "sort_key": _sort_key}
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    style, script = (Markup(folder.joinpath(f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    hashes = {"style_hash": _csp_hash(style), "script_hash": _csp_hash(script)}
    return template.render(content, style=style, script=script, **hashes)


def _fixed(value: float | None, digits: int = 3) -> str | None:
    """Format a number; None if it is undefined (None, or pycocotools' -1)."""
    return None if value is None or value == -1 else f"{value:.{digits}f}"


def _short(value: float | None, digits: int) -> str:
    """Format a number without trailing zeros; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


def _sort_key(value: float | str | None) -> str:
    """Return what the page's script sorts a table's column by; nothing for undefined numbers."""
    if isinstance(value, str):
        return value
    return "" if value is None or value == -1 else f"{value:.6g}"


def _csp_hash(text: str) -> str:
    """Return a text's hash as a content security policy names it."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
