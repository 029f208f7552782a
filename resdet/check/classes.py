"""Check the classes of splits: whether they have boxes, how their names differ, how much of them is crowd."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from resdet.check.kinds import CROWD_SHARE, IMBALANCE, MIN_EVIDENCE
from resdet.data.annotations import AnnotationTable, bare_name
from resdet.data.coco_rules import Problem
from resdet.data.dataset import nothing_to_evaluate_on, nothing_to_train_on
from resdet.errors import name_some
from resdet.types import Ints


def box_counts(table: AnnotationTable) -> Ints:
    """Return the number of boxes of each class that training can use, difficult ones included, ``[K]``."""
    return np.bincount(table.labels[table.trainable(use_difficult=True)], minlength=table.num_classes)[1:]


def class_problems(table: AnnotationTable, split: str, *, use_difficult: bool) -> Iterator[Problem]:
    """Yield what is remarkable about the classes of one split, ``"train"`` or ``"val"``."""
    counts = box_counts(table)
    names = [category.name for category in table.categories]
    yield from _similar_names({f"{name!r}": name for name in names})
    num_crowds = int(table.crowd.sum())
    if split == "train" and not table.trainable(use_difficult=use_difficult).any():
        yield Problem("nothing_to_train_on", nothing_to_train_on(table))
    elif split == "val" and table.crowd.all():
        yield Problem("nothing_to_evaluate_on", nothing_to_evaluate_on(table))
    elif table.num_boxes >= MIN_EVIDENCE and num_crowds > CROWD_SHARE * table.num_boxes:
        share = num_crowds / table.num_boxes
        yield Problem("many_crowds", f"{num_crowds} of {table.num_boxes} objects have iscrowd 1 ({share:.0%})")
    if split == "train" and not counts.any():
        return
    unused = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if unused:
        message = f"{len(unused)} of {len(names)} classes have no box: {name_some(unused, 8)}"
        yield Problem("unused_category", message, count=len(unused))
    used = np.flatnonzero(counts)
    if len(used) > 1 and counts[used].max() >= IMBALANCE * counts[used].min():
        most, least = int(counts.argmax()), int(used[counts[used].argmin()])
        message = f"{counts[most]} boxes of {names[most]!r}, {counts[least]} of {names[least]!r}"
        yield Problem("class_imbalance", message)


def differing_classes(tables: Mapping[str, AnnotationTable]) -> Iterator[Problem]:
    """Yield the classes that only one of two splits has, and those whose names suggest that one is the other.

    A class of val that has no box there is none that an evaluation asks a model for.
    """
    names = {split: {category.name for category in table.categories} for split, table in tables.items()}
    used = {split: {table.categories[k - 1].name for k in np.unique(table.labels)} for split, table in tables.items()}
    single: dict[str, str] = {}
    for split, other in itertools.permutations(names, 2):
        only = sorted(names[split] - names[other])
        single |= {f"{name!r} of {split}": name for name in only}
        kind = "different_classes" if split == "val" else "absent_classes"
        counted = [name for name in only if split != "val" or name in used[split]]
        if counted and names[other]:
            yield Problem(kind, f"only {split} has {name_some(counted, 8)}", count=len(counted))
    yield from _similar_names(single)


def _similar_names(names: Mapping[str, str]) -> Iterator[Problem]:
    """Yield the names that are one but for case, blanks, hyphens and underscores; keys are how messages call them."""
    same: dict[str, list[str]] = defaultdict(list)
    for shown, name in names.items():
        same[bare_name(name) or name].append(shown)
    for shown_names in same.values():
        if len(shown_names) > 1:
            yield Problem("similar_class_names", " and ".join(shown_names), count=len(shown_names) - 1)
