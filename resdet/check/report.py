"""Report what a check found, as an object, as plain values and as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from resdet.check.anchor_coverage import IOU_REACHED, Coverage
from resdet.check.kinds import KINDS, Severity
from resdet.data.coco_rules import Problem


@dataclass(frozen=True)
class Finding:
    """All problems of one kind in one split, in the order of the data."""

    split: str  # "train", "val", or "train and val" for what concerns both
    kind: str  # a key of KINDS
    problems: tuple[Problem, ...]

    @property
    def severity(self) -> Severity:
        """How severe this kind is in this split."""
        kind = KINDS[self.kind]
        return kind.severity if self.split == "train" or kind.elsewhere is None else kind.elsewhere

    @property
    def count(self) -> int:
        """Number of records, files or pairs concerned."""
        return sum(problem.count for problem in self.problems)


def grouped(split: str, problems: Iterable[Problem]) -> list[Finding]:
    """Group the problems of a split by kind, in the order of ``KINDS``."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    return [Finding(split, kind, tuple(by_kind[kind])) for kind in KINDS if kind in by_kind]


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds."""

    name: str
    source: str
    num_images: int  # with usable records
    boxes_per_class: dict[str, int]  # that training uses, difficult ones included, in label order
    coverage: Coverage | None  # None where no anchors were given
    num_files: int  # image files that were decoded

    def to_plain(self) -> dict[str, Any]:
        """Return everything as plain values for a json file."""
        missed = self.coverage and {
            size: {"num_boxes": count, "share": self.coverage.unreached[size] if count else None}
            for size, count in self.coverage.num_boxes.items()
        }
        return {
            "split": self.name,
            "source": self.source,
            "num_images": self.num_images,
            "num_files_decoded": self.num_files,
            "boxes_per_class": self.boxes_per_class,
            "no_anchor_reaches": missed,
        }


@dataclass(frozen=True)
class Report:
    """What ``check_dataset`` found."""

    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]  # errors first, then warnings, then infos; train before val

    @property
    def wrong(self) -> bool:
        """Whether the data are refused, or training on them would be wrong."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Return everything as plain values for a json file, every id included."""
        return {
            "wrong": self.wrong,
            "splits": [split.to_plain() for split in self.splits],
            "findings": [
                {
                    "split": finding.split,
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "count": finding.count,
                    "meaning": KINDS[finding.kind].meaning,
                    "problems": [
                        {key: value for key, value in vars(problem).items() if key not in ("kind", "count")}
                        for problem in finding.problems
                    ],
                }
                for finding in self.findings
            ],
        }


def report_text(report: Report, *, num_examples: int = 3) -> str:
    """Format a report for reading: what each split holds, then the findings with their first examples."""
    lines = []
    for split in report.splits:
        num_boxes = sum(split.boxes_per_class.values())
        decoded = f", {split.num_files:,} files decoded" if split.num_files else ""
        lines.append(
            f"{split.name}: {split.source}: {split.num_images:,} images{decoded}, "
            f"{num_boxes:,} boxes of {len(split.boxes_per_class)} classes"
        )
        if split.coverage is not None and num_boxes:
            num, unreached = split.coverage.num_boxes, split.coverage.unreached
            shares = ", ".join(f"{size} {unreached[size]:.1%} of {num[size]:,}" for size in num if num[size])
            lines.append(f"  boxes that no anchor overlaps by {IOU_REACHED:g}: {shares}")
    for finding in report.findings:
        severity = finding.severity.upper() if finding.severity == "error" else finding.severity
        head = f"{severity:<8}{finding.split}: {finding.kind}, {finding.count:,}: {KINDS[finding.kind].meaning}"
        lines += ["", head]
        lines.extend(f"          {_named(problem, report)}" for problem in finding.problems[:num_examples])
        if len(finding.problems) > num_examples:
            lines.append(f"          ... and {len(finding.problems) - num_examples:,} more")
    worst: Severity = "error" if report.wrong else "warning"
    total = sum(finding.count for finding in report.findings if finding.severity == worst)
    counted = f"{total:,} {worst}{'' if total == 1 else 's'}"
    if report.wrong:
        verdict = f"wrong: {counted}: training would be refused, or wrong"
    else:
        verdict = f"nothing is wrong; {counted}" if total else "nothing is wrong"
    return "\n".join([*lines, "", verdict])


def _named(problem: Problem, report: Report) -> str:
    """Return a problem's message with its file, unless that is named in the message or the report's first lines."""
    known = problem.file in problem.message or any(problem.file in split.source for split in report.splits)
    return problem.message if known else str(problem)
