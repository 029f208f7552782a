"""Write a page that shows training images and their boxes as training sees them, next to the images as stored."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from resdet.data.augment.sample import Sample
from resdet.data.dataset import DetectionDataset
from resdet.data.order import REPEAT_THRESHOLD, Sampling, TrainBatches, image_order
from resdet.drawing import class_color, jpeg_url
from resdet.errors import DataError
from resdet.files import written_whole

NUM_IMAGES = 48
"""Default number of images on a page."""

_MIN_SIDE, _MAX_SIDE = 160, 480  # of a picture, in pixels
_MIN_BOXES, _MAX_BOXES = 50, 6_000  # drawn on a picture, and on the pictures of one kind together

Values = dict[str, Any]  # what the page's template shows, by the names that it uses


def write_browse_page(
    path: Path,
    dataset: DetectionDataset,
    *,
    num_images: int = NUM_IMAGES,
    batch_size: int = 1,
    sampling: Sampling = "uniform",
    repeat_threshold: float = REPEAT_THRESHOLD,
    seed: int = 0,
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write one self-contained HTML page of the first images that training draws.

    It shows each image as the model gets it, after augmentation, and as it is stored, both with their boxes; crowd
    regions and difficult objects that are not trained on are dashed and dotted. Pictures are reduced to 480 pixels, and
    further on pages of more than 48 images: 48 photographs take up to about 8 MB, pure noise 20 MB. The browser draws
    the boxes, which stay sharp. Of crowded images only the largest boxes are drawn (125 on a page of 48 images), and a
    note says so. An image that cannot be read is shown as its error.

    Which images come first depends on the batch size and on the next three arguments, which are those of
    ``train_loader``. ``facts`` are names and values to show at the top of the page, such as the augmentation.
    """
    assert num_images >= 1
    order = image_order(sampling, dataset.table, dataset.trained, repeat_threshold=repeat_threshold)
    batches = TrainBatches(dataset.table.sizes, batch_size, order=order, seed=seed)
    keys = list(itertools.islice(itertools.chain.from_iterable(batches), num_images))
    max_side = int(np.clip(round(_MAX_SIDE * (NUM_IMAGES / num_images) ** 0.5), _MIN_SIDE, _MAX_SIDE))
    max_boxes = max(_MAX_BOXES // num_images, _MIN_BOXES)
    cards = [_card(dataset, number, key, max_side, max_boxes) for number, key in enumerate(keys, start=1)]
    with written_whole(path) as temporary:
        temporary.write_text(_render(dataset, cards, facts), encoding="utf-8")


def _card(dataset: DetectionDataset, number: int, key: tuple[int, int], max_side: int, max_boxes: int) -> Values:
    """Return one draw; without pictures where the image cannot be read."""
    table, (index, _) = dataset.table, key
    image_id, file_name = int(table.image_ids[index]), str(table.file_names[index])
    card: Values = {"number": number, "trained": None, "stored": None}
    try:
        stored, trained = dataset.stored(key), dataset.sample(key)
    except DataError as error:
        return card | {"image_id": image_id, "file_name": file_name, "note": str(error)}
    notes = []
    if stored.image_id != image_id:
        notes.append(f"in place of image {image_id} ({file_name}), which cannot be read")
        index = int(np.flatnonzero(table.image_ids == stored.image_id)[0])
        image_id, file_name = stored.image_id, str(table.file_names[index])
    ids = table.annotation_ids[table.rows(index)]
    unsound = ids[~np.isin(ids, stored.annotation_ids)].tolist()
    if unsound:
        some = ", ".join(map(str, unsound[:5])) + (", ..." if len(unsound) > 5 else "")
        notes.append(f"{len(unsound)} of its boxes left out, not finite or too thin: annotation {some}")
    if (most := max(len(stored.boxes), len(trained.boxes))) > max_boxes:
        notes.append(f"of {most} boxes the {max_boxes} largest are shown")
    samples = {"trained": trained, "stored": stored}
    pictures = {name: _picture(dataset, sample, max_side, max_boxes) for name, sample in samples.items()}
    return card | {"image_id": image_id, "file_name": file_name, "note": "; ".join(notes)} | pictures


def _picture(dataset: DetectionDataset, sample: Sample, max_side: int, max_boxes: int) -> Values:
    height, width = sample.image.shape[:2]
    names = {category.label: category.name for category in dataset.categories}
    sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
    learned = dataset.is_target(sample)
    boxes: list[Values] = []
    # The largest first: smaller boxes lie on top, where the mouse finds them.
    for row in np.argsort(-sides.prod(axis=1), kind="stable")[:max_boxes].tolist():
        x1, y1, x2, y2 = sample.boxes[row].tolist()
        label = int(sample.labels[row])
        boxes.append(
            {
                "left": round(100 * x1 / width, 3),  # percent of the picture, as the next three
                "top": round(100 * y1 / height, 3),
                "width": round(100 * (x2 - x1) / width, 3),
                "height": round(100 * (y2 - y1) / height, 3),
                "label": label,
                "name": names[label],
                "kind": "crowd" if sample.crowd[row] else "difficult" if sample.difficult[row] else "",
                "trained": bool(learned[row]),
                "annotation_id": int(sample.annotation_ids[row]),
                "size": f"{x2 - x1:.4g} x {y2 - y1:.4g}",
                "tag_inside": y1 < 0.06 * height,
                "tag_right": x1 > 0.7 * width,
            }
        )
    return {
        "source": jpeg_url(sample.image, max_side),
        "width": width,
        "height": height,
        "boxes": boxes,
        "labels": sample.labels.tolist(),
        "labels_trained": sample.labels[learned].tolist(),
    }


def _render(dataset: DetectionDataset, cards: Sequence[Values], facts: Sequence[tuple[str, str]]) -> str:
    readable = [card for card in cards if card["trained"]]
    boxes = [box for card in readable for when in ("trained", "stored") for box in card[when]["boxes"]]
    counts = Counter(label for card in readable for label in card["trained"]["labels_trained"])
    present = {label for card in readable for when in ("trained", "stored") for label in card[when]["labels"]}
    classes: list[Values] = []
    for label in sorted(present):
        red, green, blue = class_color(label)
        ink = "#000" if 299 * red + 587 * green + 114 * blue > 128_000 else "#fff"  # of letters on the colour
        css = {"color": f"rgb({red} {green} {blue})", "ink": ink}
        classes.append({"label": label, "name": dataset.categories[label - 1].name, "count": counts[label], **css})
    source = files("resdet.check").joinpath("browse.html.jinja").read_text(encoding="utf-8")
    # Names come from files that anyone may have written: every value is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        name=dataset.table.name,
        facts=facts,
        cards=cards,
        classes=classes,
        num_images=dataset.table.num_images,
        num_classes=len(dataset.categories),
        num_trained=sum(counts.values()),
        kinds=sorted({box["kind"] for box in boxes if box["kind"] and not box["trained"]}),
    )
