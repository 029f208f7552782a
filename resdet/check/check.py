"""Check a dataset for everything that training would trip over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from resdet.check.anchor_coverage import AnchorLayout, anchor_coverage
from resdet.check.boxes import area_problems, box_problems
from resdet.check.classes import box_counts, class_problems, differing_classes
from resdet.check.duplicates import duplicate_problems
from resdet.check.files import (
    decoded_problems,
    find_files,
    image_problem,
    name_problems,
    shared_files,
    unlisted_files,
)
from resdet.check.kinds import SEVERITIES, UNREACHED
from resdet.check.limits import DetectorLimits, dense_images, strips
from resdet.check.report import Report, SplitSummary, grouped
from resdet.check.splits import DataSplit
from resdet.data.coco_rules import Problem
from resdet.data.image_facts import ImageFacts, all_image_facts


def check_dataset(
    splits: Sequence[DataSplit],
    *,
    anchors: AnchorLayout | None = None,
    limits: DetectorLimits | None = None,
    decode: bool = True,
    num_workers: int = 0,
    progress: bool = False,
) -> Report:
    """Look for everything that would make training or evaluation wrong, refused, or worse than it could be.

    ``splits`` are the data named ``"train"`` and ``"val"``, or one of them. Without ``anchors``, the boxes that they
    reach are not counted; without ``limits``, images with too many objects are not found. With ``decode``, every image
    file is decoded, in ``num_workers`` processes (0: in this one); otherwise only its existence is checked.
    """
    found = {split.name: list(split.problems) for split in splits}
    tables = {}
    for split in splits:
        tables[split.name], problems = split.usable_table()
        found[split.name].extend(problems)
    paths: dict[str, dict[int, str]] = {}  # of each split by image index
    for split in splits:
        table, problems = tables[split.name], found[split.name]
        problems.extend(box_problems(table, one_based=split.one_based))
        if not split.upright:  # YOLO's areas are computed
            problems.extend(area_problems(table, split.records))
        problems.extend(class_problems(table, split.name, use_difficult=split.use_difficult))
        if limits is not None:
            problems.extend(dense_images(table, limits))
        if anchors is not None:
            problems.extend(strips(table, anchors))
        problems.extend(name_problems(table))
        without_boxes = np.flatnonzero(np.diff(table.offsets) == 0).tolist() if table.num_boxes else []
        problems.extend(image_problem("image_without_boxes", table, index, "no boxes") for index in without_boxes)
        if split.root is not None:
            paths[split.name], missing = find_files(table, split.root)
            problems.extend(missing)
            # Splits often share a folder: a file that none of them lists is reported once.
            sharing = [other for other in splits if other.root == split.root]
            if sharing[0] is split:
                problems.extend(unlisted_files(split.root, sharing))
    shared = list(shared_files(tables, paths))
    shared.extend(differing_classes(tables))
    facts: dict[str, ImageFacts] = {}
    if decode:
        every = list(dict.fromkeys(path for of_split in paths.values() for path in of_split.values()))
        facts = all_image_facts(every, num_workers=num_workers, progress=progress)
        for name, of_split in paths.items():
            upright = next(split.upright for split in splits if split.name == name)
            found[name].extend(decoded_problems(tables[name], of_split, facts, upright=upright))
        for owner, problem in duplicate_problems(tables, paths, facts):
            (shared if owner is None else found[owner]).append(problem)
    summaries = []
    for split in splits:
        table, files = tables[split.name], paths.get(split.name, {}).values()
        coverage = None if anchors is None else anchor_coverage(table, anchors)
        boxes_of = dict(zip((c.name for c in table.categories), box_counts(table).tolist(), strict=True))
        num_files = sum(path in facts for path in files)
        summaries.append(SplitSummary(split.name, split.source, table.num_images, boxes_of, coverage, num_files))
        if split.name == "train" and coverage is not None and coverage.unreached["all"] > UNREACHED:
            unreached = coverage.unreached.items()
            shares = ", ".join(f"{size} {share:.1%}" for size, share in unreached if share == share)  # NaN: none
            found[split.name].append(Problem("unfit_anchors", f"boxes that no anchor reaches: {shares}"))
    findings = []
    for split in splits:
        file = str(split.records.path)
        named = (problem if problem.file else replace(problem, file=file) for problem in found[split.name])
        findings.extend(grouped(split.name, named))
    findings.extend(grouped(" and ".join(found), shared))
    return Report(tuple(summaries), tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))))
