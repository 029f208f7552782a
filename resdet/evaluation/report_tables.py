"""The values of a report's tables and charts; their headings, notes and formats are in ``report.html.jinja``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resdet.evaluation.curves import Curve
from resdet.evaluation.report_runs import IOU_THRESHOLDS, MeasuredRun, ReportedRun, is_finite_number

_MAX_CURVE_POINTS = 150
_MAX_CURVE_POINTS_IN_PAGE = 30_000
_MAX_LOG_POINTS = 400
_MAX_MATRIX_CLASSES = 100
_MAX_CONFUSIONS = 20
_LOG_CHARTS = {"Loss": ("loss", "val_loss"), "AP": ("AP",), "AP50": ("AP50",), "Learning rate": ("lr",)}

Row = dict[str, Any]
"""A table's row: values by column; None and -1, pycocotools' "undefined", are shown as a dash."""


def metric_rows(runs: Sequence[ReportedRun]) -> list[tuple[str, list[float]]]:
    """Return every overall metric with each run's value."""
    of_runs = [run.evaluation.metrics for run in runs]
    return [(name, [metrics.get(name, -1.0) for metrics in of_runs]) for name in of_runs[0]]


def config_differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return the dotted keys whose values are not the same in all runs; each run has its own folder anyway."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in ("output_dir", "resume"))
    rows = ((key, [config.get(key, "not set") for config in flat]) for key in keys)
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def plans(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Return facts and rows of the plan of each run that has one, values as JSON."""
    return [
        {
            "run": run.name,
            "facts": run.plan["facts"],
            "rows": [{**row, "value": json.dumps(row["value"])} for row in run.plan["rows"]],
        }
        for run in runs
        if run.plan is not None
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat


def class_rows(measured: MeasuredRun) -> list[Row]:
    """Return COCO's and VOC's metrics of each class of one run, and the point of its best F1."""
    evaluation, curves = measured.run.evaluation, measured.curves.per_class[0]
    return [
        {**vars(row), "VOC": voc.AP, **vars(curve.best_f1())}
        for row, voc, curve in zip(evaluation.per_class, evaluation.voc.per_class, curves, strict=True)
    ]


def compared_rows(rows_of_runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Put the ``class_rows`` of all runs side by side, as ``AP_0``, ``AP_1`` and so on."""
    return [
        {"name": rows[0]["name"], "num_boxes": rows[0]["num_boxes"]}
        | {f"{key}_{run}": row[key] for key in ("AP", "AP50", "threshold") for run, row in enumerate(rows)}
        for rows in zip(*rows_of_runs, strict=True)
    ]


def error_rows(measured: MeasuredRun) -> list[Row]:
    """Return the cost of each kind of error for each class of one run."""
    classes = measured.errors.per_class
    return [{"name": row.name, "AP": row.AP} | {cost.kind: cost.dAP for cost in row.kinds} for row in classes]


def confusions(measured: MeasuredRun) -> dict[str, Any]:
    """Return one run's confusion matrix, a shade (0 to 9) for each cell, and its most frequent confusions."""
    matrix = measured.confusion
    counts, shares = matrix.counts, matrix.normalised()  # [K + 1, K + 1]
    wrong = counts - np.diag(np.diag(counts))
    kept = np.arange(1, len(counts))
    if len(kept) > _MAX_MATRIX_CLASSES:
        most = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1))[1:], kind="stable")
        kept = np.sort(most[:_MAX_MATRIX_CLASSES]) + 1
    cells = np.ix_(np.append(kept, 0), np.append(kept, 0))  # background comes last, as readers expect it
    # Among classes only: the errors already show what was missed or made up.
    pairs = np.argwhere(wrong[1:, 1:] > 0) + 1
    pairs = pairs[np.argsort(-wrong[tuple(pairs.T)], kind="stable")][:_MAX_CONFUSIONS]
    return {
        "score_threshold": matrix.score_threshold,
        "iou_threshold": matrix.iou_threshold,
        "names": [matrix.names[label] for label in kept],
        "counts": counts[cells].tolist(),
        "shades": np.minimum(np.ceil(9 * shares), 9).astype(int)[cells].tolist(),
        "num_left_out": len(counts) - 1 - len(kept),
        "top": [
            {"object": matrix.names[i], "detected": matrix.names[j], "count": counts[i, j], "share": shares[i, j]}
            for i, j in pairs.tolist()
        ],
    }


def curves(measured: Sequence[MeasuredRun]) -> list[list[list[dict[str, Any]]]]:
    """Return the curves of each run and IoU threshold for the page's script, the pooled one before the classes'."""
    num_curves = len(measured) * len(IOU_THRESHOLDS) * (1 + len(measured[0].curves.per_class[0]))
    num_points = min(_MAX_CURVE_POINTS, max(20, _MAX_CURVE_POINTS_IN_PAGE // num_curves))
    return [
        [
            [thinned_curve(curve, num_points) for curve in (pooled, *per_class)]
            for pooled, per_class in zip(one.curves.pooled, one.curves.per_class, strict=True)
        ]
        for one in measured
    ]


def thinned_curve(curve: Curve, num_points: int) -> dict[str, Any]:
    """Return a curve as some of its points, evenly over recall, including that of the best F1.

    Each is ``[recall, precision, score]`` as a threshold at that score gives it, which keeps or drops detections of
    equal score together.
    """
    thinned: dict[str, Any] = {"ap": round(curve.AP, 4), "points": [], "best": -1}
    if not curve.num_boxes or not len(curve.hits):
        return thinned
    last = np.flatnonzero(np.diff(curve.scores, append=-np.inf))
    recall, precision, scores = curve.recall[last], curve.precision[last], curve.scores[last]
    some = np.searchsorted(recall, np.linspace(recall[0], recall[-1], num_points - 2))
    threshold = curve.best_f1().threshold
    best = [] if threshold is None else [int(np.searchsorted(-scores, -threshold))]
    chosen = np.unique(np.concatenate([some, best, [len(last) - 1]])).astype(int)
    thinned["points"] = np.stack([recall, precision, scores], axis=1)[chosen].round(4).tolist()
    if best:
        thinned["best"] = int(np.searchsorted(chosen, best[0]))
    return thinned


def log_charts(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Return the training curves for the page's script: one chart per quantity that any run's log has."""
    charts = []
    for title, keys in _LOG_CHARTS.items():
        lines = [_log_line(run, index, key) for index, run in enumerate(runs) for key in keys]
        series = [line for line in lines if line["points"]]
        if any(len(line["points"]) > 1 for line in series):
            charts.append({"title": title, "series": series})
    return charts


def _log_line(run: ReportedRun, index: int, key: str) -> dict[str, Any]:
    # Undefined APs and losses that are not finite are left out.
    points = [
        (entry["step"], float(f"{entry[key]:.5g}"))
        for entry in run.log
        if is_finite_number(entry.get(key)) and entry[key] >= 0
    ]
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MAX_LOG_POINTS)).astype(int)).tolist()
    is_validation = key == "val_loss"
    name = f"{run.name}, validation" if is_validation else run.name
    return {"run": index, "name": name, "dashed": is_validation, "points": [points[i] for i in chosen]}
