"""The pictures that a run draws of its validation images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from resdet.config import load_config
from resdet.training.detection import train

ROOT = Path(__file__).resolve().parents[2]


def test_images_with_one_name_have_a_picture_each(tmp_path: Path) -> None:
    names = ["a/1.png", "b/1.png", "b/1.jpg"]
    for shade, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 60 * shade, dtype=np.uint8)).save(tmp_path / name)
    document = {
        "images": [{"id": n, "file_name": name, "width": 64, "height": 64} for n, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [9, 9, 30, 30]} for n in range(3)],
        "categories": [{"id": 1, "name": "two\nlines"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    source = f"{{format: coco, images: {tmp_path}, annotations: {tmp_path}/instances.json}}"
    overrides = [f"data.train={source}", f"data.val={source}", f"output_dir={tmp_path}/run", "train.steps=1"]
    overrides += ["model.min_size=64", "model.max_size=64", "model.out_channels=16", "model.box_head_channels=16"]
    overrides += ["train.batch_size=2", "loader.num_workers=0", "eval.num_pictures=9", "plan=false"]
    train(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
    pictures = {path.name: path for path in (tmp_path / "run" / "pictures").iterdir()}
    assert set(pictures) == {"1.png", "1_2.png", "1_3.png"}
    corners = [np.asarray(Image.open(pictures[name]))[-1, -1, 0] for name in sorted(pictures)]
    np.testing.assert_allclose(corners, [0, 60, 120], atol=3)
