"""Write an evaluation as files for programs and as a table for people."""

from __future__ import annotations

import json
from pathlib import Path

from resdet.data.annotations import AnnotationTable
from resdet.errors import printable_name
from resdet.evaluation.coco import CocoNumbers, detections_to_coco
from resdet.evaluation.detect import Evaluation
from resdet.files import make_output_folder, write_text

EVALUATION_FILES = ("metrics.json", "detections.json")
"""What ``write_evaluation`` writes."""


def write_evaluation(output_dir: Path, evaluation: Evaluation, table: AnnotationTable) -> None:
    """Write ``metrics.json`` (``write_metrics``) and ``detections.json`` (COCO's result format) into a folder.

    The folder is created if it does not exist. ``table`` is the ground truth that the evaluation was measured on.
    """
    make_output_folder(output_dir)
    write_metrics(output_dir / "metrics.json", evaluation, table)
    detections = detections_to_coco(table, evaluation.detections)
    write_text(output_dir / "detections.json", json.dumps(detections) + "\n")


def write_metrics(path: Path, evaluation: Evaluation, table: AnnotationTable) -> None:
    """Write all metrics of an evaluation, per class too, and pycocotools' numbers if it has them."""
    reference = evaluation.reference
    document = {
        "dataset": table.name,
        "num_images": table.num_images,
        "metrics": evaluation.metrics,
        **({} if reference is None else {"reference": {"pycocotools": reference.version, **reference.metrics}}),
        "score_threshold": evaluation.score_threshold,
        "per_class": {
            row.name: {"num_boxes": row.num_boxes}
            | {key: value for key, value in vars(row).items() if key not in ("name", "num_boxes")}
            | {f"voc_{key}": value for key, value in vars(voc).items() if key.startswith("AP")}
            for row, voc in zip(evaluation.per_class, evaluation.voc.per_class, strict=True)
        },
    }
    write_text(path, json.dumps(document, indent=2) + "\n")


def metrics_table(evaluation: Evaluation) -> str:
    """Format a table of one line per class and one for all, then every overall metric; ``-`` is undefined."""
    columns = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_max")
    voc = evaluation.voc.per_class
    rows: list[tuple[CocoNumbers, str, int, float]] = [
        (row, printable_name(row.name), row.num_boxes, of_voc.AP)
        for row, of_voc in zip(evaluation.per_class, voc, strict=True)
    ]
    rows.append((evaluation.coco, "all", sum(row.num_boxes for row in voc), evaluation.voc.AP))
    width = max(5, *(len(name) for _, name, _, _ in rows))
    lines = [f"{'class':{width}} {'boxes':>7} " + " ".join(f"{name:>9}" for name in (*columns, "voc_AP50"))]
    for row, name, num_boxes, voc_ap in rows:
        numbers = [*(getattr(row, column) for column in columns), voc_ap]
        lines.append(f"{name:{width}} {num_boxes:>7} " + " ".join(f"{_number(number):>9}" for number in numbers))
    lines += ["", *(f"{name:<18} {_number(value)}" for name, value in evaluation.metrics.items())]
    best = "-" if evaluation.score_threshold is None else f"{evaluation.score_threshold:.3f}"
    return "\n".join([*lines, f"{'score of best F1':<18} {best}"])


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
