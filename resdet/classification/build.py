"""Builders that turn the configuration of a classification run into objects. Nothing below takes a PretrainConfig."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from resdet.classification.config import (
    AugmentConfig,
    Cifar10Source,
    DigitsSource,
    NetworkConfig,
    PretrainConfig,
    Source,
)
from resdet.classification.data import LabelledImages, read_cifar10, read_class_names, read_digits, read_folder
from resdet.classification.model import ImageClassifier, load_first_weights, make_classifier
from resdet.classification.spec import ClassifierSpec
from resdet.classification.views import TrainView, centre_views
from resdet.config_reading import parse_settings
from resdet.data.names import on_disk
from resdet.data.order import evenly_spread
from resdet.errors import WeightsError
from resdet.weights.files import WeightsPath, read_weights
from resdet.weights.pickles import is_plain

logger = logging.getLogger(__name__)


def build_images(source: Source, *, classes: Sequence[str] | None = None) -> LabelledImages:
    """Read or list a dataset; ``classes`` are those of a folder whose section names none (None: its subfolders)."""
    if isinstance(source, DigitsSource):
        return read_digits(source.split)
    if isinstance(source, Cifar10Source):
        return read_cifar10(on_disk(source.root), source.split)
    names = classes if source.classes is None else read_class_names(on_disk(source.classes))
    return read_folder(on_disk(source.root), names)


def build_pretrained(
    config: NetworkConfig, train_set: LabelledImages, *, resize: int, resume_from: ImageClassifier | None
) -> ImageClassifier:
    """Build the classifier of a run, with its first weights and the mean of its images.

    The mean is that of ``resume_from``, the same run's classifier, or is measured on images of ``train_set`` whose
    short side is scaled to ``resize``.
    """
    spec = ClassifierSpec.model_validate(config.model_dump(include=set(ClassifierSpec.model_fields)))
    if resume_from is not None:
        # The mean was measured when the run began.
        spec = spec.model_copy(update={"image_mean": resume_from.spec.image_mean})
        return replace(make_classifier(spec, train_set.classes), mean=resume_from.mean)
    classifier = make_classifier(spec, train_set.classes)
    if config.weights is not None:
        load_first_weights(classifier, config.weights)
    if config.measured_mean == "no":
        return classifier
    mean = measure_mean(train_set, num_images=config.measured_images, resize=resize, size=spec.image_size)
    colours = mean.mean((1, 2))  # [3]
    shown = ", ".join(f"{value:.4f}" for value in colours.tolist())
    logger.info("mean colour of %d training images: %s", min(config.measured_images, len(train_set)), shown)
    spec = spec.model_copy(update={"image_mean": tuple(colours.tolist())})
    mean = mean if config.measured_mean == "pixel" else colours[:, None, None]  # [3, 1, 1]
    return replace(classifier, spec=spec, mean=mean)


def measure_mean(images: LabelledImages, *, num_images: int, resize: int, size: int) -> Tensor:
    """Average the centres (``centre_views``) of ``num_images`` images, evenly spread, or of all if there are fewer.

    Returns float32 ``[3, size, size]`` in [0, 1].
    """
    total = torch.zeros(3, size, size, dtype=torch.float64)
    rows = evenly_spread(len(images), num_images)
    for row in rows.tolist():
        total += centre_views(images.image(row), resize=resize, size=size)[0]
    return (total / (255 * len(rows))).float()


def build_train_view(augment: AugmentConfig, classifier: ImageClassifier) -> TrainView:
    """Build the random views of training."""
    size = classifier.spec.image_size
    red, green, blue = (round(255 * value) for value in classifier.spec.image_mean)
    return TrainView(augment, size=augment.size or size, resize=size, mean_colour=(red, green, blue))


def eval_config(
    weights: WeightsPath, *, arch: str | None, images: Path | None, overrides: Sequence[str] = ()
) -> PretrainConfig:
    """Return the configuration to evaluate weights with: that of their run, or ImageNet's usual one.

    The latter is for weights in torchvision's layout and needs ``arch`` and ``images``, a folder with one subfolder of
    images per class, which for a checkpoint of resdet pretrain replaces ``data.val``.
    """
    file = read_weights(weights)
    if file.is_detector:
        raise WeightsError(f"{file.path}: holds a detector, not a classifier; `resdet eval` evaluates it")
    tree = file.content.get("config")
    if tree is None:
        if arch is None or images is None:
            raise WeightsError(
                f"{file.path}: carries no configuration (it is not a checkpoint of `resdet pretrain`): name its "
                "network and a folder of images (--arch, --images)"
            )
        folder = {"format": "folder", "root": str(images)}
        tree = {
            "model": {"arch": arch},
            "data": {"train": folder, "val": folder},
            "train": {"steps": 1},
            "eval": {"resize": 256},
            "output_dir": str(file.path.parent),
        }
    if not isinstance(tree, dict) or not is_plain(tree) or not isinstance(tree.get("data"), dict):
        raise WeightsError(f"{file.path}: its configuration must be a mapping of plain values, with a section 'data'")
    if images is not None:
        tree = {**tree, "data": {**tree["data"], "val": {"format": "folder", "root": str(images)}}}
    return parse_settings(PretrainConfig, yaml.safe_dump(tree, sort_keys=False), overrides, source=str(file.path))
