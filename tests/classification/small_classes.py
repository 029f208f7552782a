"""A folder of small coloured pictures, and short runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from resdet.classification.config import PretrainConfig, load_pretrain_config

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 70), "red": (200, 50, 40)}


def make_folder(root: Path, *, num_images: int, seed: int) -> Path:
    """Write ``num_images`` noisy pictures of each colour, of differing sizes."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            height, width = generator.integers(8, 14, 2)
            pixels = np.array(colour) + generator.normal(0, 40, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def config_of(folder: Path, output_dir: Path, *overrides: str) -> PretrainConfig:
    """Give a run of a few steps of a small network on such folders."""
    return load_pretrain_config(
        ROOT / "configs" / "pretrain_digits_resnet20.yaml",
        [
            f"data.train={{format: folder, root: {folder / 'train'}}}",
            f"data.val={{format: folder, root: {folder / 'val'}}}",
            "model.image_size=8",
            "augment={crop: pad, pad: 1, flip: 0.5, colour_pca: 0.1}",
            "optim.warmup_steps=0",
            "optim.lr=0.01",
            "train.epochs=null",
            "train.steps=4",
            "train.batch_size=8",
            "train.log_every=1",
            "train.eval_every=2",
            f"output_dir={output_dir}",
            *overrides,
        ],
    )


def logged(folder: Path, key: str) -> list[Any]:
    """Give what a run logged under a name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Give all tensors of a checkpoint, training state included, by their place in it."""

    def leaves(tree: Any, name: str) -> dict[str, torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            return {name: tree}
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
        return {k: v for key, value in items for k, v in leaves(value, f"{name}.{key}").items()}

    return leaves(torch.load(path, weights_only=True), "")


def different(one: Path, other: Path) -> list[str]:
    """Name the tensors in which two checkpoints differ, bit for bit."""
    first, second = tensors_of(one), tensors_of(other)
    assert len(first) > 100
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]
