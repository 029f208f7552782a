"""Small COCO datasets of generated pictures, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from resdet.data.shapes import ShapesImages, shapes_table

SIDE = 64  # of an image, in pixels


def coco_folder(folder: Path, num_images: int, ids: Mapping[str, int] | None = None) -> Path:
    """Write generated pictures and ``a.json``; classes have ``ids``, in this order, or those they come with."""
    table, images = shapes_table(num_images, SIDE, 0), ShapesImages(SIDE, 0)
    folder.mkdir()
    for index in range(num_images):
        Image.fromarray(images(index)).save(folder / f"{index}.png")
    owners, names = table.image_of_box(), [category.name for category in table.categories]
    ids = ids or {category.name: category.category_id for category in table.categories}
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(num_images)],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(owners[row]),
                "category_id": ids[names[table.labels[row] - 1]],
                "bbox": table.boxes_xywh[row].tolist(),
            }
            for row in range(table.num_boxes)
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder
