"""Write a generated COCO annotation file of any size, as hard to parse as train2017's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from resdet.files import written_whole

_CHUNK = 10_000
"""Records written at a time; bounds memory."""

_POOL = 4096
"""Outlines that annotations share. No reader looks inside one, and 40 million fresh numbers would take a minute."""

CROWD_SHARE = 0.01
"""Annotations that are crowd regions with run lengths in place of polygons, as in train2017 (1.2%)."""


def write_coco_json(path: Path, *, num_images: int, num_boxes: int, num_categories: int = 80, seed: int = 0) -> None:
    """Write an annotation file in COCO's instances format, the same bytes for the same arguments.

    Images are 640 pixels on the long side, and a few percent of them have no boxes; ids are in no order; categories
    have gaps between their ids. Polygons have 26 points on average, which makes a file of train2017's counts (118,287
    images, 860,000 boxes) about as large as that one (470 MB).

    Raises:
        UserError: If the folder does not exist.
    """
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(4 * num_images)[:num_images] + 1
    annotation_ids = rng.permutation(2 * num_boxes)[:num_boxes] + 1
    long, short = 640, rng.integers(360, 641, size=num_images)
    upright = rng.random(num_images) < 0.3
    widths, heights = np.where(upright, short, long), np.where(upright, long, short)
    category_ids = np.sort(rng.permutation(num_categories + num_categories // 8)[:num_categories] + 1)
    with_boxes = rng.permutation(num_images)[: max(1, round(0.99 * num_images))]
    polygons, runs = _outlines(rng)

    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "made up"}, "licenses": [], "images": [')
        for start in range(0, num_images, _CHUNK):
            part = slice(start, start + _CHUNK)
            columns = (column[part].tolist() for column in (image_ids, widths, heights))
            file.write(", " if start else "")
            file.write(", ".join(_image(*values) for values in zip(*columns, strict=True)))
        file.write('], "annotations": [')
        for start in range(0, num_boxes, _CHUNK):
            num = min(_CHUNK, num_boxes - start)
            image = with_boxes[rng.integers(len(with_boxes), size=num)]
            width, height = widths[image], heights[image]
            sides = np.exp(rng.uniform(np.log(4), np.log(360), size=(num, 2))).round(2)
            x = (rng.random(num) * np.maximum(width - sides[:, 0], 0)).round(2)
            y = (rng.random(num) * np.maximum(height - sides[:, 1], 0)).round(2)
            crowd = rng.random(num) < CROWD_SHARE
            outline = rng.integers(_POOL, size=num)
            area = (sides.prod(axis=1) * rng.uniform(0.4, 0.9, size=num)).round(4)
            columns = (
                column.tolist()
                for column in (
                    crowd,
                    outline,
                    area,
                    image_ids[image],
                    np.stack([x, y, *sides.T], axis=1),
                    category_ids[rng.integers(num_categories, size=num)],
                    annotation_ids[start : start + num],
                )
            )
            file.write(", " if start else "")
            file.write(
                ", ".join(
                    f'{{"segmentation": {(runs if is_crowd else polygons)[which]}, "area": {size}, '
                    f'"iscrowd": {int(is_crowd)}, "image_id": {image_id}, "bbox": {box}, '
                    f'"category_id": {category_id}, "id": {annotation_id}}}'
                    for is_crowd, which, size, image_id, box, category_id, annotation_id in zip(*columns, strict=True)
                )
            )
        file.write('], "categories": ')
        names = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in category_ids.tolist()]
        file.write(json.dumps(names) + "}")


def _image(image_id: int, width: int, height: int) -> str:
    name = f"{image_id:012d}.jpg"
    return (
        f'{{"license": {image_id % 8 + 1}, "file_name": "{name}", '
        f'"coco_url": "http://images.cocodataset.org/train2017/{name}", "height": {height}, "width": {width}, '
        f'"date_captured": "2013-11-14 11:18:45", '
        f'"flickr_url": "http://farm9.staticflickr.com/8186/{image_id}_4d7a0b7c1e_z.jpg", "id": {image_id}}}'
    )


def _outlines(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    lengths = np.maximum(3, rng.gamma(2.0, 13.0, size=_POOL).astype(np.int64))
    polygons = [json.dumps([(rng.random(2 * n) * 640).round(2).tolist()], separators=(",", ":")) for n in lengths]
    runs = [
        json.dumps({"counts": rng.integers(1, 2000, size=4 * n).tolist(), "size": [480, 640]}, separators=(",", ":"))
        for n in lengths
    ]
    return polygons, runs
