"""An evaluation as files and as a table."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from resdet.evaluation.coco import coco_metrics
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.voc import voc_metrics
from resdet.evaluation.write import EVALUATION_FILES, metrics_table, write_evaluation
from resdet.types import Category


def evaluated(table, detections):
    return Evaluation(coco_metrics(table, detections), voc_metrics(table, detections), detections, None)


def test_two_evaluations_in_one_folder_tear_no_file(case, no_detections, tmp_path: Path) -> None:
    table, detections = case(10)
    evaluations = [evaluated(table, detections), evaluated(table, no_detections)]
    for evaluation in evaluations:
        write_evaluation(tmp_path, evaluation, table)

    def write(evaluation: Evaluation) -> None:
        for _ in range(15):
            write_evaluation(tmp_path, evaluation, table)

    writers = [threading.Thread(target=write, args=[evaluation]) for evaluation in evaluations]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        for name in EVALUATION_FILES:
            json.loads((tmp_path / name).read_text())
        seen.add(len(json.loads((tmp_path / "detections.json").read_text())))
    assert seen <= {0, len(detections)}
    assert {path.name for path in tmp_path.iterdir()} == set(EVALUATION_FILES)


def test_names_of_classes_keep_the_tables_columns(case) -> None:
    table, detections = case(3)
    names = ["two\nlines", "tab\tstop", "\x1b[31mred", "\u202eflipped"]
    categories = tuple(Category(label, label, name) for label, name in enumerate(names, start=1))
    lines = metrics_table(evaluated(replace(table, categories=categories), detections)).splitlines()
    header, *rows = lines[:6]
    column = header.index("boxes") + len("boxes")
    assert [row[:column].split()[0] for row in rows] == [
        "two\\nlines",
        "tab\\tstop",
        "\\x1b[31mred",
        "\\u202eflipped",
        "all",
    ]
    assert all(row[column - 1].isdigit() and row[column] == " " for row in rows)
    assert len({len(line) for line in lines[:6]}) == 1
    assert np.all([line.isprintable() for line in lines])
