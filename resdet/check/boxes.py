"""Check boxes: each by itself, repetitions, and the convention by which all of them were written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from resdet.check.kinds import EXTREME_ASPECT, MIN_EVIDENCE, OVERHANG, TINY_SIDE
from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable
from resdet.data.coco_rules import CocoRecords, Problem
from resdet.types import Bools, Floats

_EVERYWHERE = 0.9
"""Share of the boxes whose areas must be wrong: single odd areas are no matter of convention."""


def box_problems(table: AnnotationTable, *, one_based: bool) -> Iterator[Problem]:
    """Yield what is wrong with, or remarkable about, the finite boxes of a table; ``one_based`` ones are VOC's."""
    boxes = _Boxes(table, one_based)
    x, y, w, h = table.boxes_xywh.T  # [N] each
    inside = table.boxes_in_image()
    sides = inside[:, 2:] - inside[:, :2]  # [N, 2]
    shorter, longer = sides.min(axis=1, initial=math.inf), sides.max(axis=1, initial=0)
    negative = (w < 0) | (h < 0)
    zero = ~negative & ((w < MIN_TRAINABLE_SIDE) | (h < MIN_TRAINABLE_SIDE))
    outside = ~negative & ~zero & (shorter < MIN_TRAINABLE_SIDE)
    sound = ~negative & ~zero & ~outside
    overhang = np.max([-x, -y, x + w - boxes.width, y + h - boxes.height], axis=0, initial=-math.inf)
    # In VOC's convention a corner at 0 lies one pixel outside, which has a kind of its own.
    partly = sound & (overhang > (1 if one_based else OVERHANG))
    tiny = sound & (shorter < TINY_SIDE - 1e-6)
    extreme = sound & (longer / np.maximum(shorter, 1e-9) >= EXTREME_ASPECT)
    kinds: tuple[tuple[str, Bools, Callable[[int], str]], ...] = (
        ("negative_box", negative, lambda row: "negative width or height"),
        ("zero_box", zero, lambda row: f"a side of less than {MIN_TRAINABLE_SIDE:g} px"),
        ("box_outside_image", outside, lambda row: f"outside its {boxes.size(row)} image"),
        ("box_partly_outside", partly, lambda row: f"exceeds its {boxes.size(row)} image by {overhang[row]:.4g} px"),
        ("tiny_box", tiny, lambda row: f"{sides[row, 0]:.3g}x{sides[row, 1]:.3g} px"),
        ("extreme_aspect", extreme, lambda row: f"{sides[row, 0]:.4g}x{sides[row, 1]:.4g} px"),
    )
    for kind, found, describe in kinds:
        for row in np.flatnonzero(found).tolist():
            yield boxes.problem(kind, [row], describe(row))
    yield from _repeated_boxes(boxes, sound & ~table.crowd)
    if table.num_boxes >= MIN_EVIDENCE:
        if not one_based and (wrong := _other_units(boxes)) is not None:
            yield wrong
        else:
            yield from _off_by_one(boxes, sound & ~table.crowd)


def area_problems(table: AnnotationTable, records: CocoRecords) -> Iterator[Problem]:
    """Yield that the areas of a file contradict its boxes everywhere.

    An area is that of the object's mask, or of the box where there is none: at most the box's, but for rounding, and
    seldom less than a hundredth of it. Where no object has a mask, one factor other than 1 for all boxes of an image
    shows that boxes were scaled and areas were not.
    """
    width, height = np.maximum(table.boxes_xywh[:, 2:], 0).T  # [N] each
    rows = np.flatnonzero(width * height > 0)
    if len(rows) < MIN_EVIDENCE:
        return
    area, box = table.area[rows], (width * height)[rows]
    larger, tiny = area > 1.05 * box + (width + height)[rows] + 1, area < 0.01 * box
    example = f"annotation {table.annotation_ids[rows[0]]}: area {area[0]:.6g}, width * height {box[0]:.6g}"
    of = f"of {len(rows)} areas"
    if (larger | tiny).mean() >= _EVERYWHERE:
        message = f"{larger.sum()} {of} exceed their box's, {tiny.sum()} are less than a hundredth of it ({example})"
        yield Problem("areas_contradict_boxes", message, count=len(rows))
    elif not any(record.get("segmentation") for record in records.annotations if isinstance(record, dict)):
        image = table.image_of_box()[rows]
        areas, boxes, counts = (np.bincount(image, weights)[image] for weights in (area, box, None))  # of each image
        factor = areas / boxes  # [rows], like the last three
        scaled = (np.abs(area - factor * box) < 2e-3 * area + 1) & (np.abs(factor - 1) > 0.02) & (counts > 1)
        if scaled.mean() >= _EVERYWHERE:
            message = f"{scaled.sum()} {of} are their box's times one factor per image, {factor[0]:.3g} ({example})"
            yield Problem("areas_contradict_boxes", message, count=len(rows))


class _Boxes:
    """The boxes of a table with the images that they belong to, and their description in messages."""

    def __init__(self, table: AnnotationTable, one_based: bool) -> None:
        self.table = table
        self.one_based = one_based
        self.image = table.image_of_box()  # [N], like the next two
        self.height, self.width = table.sizes[self.image].T.astype(np.float64)

    def size(self, row: int) -> str:
        """Show the size of a box's image."""
        return f"{self.width[row]:g}x{self.height[row]:g}"

    def numbers(self, row: int) -> str:
        """Show a box as it is in its file."""
        x, y, w, h = self.table.boxes_xywh[row].tolist()
        if not self.one_based:
            return f"[x, y, width, height] = [{x:.10g}, {y:.10g}, {w:.10g}, {h:.10g}]"
        extent = 0 if w <= 0 or h <= 0 else 1
        corners = (x + 1, y + 1, x + 1 + w - extent, y + 1 + h - extent)
        return "xmin, ymin, xmax, ymax = " + ", ".join(f"{corner:.10g}" for corner in corners)

    def problem(self, kind: str, rows: list[int], what: str) -> Problem:
        """Make a problem of one box, or of several that are the same."""
        table, image = self.table, self.image[rows[0]]
        ids = tuple(number for number in table.annotation_ids[rows].tolist() if number >= 0)
        name = f"annotation{'s' if len(rows) > 1 else ''} {', '.join(map(str, ids)) or 'without id'}"
        where = f"image {table.image_ids[image]} ({table.file_names[image]})"
        message = f"{name} of {where}: {what}: {self.numbers(rows[0])}"
        return Problem(kind, message, (int(table.image_ids[image]),), ids, count=max(len(rows) - 1, 1))


def _repeated_boxes(boxes: _Boxes, keep: Bools) -> Iterator[Problem]:
    table = boxes.table
    columns = np.column_stack([boxes.image, table.labels, table.boxes_xywh])[keep]  # [kept, 6]
    rows_of: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for row, values in zip(np.flatnonzero(keep).tolist(), columns.tolist(), strict=True):
        rows_of[tuple(values)].append(row)
    for rows in rows_of.values():
        if len(rows) > 1:
            name = table.categories[int(table.labels[rows[0]]) - 1].name
            yield boxes.problem("repeated_box", rows, f"{len(rows)} times the same {name!r}")


def _other_units(boxes: _Boxes) -> Problem | None:
    """Return the problem that boxes are not ``[x, y, width, height]`` in pixels.

    Fractions of the image have no number above 1. Corners, read as ``[x, y, width, height]``, often leave the image
    (here: a tenth of the boxes), and their third and fourth numbers always exceed the first and second.
    """
    x, y, w, h = boxes.table.boxes_xywh.T  # [N] each
    num_boxes = len(x)
    if np.abs(boxes.table.boxes_xywh).max() <= 1:
        return Problem("boxes_are_fractions", f"no number of its {num_boxes} boxes exceeds 1", count=num_boxes)
    fits = (w > x) & (h > y) & (w <= boxes.width + 1) & (h <= boxes.height + 1)
    leaves = (x + w > boxes.width + 1) | (y + h > boxes.height + 1)
    if fits.mean() < 0.99 or leaves.mean() < 0.1:
        return None
    message = (
        f"{int(leaves.sum())} of its {num_boxes} boxes leave their images if read as [x, y, width, height], "
        "and as corners [x1, y1, x2, y2] all of them fit"
    )
    return Problem("boxes_are_corners", message, count=num_boxes)


def _off_by_one(boxes: _Boxes, keep: Bools) -> Iterator[Problem]:
    """Yield the signs that coordinates are one pixel off.

    Objects cut by the border of an image give boxes that end exactly there, so coordinates pile up at 0 and at the
    image's size. Piles one pixel further in, with not one box beyond them, come from counting pixels from 1, or from
    taking the last pixel inside an object for its end. A pile has at least 5 boxes, and three times as many as the
    pixel after it. Without objects at the border nothing can be concluded.
    """
    table = boxes.table
    x, y, w, h = table.boxes_xywh.T  # [N] each
    low = np.concatenate([x[keep], y[keep]])
    far = np.concatenate([(boxes.width - x - w)[keep], (boxes.height - y - h)[keep]])
    of = f"of its {table.num_boxes} boxes"
    if boxes.one_based:
        if (zero := int((low == -1).sum())) > 0:
            rows = np.flatnonzero((x == -1) | (y == -1))
            ids = tuple(np.unique(table.image_ids[boxes.image[rows]]).tolist())
            message = f"{len(rows)} {of} have a corner at 0 ({zero} corners)"
            yield Problem("zero_based_corners", message, ids, tuple(table.annotation_ids[rows].tolist()))
    elif _piles_up(low):
        message = f"{int((low == 1).sum())} sides {of} are at 1, and not one is nearer to 0"
        yield Problem("one_based_corners", message)
    if _piles_up(far):
        message = f"{int((far == 1).sum())} sides {of} end 1 px before the border, and not one is nearer"
        yield Problem("short_boxes", message)


def _piles_up(distance: Floats) -> bool:
    """Check that distances from a border pile up at exactly one pixel, and none is smaller."""
    at_one = int((distance == 1).sum())
    return at_one >= MIN_EVIDENCE and at_one >= 3 * int((distance == 2).sum()) and not (distance < 1).any()
