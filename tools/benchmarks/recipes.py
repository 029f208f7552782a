"""Fine-tune on small datasets in equal minutes: by torchvision's recipe, by two of ours set by hand, by finetune."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks.own_process import in_own_process
from benchmarks.pair import float_images
from benchmarks.report import Report
from benchmarks.settings import check_counts, check_positive
from resdet.build import build_train_set, build_val_set, config_of_checkpoint, inference_settings
from resdet.config import Config, load_config
from resdet.data.loader import train_loader
from resdet.errors import DataError, TrainingError, UserError
from resdet.evaluation.detect import evaluate
from resdet.evaluation.settings import InferenceSettings
from resdet.models.checkpoint import load_detector
from resdet.processes import Processes
from resdet.training.detection import evaluation_seconds, train
from resdet.types import target_to
from resdet.weights.files import read_weights

logger = logging.getLogger(__name__)

_BY_HAND = (
    *("model.min_size=416", "model.max_size=640", "train.batch_size=4", "train.precision=bf16"),
    *("train.eval_every=null", "loader.num_workers=1", "optim.warmup_steps=50"),
)
RECIPES: dict[str, tuple[str, ...] | None] = {
    "torchvision": None,
    "sgd": ("frcnn_r101", *_BY_HAND),
    "adamw": (
        *("frcnn_r101", *_BY_HAND),
        *("optim.name=adamw", "optim.lr=1e-4", "optim.lr_batch_size=null", "optim.schedule=cosine"),
    ),
    "finetune": ("finetune",),
    "without_precision": ("finetune", "train.precision=fp32"),
    "without_image_size": ("finetune", "model.min_size=800", "model.max_size=1333"),
    "without_anchors": ("finetune", "model.anchor_sizes=[32,64,128,256,512]", "model.aspect_ratios=[0.5,1,2]"),
    "without_regions": ("finetune", "model.box_batch_size_per_image=512"),
    "without_batch": ("finetune", "train.batch_size=4"),
    "without_rate": ("finetune", "optim.lr=1e-4"),
    "without_warmup": ("finetune", "optim.warmup_steps=1"),
    "without_clipping": ("finetune", "optim.clip_grad_norm=null"),
    "without_flipping": ("finetune", "augment=[]"),
    "without_voting": ("finetune", "eval.tricks.voting=null"),
    "without_soft": ("finetune", "eval.tricks.nms=hard"),
}
"""What to compare: our recipe and overrides of it, or None for torchvision's reference recipe on its own model.

Those that begin with ``without_`` give keys of one rule of ``finetune`` the values that are usual or set by hand.
"""

_COMPARED = ("torchvision", "sgd", "adamw", "finetune")

_LR, _LR_BATCH_SIZE, _BATCH_SIZE = 0.02, 16, 2
_DECAYS = (16 / 26, 22 / 26)
_WARMUP_STEPS, _WARMUP_FACTOR = 1000, 0.001


def benchmark_recipes(
    *,
    data: str = "",
    minutes: float = 10.0,
    recipes: str = ",".join(_COMPARED),
    arch: str = "resnet50",
    weights: str = "",
    runs: str = "",
    seed: int = 0,
) -> Report:
    """Train on each dataset by each recipe for the same time, evaluation on val included, and report the AP on test.

    Each run has a process of its own, one after the other; nothing else should run on the machine. Ours follow the
    clock (``minutes`` of a configuration), torchvision's too.

    Args:
        data: Folders, separated by commas, of ``images`` with ``train.json``, ``val.json`` and ``test.json`` (COCO).
        minutes: Time of each run.
        recipes: Which to compare, separated by commas: keys of ``RECIPES``.
        arch: The body.
        weights: Its ImageNet weights in torchvision's format; empty for random ones.
        runs: Folder that keeps our runs, one in each subfolder; empty to keep none.
        seed: Of heads, of samples and of their order.

    Raises:
        UserError: If a recipe is unknown, a folder lacks a file, or the minutes do not suffice.
    """
    settings = dict(locals())
    check_positive(settings, "minutes")
    check_counts(settings, "seed", least=0)
    folders, names = _folders(data), _names(recipes)
    tables: dict[str, list[dict[str, str | float]]] = {}
    with tempfile.TemporaryDirectory(prefix="resdet-benchmark-") as temporary:
        for folder in folders:
            rows: list[dict[str, str | float]] = []
            for name in names:
                output_dir = Path(runs or temporary, f"{folder.name}-{name}-{seed}")
                figures = in_own_process(fine_tune, name, folder, minutes, arch, weights, seed, output_dir)
                rows.append({"recipe": name, **figures})
                logger.info("%s, %s: %s", folder.name, name, figures)
            tables[f"{folder.name}: AP on test.json after {minutes:g} minutes"] = rows
    if len(folders) > 1:
        by_name = {name: [rows[number] for rows in tables.values()] for number, name in enumerate(names)}
        tables["Mean"] = [
            {"recipe": name, **{key: mean(float(row[key]) for row in rows) for key in ("AP", "AP50")}}
            for name, rows in by_name.items()
        ]
    return Report(work="recipes", settings=settings, tables=tables)


def _folders(data: str) -> list[Path]:
    folders = [Path(part.strip()) for part in data.split(",") if part.strip()]
    if not folders:
        raise UserError("data= must be folders, separated by commas, got nothing")
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"data= must be folders of different names, got {data!r}")
    for folder in folders:
        for name in ("images", "train.json", "val.json", "test.json"):
            if not (folder / name).exists():
                raise DataError(f"{folder}: must hold images, train.json, val.json and test.json; {name} is missing")
    return folders


def _names(recipes: str) -> list[str]:
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    if not names or not set(names) <= set(RECIPES) or len(set(names)) < len(names):
        raise UserError(f"recipes must be some of {', '.join(RECIPES)}, each once, got {recipes!r}")
    return names


def fine_tune(
    recipe: str, folder: Path, minutes: float, arch: str, weights: str, seed: int, output_dir: Path
) -> dict[str, float]:
    """Train by a recipe and return ``AP`` and ``AP50`` on test, ``val AP``, ``steps`` and ``seconds``.

    Args:
        recipe: A key of ``RECIPES``.
        folder: The data.
        minutes: Time for training and an evaluation on val.
        arch: The body.
        weights: Its ImageNet weights; empty for random ones.
        seed: Of heads, of samples and of their order.
        output_dir: For our runs.
    """
    chosen = RECIPES[recipe]
    name, *overrides = chosen if chosen is not None else ("frcnn_r101",)
    overrides = [*common_settings(folder, minutes, arch, weights, seed), *overrides, f"output_dir={output_dir}"]
    config = load_config(name, overrides)
    test_set = build_val_set(load_config(name, [*overrides, f"data.val.annotations={folder / 'test.json'}"]))
    model: nn.Module
    if chosen is None:
        model, figures = _train_torchvision(config)
        inference = InferenceSettings()
    else:
        result = train(config)
        figures = {"val AP": result.metrics["AP"], "steps": result.steps, "seconds": result.seconds}
        file = read_weights(result.output_dir / "best.pt")
        model, inference = load_detector(file), inference_settings(config_of_checkpoint(file))
    metrics = evaluate(model, test_set, inference).metrics
    return {"AP": metrics["AP"], "AP50": metrics["AP50"], **figures}


def common_settings(folder: Path, minutes: float, arch: str, weights: str, seed: int) -> list[str]:
    """Return the overrides of every recipe: data, length and body."""
    data = [
        f"data.{split}={{format: coco, images: {folder / 'images'}, annotations: {folder / f'{split}.json'}}}"
        for split in ("train", "val")
    ]
    body = [f"model.arch={arch}", f"model.weights={weights or 'null'}"]
    length = ["train.steps=null", f"minutes={minutes}"]
    return [*data, *body, *length, f"seed={seed}", *([] if weights else ["model.calibration_images=32"])]


def _train_torchvision(config: Config) -> tuple[FasterRCNN, dict[str, float]]:
    """Train torchvision's Faster R-CNN in float32 by its reference recipe, for ``config.minutes`` with an evaluation.

    SGD at 0.02 for 16 images, here 2; images at 800/1333, flipped; the rate rises over the first epoch and is divided
    by 10 after 16/26 and 22/26 of the time, as the reference does after epochs 16 and 22 of 26.

    Source: torchvision's ``references/detection/train.py`` and ``engine.py``.
    """
    begun = time.perf_counter()
    assert config.minutes is not None
    device = torch.device("cpu")
    team = Processes(0, 1, device)
    train_set, val_set = build_train_set(config), build_val_set(config)
    torch.manual_seed(config.seed)
    model = FasterRCNN(_body(config), num_classes=len(train_set.categories) + 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base_lr = _LR * _BATCH_SIZE / _LR_BATCH_SIZE
    optimizer = torch.optim.SGD(parameters, lr=base_lr, momentum=0.9, weight_decay=1e-4)
    warmup = max(1, min(_WARMUP_STEPS, math.ceil(train_set.table.num_images / _BATCH_SIZE) - 1))
    limit = 60 * config.minutes - evaluation_seconds(model, val_set, InferenceSettings(), 1)
    step, step_s = 0, 0.0
    batches = train_loader(
        *(train_set, team), batch_size=_BATCH_SIZE, num_micro_batches=1, num_workers=1, seed=config.seed, start_batch=0
    )
    model.train()
    with closing(batches):
        for batch in batches:
            elapsed = time.perf_counter() - begun
            if elapsed + step_s > limit:
                break
            rise = min(1.0, _WARMUP_FACTOR + (1 - _WARMUP_FACTOR) * step / warmup)
            fall = 0.1 ** sum(elapsed >= share * limit for share in _DECAYS)
            for group in optimizer.param_groups:
                group["lr"] = base_lr * rise * fall
            losses = model(float_images(batch, device), [target_to(target, device) for target in batch.targets])
            loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):
                raise TrainingError(f"torchvision: the loss after {step} steps is {loss.item()}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step, step_s = step + 1, time.perf_counter() - begun - elapsed
    metrics = evaluate(model, val_set).metrics
    return model, {"val AP": metrics["AP"], "steps": float(step), "seconds": time.perf_counter() - begun}


def _body(config: Config) -> nn.Module:
    backbone: nn.Module = resnet_fpn_backbone(backbone_name=config.model.arch, weights=None, trainable_layers=3)
    if config.model.weights is not None:
        state = torch.load(str(config.model.weights), weights_only=True)
        missing = backbone.get_submodule("body").load_state_dict(state, strict=False).missing_keys
        if missing:
            raise UserError(f"{config.model.weights}: must hold torchvision's {config.model.arch}; lacks {missing[:5]}")
    return backbone
