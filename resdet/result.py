"""What was found in an image, and the forms in which people go on with it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from resdet.data.sources import source_name
from resdet.data.video import Frame
from resdet.drawing import draw, legible_scale, save_picture
from resdet.errors import UserError, printable_name
from resdet.evaluation.matching import to_xywh
from resdet.files import check_output
from resdet.types import Category, Prediction


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """An image, or a frame of a video, and the ``N`` objects detected in it, by falling score.

    ``len(result)`` is ``N``. Tensors are on the CPU; ``result.boxes.numpy()`` costs nothing.

    Attributes:
        image: uint8 RGB ``[H, W, 3]``, to whose pixels the boxes refer.
        boxes: float32 ``[N, 4]``, ``(x1, y1, x2, y2)``.
        labels: int64 ``[N]``, 1..K.
        scores: float32 ``[N]``, in [0, 1].
        categories: The model's classes by label; none if it does not know their names.
        path: The file or URL it comes from; None for an image in memory.
        frame: Where in the video ``path`` it is from; None for an image.
        shown_from: The score from which ``draw`` and ``save`` show detections: by the best F1 of the model's last
            evaluation, 0.5 before any.
    """

    image: npt.NDArray[np.uint8]
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    categories: tuple[Category, ...] = ()
    path: Path | str | None = None
    frame: Frame | None = None
    shown_from: float = 0.5

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each box, ``N`` in all; the label as text where the model does not know the name."""
        names = {category.label: category.name for category in self.categories}
        return tuple(names.get(label, str(label)) for label in self.labels.tolist())

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        source = "array" if self.path is None else printable_name(str(self.path))
        frame = "" if self.frame is None else f" frame {self.frame.index}"
        shown = Counter(self.above(self.shown_from).names)
        listed = ", ".join(f"{count} {printable_name(name)}" for name, count in shown.most_common())
        return (
            f"<Result {source}{frame} {width}x{height}: {len(self)} detections, of score >= {self.shown_from:.3g}: "
            f"{listed or 'none'}>"
        )

    def above(self, score: float) -> Result:
        """Return the same with the detections of at least this score only."""
        keep = self.scores >= score
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], scores=self.scores[keep])

    def draw(self, score_threshold: float | None = None, *, scale: int | None = None) -> Image.Image:
        """Draw the boxes with names and scores on a copy of the image, as a PIL image, which notebooks display.

        Args:
            score_threshold: Show detections from this score on; by default from ``shown_from``.
            scale: Enlarge the image by this whole number. By default small ones are enlarged until their shorter side
                has 320 px, so that names do not cover them; 1 keeps the size.
        """
        picture = draw(
            self.image,
            Prediction(boxes=self.boxes, labels=self.labels, scores=self.scores),
            self.categories,
            score_threshold=self.shown_from if score_threshold is None else score_threshold,
            scale=legible_scale(self.image) if scale is None else scale,
        )
        return Image.fromarray(picture)

    def save(
        self, path: str | os.PathLike[str], score_threshold: float | None = None, *, scale: int | None = None
    ) -> None:
        """Write the picture of ``draw`` to a .png, .jpg or .webp file, over what was there but not over its own source.

        A UserError is raised if the file is the image's own, cannot be written, or has another suffix.
        """
        path = Path(path)
        check_output(path, [self.path] if isinstance(self.path, Path) else [])
        save_picture(path, np.asarray(self.draw(score_threshold, scale=scale)))

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return all detections in COCO's result format, as pycocotools' ``loadRes`` reads a list of them.

        Each has ``image_id``, ``category_id``, ``bbox`` (x, y, width, height; pixels) and ``score``, and where they are
        known ``file_name``, ``category_name`` and, of a video, ``frame`` and ``seconds``. ``category_id`` is that of
        the model's training data, or the label if the model does not know its classes.
        """
        known = {one.label: {"category_id": one.category_id, "category_name": one.name} for one in self.categories}
        shared: dict[str, Any] = {"image_id": image_id}
        if self.path is not None:
            shared["file_name"] = source_name(self.path)
        if self.frame is not None:
            shared |= {"frame": self.frame.index, "seconds": self.frame.seconds}
        columns = to_xywh(self.boxes.double().numpy()), self.labels, self.scores
        return [
            {**shared, **known.get(label, {"category_id": label}), "bbox": bbox, "score": score}
            for bbox, label, score in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def to_yolo(self, *, scores: bool = False) -> str:
        """Return all detections as the text of a YOLO label file, a line each.

        A line is ``class cx cy width height``, with ``scores`` also the score. ``class`` counts from 0 (label - 1),
        centre and size are fractions of the image's. ``result.above(0.5).to_yolo()`` keeps the better ones.
        """
        height, width = self.image.shape[:2]
        x1, y1, x2, y2 = (self.boxes.double() / self.boxes.new_tensor([width, height, width, height])).unbind(1)
        columns = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, *([self.scores] if scores else [])]
        rows = zip(self.labels.tolist(), *(column.tolist() for column in columns), strict=True)
        return "".join(f"{label - 1} {' '.join(f'{value:.8g}' for value in row)}\n" for label, *row in rows)

    def to_supervision(self) -> Any:
        """Return all detections as ``supervision.Detections``, with ``class_name`` in their data.

        ``class_id`` counts from 0 (label - 1), as in supervision's datasets. A UserError is raised where the package is
        not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError("Result.to_supervision needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy().copy(),
            confidence=self.scores.numpy().copy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.names, dtype=str)},
        )


def coco_entries(results: Sequence[Result | None]) -> Iterator[dict[str, Any]]:
    """Yield the detections of many results in COCO's result format, as ``Result.to_coco``.

    ``image_id`` is the file's name as a number (``000000000139.jpg`` is 139, as COCO names its images) if all are
    images with such names and no two the same; otherwise results are numbered from 1. None stands for a file that could
    not be read: its name does not matter, but it is numbered.
    """
    stems = [Path(source_name(one.path or "")).stem for one in results if one is not None and one.frame is None]
    numbers = {int(stem) for stem in stems if stem.isascii() and stem.isdecimal()}
    by_name = len(numbers) == sum(one is not None for one in results)
    for position, result in enumerate(results, start=1):
        if result is not None:
            yield from result.to_coco(int(Path(source_name(result.path or "")).stem) if by_name else position)
