"""Generate a dataset of shapes on cluttered backgrounds, drawn on access, the same on every machine of one kind.

The whole pipeline can run and learn from it without any download. Textured backgrounds, distracting strokes and rings,
random contrast and some overlap keep it from being trivial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from resdet.data.annotations import AnnotationTable, FileNames
from resdet.errors import DataError
from resdet.types import Category, Floats

SHAPE_CLASSES = ("circle", "square", "triangle")

MAX_OBJECTS = 6
MIN_SIDE, MAX_SIDE = 1 / 8, 1 / 2  # diameter of an object's circumscribed circle, relative to the image's side
_MAX_COVERED = 0.15  # share of a box that another box may cover
_CORNERS = {"square": 4, "triangle": 3}


@dataclass(frozen=True)
class _Shape:
    """An object to be painted; centre and radius in continuous pixels, angle in radians."""

    label: int
    x: float
    y: float
    radius: float
    angle: float

    def corners(self) -> Floats:
        """Return the corners of a polygon in order, ``[C, 2]``; none for a circle."""
        num_corners = _CORNERS.get(SHAPE_CLASSES[self.label - 1], 0)
        angles = self.angle + np.arange(num_corners) * 2 * math.pi / max(num_corners, 1)
        return np.stack([self.x + self.radius * np.cos(angles), self.y + self.radius * np.sin(angles)], axis=1)

    def box(self) -> tuple[float, float, float, float]:
        """Return the tight ``(x1, y1, x2, y2)``."""
        corners = self.corners()
        if len(corners) == 0:
            return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius
        (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        return x1, y1, x2, y2


def shapes_table(num_images: int, image_size: int, seed: int) -> AnnotationTable:
    """Return the annotations of the first ``num_images`` pictures of a seed.

    Picture ``i``, a square of ``image_size`` pixels, depends only on ``(seed, i, image_size)``: a longer table begins
    with the shorter one. Use different seeds for training and validation.
    """
    _check(num_images, image_size, seed)
    shapes = [_layout(seed, index, image_size)[0] for index in range(num_images)]
    boxes = np.array([shape.box() for image in shapes for shape in image], dtype=np.float64).reshape(-1, 4)
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    num_boxes = len(boxes)
    return AnnotationTable(
        name=f"shapes(seed={seed})",
        categories=tuple(Category(label, label, name) for label, name in enumerate(SHAPE_CLASSES, start=1)),
        image_ids=np.arange(1, num_images + 1, dtype=np.int64),
        file_names=FileNames([f"shapes_{seed}_{index:06d}.png" for index in range(num_images)]),
        sizes=np.full((num_images, 2), image_size, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(image) for image in shapes])]).astype(np.int64),
        boxes_xywh=boxes_xywh,
        labels=np.array([shape.label for image in shapes for shape in image], dtype=np.int64),
        area=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        crowd=np.zeros(num_boxes, dtype=np.bool_),
        difficult=np.zeros(num_boxes, dtype=np.bool_),
        annotation_ids=np.arange(1, num_boxes + 1, dtype=np.int64),
    )


@dataclass(frozen=True)
class ShapesImages:
    """The pictures of ``shapes_table`` with the same size and seed."""

    image_size: int  # height and width in pixels
    seed: int

    def __post_init__(self) -> None:
        _check(1, self.image_size, self.seed)

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Draw picture ``index``, 0-based: uint8 RGB ``[image_size, image_size, 3]``."""
        shapes, rng = _layout(self.seed, index, self.image_size)
        canvas = _background(rng, self.image_size)
        for shape in shapes:
            _paint(canvas, shape, rng)
        noise = rng.normal(0, rng.uniform(2, 7), size=(self.image_size, self.image_size, 1)).astype(np.float32)
        picture: npt.NDArray[np.uint8] = np.clip(canvas + noise, 0, 255).astype(np.uint8)
        return picture


def _check(num_images: int, image_size: int, seed: int) -> None:
    if num_images < 1 or image_size < 32 or seed < 0:
        raise DataError(
            "shapes: num_images must be >= 1, image_size >= 32 and seed >= 0, "
            f"got num_images={num_images}, image_size={image_size}, seed={seed}"
        )


def _layout(seed: int, index: int, image_size: int) -> tuple[list[_Shape], np.random.Generator]:
    """Place the objects of a picture; the returned generator then paints it."""
    rng = np.random.default_rng([seed, index])
    shapes: list[_Shape] = []
    num_objects = int(rng.integers(1, MAX_OBJECTS + 1))
    # A crowded picture may have no room for the last ones.
    for _ in range(4 * num_objects):
        if len(shapes) == num_objects:
            break
        # Uniform in the logarithm: as many small ones as large ones.
        diameter = image_size * math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE)))
        label = int(rng.integers(1, len(SHAPE_CLASSES) + 1))
        x, y = rng.uniform(diameter / 2, image_size - diameter / 2, size=2).tolist()
        shape = _Shape(label, x, y, diameter / 2, float(rng.uniform(0, 2 * math.pi)))
        if all(_covered(shape.box(), other.box()) <= _MAX_COVERED for other in shapes):
            shapes.append(shape)
    return shapes, rng


def _covered(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Return the share of the smaller box that the other one covers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller


def _color(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.uniform(20, 235, size=3).astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> npt.NDArray[np.float32]:
    """Paint soft clouds of two colours, a fine texture, and strokes and rings that are not objects."""
    first, second = _color(rng), _color(rng)
    num_cells = int(rng.integers(2, 6))
    cells = rng.random((num_cells, num_cells), dtype=np.float32)
    clouds = cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)
    grain = cv2.resize(rng.random((size // 4, size // 4), dtype=np.float32), (size, size))
    texture = np.asarray(0.8 * clouds + 0.2 * grain)[:, :, None]
    canvas = np.ascontiguousarray((first + (second - first) * texture).astype(np.float32).clip(0, 255))
    picture = canvas.astype(np.uint8)
    for _ in range(int(rng.integers(2, 7))):
        color = _color(rng).tolist()
        thickness = max(1, round(size * float(rng.uniform(0.004, 0.02))))
        start, end = rng.integers(0, size, size=(2, 2)).tolist()
        if rng.random() < 0.6:
            cv2.line(picture, start, end, color, thickness, cv2.LINE_AA)
        else:
            axes = rng.integers(max(2, size // 20), max(3, size // 5), size=2).tolist()
            turn, extent = float(rng.uniform(0, 360)), float(rng.uniform(60, 300))
            cv2.ellipse(picture, start, axes, turn, 0, extent, color, thickness, cv2.LINE_AA)
    return picture.astype(np.float32)


def _coverage(shape: _Shape, size: int) -> tuple[slice, slice, npt.NDArray[np.float32]]:
    """Return the rows and columns of a shape and the share of each of their pixels, in [0, 1], that it covers.

    The share follows from the signed distance of the pixel's centre to the outline, which is exact for straight edges
    across a pixel.
    """
    x1, y1, x2, y2 = shape.box()
    columns = slice(max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, size))
    rows = slice(max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, size))
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5 - shape.x
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - shape.y
    num_corners = len(shape.corners())
    if num_corners == 0:
        distance = np.hypot(x, y) - shape.radius
    else:
        # A regular polygon is an intersection of half-planes, each at the inradius from the centre.
        normals = shape.angle + (np.arange(num_corners) + 0.5) * 2 * math.pi / num_corners
        inradius = shape.radius * math.cos(math.pi / num_corners)
        planes = [math.cos(a) * x + math.sin(a) * y - inradius for a in normals.tolist()]
        distance = np.maximum.reduce(planes)
    return rows, columns, np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _paint(canvas: npt.NDArray[np.float32], shape: _Shape, rng: np.random.Generator) -> None:
    """Paint a shape over the canvas ``[size, size, 3]`` with a shaded or striped fill and perhaps a darker rim."""
    rows, columns, coverage = _coverage(shape, len(canvas))
    below = canvas[rows, columns]  # [h, w, 3]
    # A colour too close to what lies under it would make an invisible object.
    mean = below.mean(axis=(0, 1))
    color = _color(rng)
    for _ in range(8):
        if np.abs(color - mean).max() > 45:
            break
        color = _color(rng)
    direction, phase = rng.uniform(0, 2 * math.pi, size=2).tolist()
    x = np.arange(below.shape[1], dtype=np.float32)[None, :] / shape.radius
    y = np.arange(below.shape[0], dtype=np.float32)[:, None] / shape.radius
    along = math.cos(direction) * x + math.sin(direction) * y
    shade = 1 + float(rng.uniform(-0.25, 0.25)) * (along - along.mean())
    if rng.random() < 0.4:
        shade = shade + 0.12 * np.sin(float(rng.uniform(5, 14)) * along + phase)
    fill = color * shade[:, :, None]
    if rng.random() < 0.5:
        # The part inside the rim: the same shape scaled about its centre.
        inner_rows, inner_columns, inner = _coverage(replace(shape, radius=shape.radius * 0.86), len(canvas))
        rim = np.zeros(canvas.shape[:2], dtype=np.float32)  # [size, size]
        rim[rows, columns] = coverage
        rim[inner_rows, inner_columns] -= inner
        fill = fill * (1 - np.clip(rim[rows, columns], 0, 1)[:, :, None] * float(rng.uniform(0.3, 0.6)))
    canvas[rows, columns] = below + (fill - below) * coverage[:, :, None]
