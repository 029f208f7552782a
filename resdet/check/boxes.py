"""Check boxes: each by itself, repetitions, and the convention by which all of them were written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from resdet.check.kinds import EXTREME_ASPECT, OVERHANG, TINY_SIDE
from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.data.coco_rules import Problem

_MIN_EVIDENCE = 5
"""Boxes or sides of boxes from which a convention is concluded."""


def box_problems(table: AnnotationTable, *, one_based: bool) -> Iterator[Problem]:
    """Yield what is wrong with, or remarkable about, the finite boxes of a table; ``one_based`` ones are VOC's."""
    names = _BoxNames(table, one_based)
    x, y, w, h = table.boxes_xywh.T  # [N] each
    height, width = table.sizes[names.image].T.astype(np.float64)
    inside = table.boxes_in_image()
    sides = inside[:, 2:] - inside[:, :2]  # [N, 2]
    shorter, longer = sides.min(axis=1, initial=math.inf), sides.max(axis=1, initial=0)
    negative = (w < 0) | (h < 0)
    zero = ~negative & ((w < MIN_TRAINABLE_SIDE) | (h < MIN_TRAINABLE_SIDE))
    outside = ~negative & ~zero & (shorter < MIN_TRAINABLE_SIDE)
    sound = ~negative & ~zero & ~outside
    overhang = np.max([-x, -y, x + w - width, y + h - height], axis=0, initial=-math.inf)
    # In VOC's convention a corner at 0 lies one pixel outside, which has a kind of its own.
    partly = sound & (overhang > (1 if one_based else OVERHANG))
    tiny = sound & (shorter < TINY_SIDE - 1e-6)
    extreme = sound & (longer / np.maximum(shorter, 1e-9) >= EXTREME_ASPECT)
    size = [f"{a:g}x{b:g}" for a, b in table.sizes[:, ::-1].tolist()]
    for row in np.flatnonzero(negative).tolist():
        yield names.problem("negative_box", row, "negative width or height")
    for row in np.flatnonzero(zero).tolist():
        yield names.problem("zero_box", row, f"a side of less than {MIN_TRAINABLE_SIDE:g} px")
    for row in np.flatnonzero(outside).tolist():
        yield names.problem("box_outside_image", row, f"outside its {size[names.image[row]]} image")
    for row in np.flatnonzero(partly).tolist():
        what = f"exceeds its {size[names.image[row]]} image by {overhang[row]:.4g} px"
        yield names.problem("box_partly_outside", row, what)
    for row in np.flatnonzero(tiny).tolist():
        yield names.problem("tiny_box", row, f"{sides[row, 0]:.3g}x{sides[row, 1]:.3g} px")
    for row in np.flatnonzero(extreme).tolist():
        yield names.problem("extreme_aspect", row, f"{sides[row, 0]:.4g}x{sides[row, 1]:.4g} px")
    yield from _repeated_boxes(table, names, sound & ~table.crowd)
    if table.num_boxes >= _MIN_EVIDENCE:
        wrong = None if one_based else _other_units(table, width, height)
        if wrong is not None:
            yield wrong
        else:
            yield from _off_by_one(table, names, width, height, sound & ~table.crowd)


class _BoxNames:
    """Describes the rows of a table in messages."""

    def __init__(self, table: AnnotationTable, one_based: bool) -> None:
        self.table = table
        self.image = table.image_of_box()  # [N]
        self.one_based = one_based

    def problem(self, kind: str, row: int, what: str) -> Problem:
        table, image = self.table, int(self.image[row])
        annotation_id = int(table.annotation_ids[row])
        image_id = int(table.image_ids[image])
        name = "an annotation without id" if annotation_id < 0 else f"annotation {annotation_id}"
        message = f"{name} of image {image_id} ({table.file_names[image]}): {what}: {self.numbers(row)}"
        return Problem(kind, message, (image_id,), () if annotation_id < 0 else (annotation_id,))

    def numbers(self, row: int) -> str:
        """Show a box as it is in its file."""
        x, y, w, h = self.table.boxes_xywh[row].tolist()
        if not self.one_based:
            return f"[x, y, width, height] = [{x:.10g}, {y:.10g}, {w:.10g}, {h:.10g}]"
        extent = 0 if w <= 0 or h <= 0 else 1
        corners = (x + 1, y + 1, x + 1 + w - extent, y + 1 + h - extent)
        return "xmin, ymin, xmax, ymax = " + ", ".join(f"{corner:.10g}" for corner in corners)


def _repeated_boxes(table: AnnotationTable, names: _BoxNames, keep: npt.NDArray[np.bool_]) -> Iterator[Problem]:
    rows = np.flatnonzero(keep)
    if len(rows) < 2:
        return
    columns = [*table.boxes_xywh[rows].T, table.labels[rows], names.image[rows]]
    order = np.lexsort(columns)
    same = np.ones(len(rows) - 1, dtype=np.bool_)  # as the row before
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    ends = np.append(starts[1:], len(rows))
    groups = [rows[order[start:end]] for start, end in zip(starts, ends, strict=True) if end - start > 1]
    for group in sorted(groups, key=lambda group: int(group[0])):
        image = int(names.image[group[0]])
        image_id = int(table.image_ids[image])
        ids = tuple(int(i) for i in table.annotation_ids[group] if i >= 0)
        name = table.categories[int(table.labels[group[0]]) - 1].name
        listed = ", ".join(map(str, ids))
        message = (
            f"annotations {listed} of image {image_id} ({table.file_names[image]}): "
            f"{len(group)} times the same {name!r}: {names.numbers(int(group[0]))}"
        )
        yield Problem("repeated_box", message, (image_id,), ids, count=len(group) - 1)


def _other_units(
    table: AnnotationTable, width: npt.NDArray[np.float64], height: npt.NDArray[np.float64]
) -> Problem | None:
    """Return the problem that boxes are not ``[x, y, width, height]`` in pixels.

    Fractions of the image have no number above 1. Corners, read as ``[x, y, width, height]``, often leave the image
    (here: a tenth of the boxes), and their third and fourth numbers always exceed the first and second.
    """
    x, y, w, h = table.boxes_xywh.T  # [N] each, like width and height
    num_boxes = table.num_boxes
    if np.abs(table.boxes_xywh).max() <= 1:
        return Problem("boxes_are_fractions", f"no number of its {num_boxes} boxes exceeds 1", count=num_boxes)
    fits = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    leaves = (x + w > width + 1) | (y + h > height + 1)
    if fits.mean() < 0.99 or leaves.mean() < 0.1:
        return None
    message = (
        f"{int(leaves.sum())} of its {num_boxes} boxes leave their images if read as [x, y, width, height], "
        "and as corners [x1, y1, x2, y2] all of them fit"
    )
    return Problem("boxes_are_corners", message, count=num_boxes)


def _off_by_one(
    table: AnnotationTable,
    names: _BoxNames,
    width: npt.NDArray[np.float64],
    height: npt.NDArray[np.float64],
    keep: npt.NDArray[np.bool_],
) -> Iterator[Problem]:
    """Yield the signs that coordinates are one pixel off.

    Objects cut by the border of an image give boxes that end exactly there, so coordinates pile up at 0 and at the
    image's size. Piles one pixel further in, with not one box beyond them, come from counting pixels from 1, or from
    taking the last pixel inside an object for its end. A pile has at least 5 boxes, and three times as many as the
    pixel after it. Without objects at the border nothing can be concluded.
    """
    x, y, w, h = table.boxes_xywh.T  # [N] each, like width and height
    low = np.concatenate([x[keep], y[keep]])
    far = np.concatenate([(width - x - w)[keep], (height - y - h)[keep]])
    of = f"of its {table.num_boxes} boxes"
    if names.one_based:
        if (zero := int((low == -1).sum())) > 0:
            rows = np.flatnonzero((x == -1) | (y == -1))
            ids = tuple(np.unique(table.image_ids[names.image[rows]]).tolist())
            message = f"{len(rows)} {of} have a corner at 0 ({zero} corners)"
            yield Problem("zero_based_corners", message, ids, tuple(table.annotation_ids[rows].tolist()))
    elif _piles_up(low):
        message = f"{int((low == 1).sum())} sides {of} are at 1, and not one is nearer to 0"
        yield Problem("one_based_corners", message)
    if _piles_up(far):
        message = f"{int((far == 1).sum())} sides {of} end 1 px before the border, and not one is nearer"
        yield Problem("short_boxes", message)


def _piles_up(distance: npt.NDArray[np.float64]) -> bool:
    """Check that distances from a border pile up at exactly one pixel, and none is smaller."""
    at_one = int((distance == 1).sum())
    return at_one >= _MIN_EVIDENCE and at_one >= 3 * int((distance == 2).sum()) and not (distance < 1).any()
