"""Boxes and their names on pictures, and pictures in pages: for prediction, training, the browse page and the report.

``torchvision.utils.draw_bounding_boxes`` is no substitute: it writes names inside the boxes and over each other, in one
small font unless a font file is given. They cover small objects, and vanish in dark or busy photographs.
"""

from __future__ import annotations

import base64
import colorsys
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from resdet.errors import UserError, printable_name
from resdet.files import written_whole
from resdet.types import Category, Prediction

_Rect = tuple[int, int, int, int]  # left, top, right and bottom in whole pixels, the last two excluded

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_DRAWN_BY = "resdet"  # in the PNG text "Software" of pictures


def draw(
    image: npt.NDArray[np.uint8],
    prediction: Prediction,
    categories: Sequence[Category],
    *,
    score_threshold: float = 0.0,
    scale: int = 1,
) -> npt.NDArray[np.uint8]:
    """Draw boxes with class names and scores on a copy of a uint8 RGB image, ``[scale * H, scale * W, 3]``.

    A class has the same colour in every picture; a label without a category is written as a number. Detections below
    ``score_threshold`` are left out. Lines and letters grow with the image, unless they would cover small objects in a
    large one. The best detections are on top; a name is above its box, or inside or below it if another name is there,
    and never outside the image.
    """
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    shown = above(prediction, score_threshold)
    size_shown = _size_shown(height + width, scale * shown["boxes"])
    line = max(1, round(size_shown / 500))
    font = ImageFont.load_default(size=max(10, round(size_shown / 95)))
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (10, 2)
    names = {category.label: printable_name(category.name) for category in categories}

    best_first = torch.argsort(shown["scores"], descending=True, stable=True).tolist()
    boxes, labels, scores = (scale * shown["boxes"]).tolist(), shown["labels"].tolist(), shown["scores"].tolist()
    for i in reversed(best_first):
        x1, y1, x2, y2 = boxes[i]
        # Pillow's corners are pixels, the last one included.
        left, top = min(max(round(x1), 0), width - 1), min(max(round(y1), 0), height - 1)
        right, bottom = min(max(round(x2) - 1, left), width - 1), min(max(round(y2) - 1, top), height - 1)
        canvas.rectangle((left, top, right, bottom), outline=class_color(labels[i]), width=line)

    plates: list[_Rect] = []
    texts: list[str] = []
    for i in best_first:
        texts.append(f"{names.get(labels[i], labels[i])} {scores[i]:.2f}")
        size = round(canvas.textlength(texts[-1], font=font)) + 2 * line, ascent + descent
        plates.append(_free_place(boxes[i], size, (width, height), plates))
    for i, (left, top, right, bottom), text in reversed(list(zip(best_first, plates, texts, strict=True))):
        red, green, blue = color = class_color(labels[i])
        ink = (0, 0, 0) if 299 * red + 587 * green + 114 * blue > 128_000 else (255, 255, 255)
        canvas.rectangle((left, top, right - 1, bottom - 1), fill=color)
        canvas.text((left + line, top), text, fill=ink, font=font)
    return np.asarray(picture).copy()


def _size_shown(sides: int, boxes: torch.Tensor) -> float:
    """Return the sum of the sides of the image for which lines and letters are made.

    It is that of the picture, or of the part of it that one looks at where objects are small: 40 times the side of the
    middle one of ``boxes``, ``[N, 4]``, and no less than 1,200 pixels.
    """
    if not len(boxes):
        return sides
    middle = float((boxes[:, 2:] - boxes[:, :2]).amax(dim=1).median())
    return min(sides, max(1200, 40 * middle))


def _free_place(
    box: Sequence[float], size: tuple[int, int], image_size: tuple[int, int], taken: Sequence[_Rect]
) -> _Rect:
    """Return where a box's name goes: above, inside or below, the first of them that is free and inside the image."""
    left = max(min(round(box[0]), image_size[0] - size[0]), 0)
    wanted = (round(box[1]) - size[1], round(box[1]), round(box[3]))
    tops = [top for top in wanted if 0 <= top <= image_size[1] - size[1]] or [0]
    places = [(left, top, left + size[0], top + size[1]) for top in tops]
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    return (free or places)[0]


def _overlap(one: _Rect, other: _Rect) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def shown_from(evaluated: object) -> tuple[float, str]:
    """Return the score from which detections are worth drawing, and where it comes from, in words.

    It is the ``score_threshold`` of a ``Detector`` or an ``Evaluation``: the best F1 of the model's last evaluation.
    0.5 where that is None, and for models that have none.
    """
    best: float | None = getattr(evaluated, "score_threshold", None)
    return (0.5, "no threshold has been evaluated yet") if best is None else (best, "best F1 of the last evaluation")


def legible_scale(image: npt.NDArray[np.uint8]) -> int:
    """Return the scale for ``draw`` that makes the shorter side 320 px or more: names do not cover such an image.

    The longer side is enlarged to 2,048 px at most, so that a strip of 1x5000 is no picture of 500 megapixels.
    """
    shorter, longer = int(min(image.shape[:2])), int(max(image.shape[:2]))
    return max(1, min(math.ceil(320 / shorter), 2048 // longer))


def class_color(label: int) -> tuple[int, int, int]:
    """Return a label's colour, RGB in 0..255: hues a golden angle apart, so that neighbours differ most."""
    hue = (label - 1) * 0.6180339887 % 1
    lightness = (0.5, 0.65, 0.38)[(label - 1) // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def above(prediction: Prediction, score_threshold: float) -> Prediction:
    """Return the detections whose score is at least ``score_threshold``."""
    keep = prediction["scores"] >= score_threshold
    return Prediction(
        boxes=prediction["boxes"][keep], labels=prediction["labels"][keep], scores=prediction["scores"][keep]
    )


def picture_names(files: Iterable[PurePath | str]) -> list[str]:
    """Return a name without suffix for the picture of each file: its stem, with a number where that one is taken.

    Names that differ in case or in Unicode's form alone are the same to some file systems, and so they are here.
    """
    names: list[str] = []
    numbers: dict[str, int] = {}  # the last one of each name that is taken
    for file in files:
        stem = name = PurePath(file).stem[:200]  # a suffix and a number must fit into 255 bytes
        while (key := unicodedata.normalize("NFC", name.casefold())) in numbers:
            numbers[key] += 1
            name = f"{stem}_{numbers[key]}"
        numbers[key] = 1
        names.append(name)
    return names


def save_picture(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    """Write a uint8 RGB picture ``[H, W, 3]`` as its suffix says, whole or not at all.

    ``is_drawing`` knows a PNG of it again. A UserError is raised for a suffix other than .png, .jpg, .jpeg and .webp.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: a picture's suffix must be one of {', '.join(_FORMATS)}")
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", _DRAWN_BY)
    Image.fromarray(picture).save(buffer, _FORMATS[path.suffix.lower()], pnginfo=info, quality=90)
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def is_drawing(path: Path) -> bool:
    """Return whether a file was written by ``save_picture``."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Software") == _DRAWN_BY
    except (OSError, ValueError, SyntaxError):
        return False


def jpeg_url(image: npt.NDArray[np.uint8], max_side: int, *, optimize: bool = False) -> str:
    """Encode an image as a JPEG in a data URL, scaled down to ``max_side`` where it is larger."""
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, optimize=optimize)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
