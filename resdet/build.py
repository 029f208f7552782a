"""Build datasets and models from sections of the configuration. What they are built of never sees a ``Config``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from pydantic import BaseModel
from torch import Tensor
from torch.utils.data import Dataset

from resdet.check import anchor_coverage as coverage
from resdet.check.anchor_coverage import AnchorLayout
from resdet.check.browse import write_browse_page
from resdet.check.limits import DetectorLimits
from resdet.check.splits import DataSplit, coco_split, table_split, voc_split, yolo_split
from resdet.classification.config import PretrainConfig
from resdet.config import (
    CocoSource,
    Config,
    DataConfig,
    HeldOut,
    ModelConfig,
    PythonSource,
    ShapesSource,
    Source,
    VocSource,
    YoloSource,
    config_from_plain,
)
from resdet.data.annotations import AnnotationTable
from resdet.data.augment.pipeline import MIN_VISIBILITY, Augment, build_augment
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.image_files import check_files
from resdet.data.images import FolderImages
from resdet.data.names import on_disk
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.split import held_out_images
from resdet.data.torch_datasets import wrap_dataset
from resdet.data.voc import read_voc
from resdet.data.writing import Part
from resdet.data.yolo import read_yolo
from resdet.errors import DataError, UserError, WeightsError
from resdet.evaluation.settings import InferenceSettings
from resdet.models.checkpoint import load_detector_weights
from resdet.models.detector import Detector, build_detector
from resdet.models.losses import class_balanced_weights
from resdet.models.norm import calibrate_norm, has_fresh_frozen_norm
from resdet.models.spec import WEIGHTS_FACTS, DetectorSpec, Tiles
from resdet.processes import Processes
from resdet.weights.files import WeightsFile, WeightsPath, read_weights
from resdet.weights.pickles import is_plain
from resdet.weights.source import read_first_weights

logger = logging.getLogger(__name__)


def build_dataset(
    source: Source,
    *,
    training: bool,
    augment: Sequence[dict[str, dict[str, Any]]] = (),
    min_visibility: float = MIN_VISIBILITY,
    divided: HeldOut | None = None,
) -> DetectionDataset:
    """Read a dataset's annotations and check that its images exist; ``augment`` it if it is for ``training``.

    Of a dataset that is ``divided``, the held-out images are taken, or for ``training`` the others. A DataError reports
    whatever is missing or damaged, except that missing images are only logged in training with ``unreadable: skip``.
    """
    steps = build_augment(list(augment), min_visibility=min_visibility) if augment and training else None
    if isinstance(source, PythonSource):
        raise missing_data(source)
    if isinstance(source, ShapesSource):
        drawn = _drawn(source)
        return DetectionDataset(drawn, ShapesImages(source.image_size, source.seed), steps, training=training)
    table, root = _read(source, training=training, divided=divided)
    images = FolderImages(root, table, upright=isinstance(source, YoloSource))
    skip = training and source.unreadable == "skip"
    try:
        check_files(root, table)
    except DataError as error:
        if not skip or not os.path.isdir(root):
            raise
        logger.warning("%s; other images will replace them (unreadable: skip)", error)
    use_difficult = isinstance(source, VocSource) and source.use_difficult
    return DetectionDataset(table, images, steps, training=training, use_difficult=use_difficult, skip_unreadable=skip)


def _drawn(source: ShapesSource) -> AnnotationTable:
    table = shapes_table(source.num_images, source.image_size, source.seed)
    return table if source.classes is None else table.select_classes(source.classes)


def _read(
    source: CocoSource | VocSource | YoloSource, *, training: bool, divided: HeldOut | None = None
) -> tuple[AnnotationTable, Path]:
    """Read the annotations of a dataset, or of a part of it; return the folder of its file names too."""
    source = _on_disk(source)
    if isinstance(source, CocoSource):
        table, root = read_coco(source.annotations, classes=source.classes), source.images
    elif isinstance(source, YoloSource):
        # Both parts of a dataset must be parts of one table.
        left_out = (training or divided is not None) and source.unreadable == "skip"
        table, root = read_yolo(source.root, source.split, classes=source.classes, skip_unreadable=left_out)
    else:
        table, root = read_voc(source.root, source.split, classes=source.classes), source.root
    if divided is not None:
        if source.unreadable != "skip" or not os.path.isdir(root):
            check_files(root, table)
        held_out, notes = held_out_images(table, root, fraction=divided.fraction, seed=divided.seed)
        table = table.select_images(np.flatnonzero(~held_out if training else held_out))
        for note in () if training else notes:
            logger.info("%s", note)
    return table, root


def build_parts(data: DataConfig | Mapping[str, Source]) -> list[Part]:
    """Read the splits of a configuration or of a folder, to write them in another layout; all images must exist."""
    divided = None
    if isinstance(data, DataConfig):
        divided = data.val if isinstance(data.val, HeldOut) else None
        data = {"train": data.train, "val": data.train if isinstance(data.val, HeldOut) else data.val}
    parts = []
    for name, source in data.items():
        if isinstance(source, PythonSource):
            raise missing_data(source, f"data.{name}")
        if isinstance(source, ShapesSource):
            parts.append(Part(name, _drawn(source), ShapesImages(source.image_size, source.seed), source.format))
            continue
        table, root = _read(source, training=name == "train", divided=divided)
        check_files(root, table)
        parts.append(Part(name, table, root, source.format))
    return parts


def build_train_set(config: Config, *, augmented: bool = True) -> DetectionDataset:
    """Build the dataset of ``data.train``, without the images that ``data.val`` holds out of it."""
    val = config.data.val
    return build_dataset(
        config.data.train,
        training=True,
        augment=config.augment if augmented else (),
        min_visibility=config.min_visibility,
        divided=val if isinstance(val, HeldOut) else None,
    )


def build_val_set(config: Config) -> DetectionDataset:
    """Build the dataset of ``data.val``."""
    data = config.data
    if isinstance(data.val, HeldOut):
        return build_dataset(data.train, training=False, divided=data.val)
    return build_dataset(data.val, training=False)


def config_augment(config: Config) -> Augment | None:
    """Build the steps of ``augment``; None if there are none."""
    return build_augment(list(config.augment), min_visibility=config.min_visibility) if config.augment else None


def build_given_dataset(
    dataset: Dataset[Any],
    config: Config,
    team: Processes,
    classes: Sequence[str] | None,
    train_set: DetectionDataset | None,
) -> DetectionDataset:
    """Return a dataset that a program has given, to train on, or where ``train_set`` is known to evaluate on."""
    augment = None if config.plan else config_augment(config)  # a plan decides later
    return wrap_dataset(
        dataset,
        classes=classes,
        unnamed=None if train_set is None else [category.name for category in train_set.categories],
        name="train_set" if train_set is None else "val_set",
        training=train_set is None,
        augment=augment if train_set is None else None,
        num_workers=config.loader.num_workers,
        team=team,
    )


def missing_data(source: PythonSource, name: str = "data") -> UserError:
    """Return the error that reports a dataset which no file and no program gives; ``name`` is its section."""
    was = f" (it was {source.dataset} of a Python program)" if source.dataset else ""
    held_out = ", or data.val={fraction: 0.2} for a part of data.train" if name == "data.val" else ""
    return UserError(
        f"{name}: missing{was}: state a dataset by its folder (data=FOLDER), or its format (coco, voc, yolo, shapes) "
        f"and place{held_out}, or give one to resdet.train(config, train_set=..., val_set=...) or "
        "resdet.evaluate(model, dataset)"
    )


def annotation_files(config: Config) -> list[Path]:
    """Return the files that hold a configuration's annotations, apart from VOC's many: no output may replace them."""
    sources = (config.data.train, config.data.val)
    return [on_disk(source.annotations) for source in sources if isinstance(source, CocoSource)]


_Section = TypeVar("_Section", bound=BaseModel)


def _on_disk(source: _Section) -> _Section:
    """Return a source with its paths as the disk has them, where they differ in Unicode's form alone."""
    return source.model_copy(update={key: on_disk(value) for key, value in source if isinstance(value, Path)})


def inference_settings(
    config: Config | PretrainConfig, *, device: torch.device | None = None, progress: bool = False
) -> InferenceSettings:
    """Return how evaluations run that the configuration asks for, of detectors and of classifiers."""
    return InferenceSettings(
        batch_size=config.eval.batch_size,
        num_workers=config.loader.num_workers,
        device=device,
        precision=config.eval.precision or config.train.precision,
        tricks=config.eval.tricks if isinstance(config, Config) else None,
        tiles=config.eval.tiles if isinstance(config, Config) else None,
        max_detections=_max_detections(config) if isinstance(config, Config) else None,
        progress=progress,
    )


def _max_detections(config: Config) -> int | None:
    """Return the stated number of detections; at the default a model with another number of its own keeps that."""
    stated = config.eval.max_detections
    return None if stated == type(config.eval).model_fields["max_detections"].default else stated


def build_browse_page(config: Config, path: Path, *, num_images: int) -> None:
    """Write a page of the first images that a run of this configuration trains on (``write_browse_page``)."""
    loader, resize = config.loader, config.model.min_size
    steps = yaml.safe_dump(config.augment, default_flow_style=None, sort_keys=False, width=1000).strip()
    sides = f"{resize}" if isinstance(resize, int) else f"one of {', '.join(map(str, resize))}"
    write_browse_page(
        path,
        build_train_set(config),
        num_images=num_images,
        batch_size=config.train.batch_size,
        sampling=loader.sampling,
        repeat_threshold=loader.repeat_threshold,
        seed=config.seed,
        facts=[
            ("augmentation", steps if config.augment else "none"),
            ("order", f"{loader.sampling} sampling, batches of {config.train.batch_size}, seed {config.seed}"),
            ("afterwards", f"the detector resizes: short side {sides}, long side at most {config.model.max_size} px"),
        ],
    )


def build_splits(config: Config) -> list[DataSplit]:
    """Read ``data.train`` and ``data.val`` to check them, as ``build_split`` does."""
    train, val = build_split(config.data.train, "train"), config.data.val
    if not isinstance(val, HeldOut):
        return [train, build_split(val, "val")]
    table, ids = train.usable_table()[0], set[int]()
    if table.num_images and train.root is not None:
        held_out, notes = held_out_images(table, train.root, fraction=val.fraction, seed=val.seed)
        ids.update(table.image_ids[held_out].tolist())
        for note in notes:
            logger.info("%s", note)
    return list(train.divided(ids))


def build_split(source: Source, name: str) -> DataSplit:
    """Read a dataset to check it: whatever is damaged becomes a problem of the split, which is "train" or "val".

    A DataError reports a file or folder of the configuration that does not exist.
    """
    if isinstance(source, PythonSource):
        raise missing_data(source, f"data.{name}")
    if isinstance(source, ShapesSource):
        return table_split(name, shapes_table(source.num_images, source.image_size, source.seed), source.classes)
    source = _on_disk(source)
    if isinstance(source, CocoSource):
        return coco_split(name, source.images, source.annotations, source.classes)
    if isinstance(source, YoloSource):
        return yolo_split(name, source.root, source.split, source.classes)
    return voc_split(name, source.root, source.split, source.classes, use_difficult=source.use_difficult)


def anchor_layout(config: ModelConfig, tiles: Tiles | None = None) -> AnchorLayout:
    """Return where the detector of a configuration places its anchors, leaving aside what its weights may change.

    With ``tiles`` (``eval.tiles``) it is taken to see no image whole, in training either.
    """
    return coverage.anchor_layout(
        config.anchor_sizes,
        config.aspect_ratios,
        min_sizes=(config.min_size,) if isinstance(config.min_size, int) else config.min_size,
        max_size=config.max_size,
        rounded=config.anchor_rounding,
        nominal=config.anchor_stride == "nominal",
        sides_rounded=config.resize == "pil",
        tile=None if tiles is None else tiles.side,
    )


def detector_limits(config: Config) -> DetectorLimits:
    """Return how many objects of one image the detector of a configuration can find."""
    stated, own = _max_detections(config), min(config.eval.max_detections, config.model.box_detections_per_img)
    return DetectorLimits(
        num_detections=stated or own,
        detections_key="eval.max_detections",
        num_proposals=max(config.model.rpn_post_nms_top_n_test, stated or 0),
        proposals_key="model.rpn_post_nms_top_n_test",
    )


def build_model(config: ModelConfig, train_set: DetectionDataset, *, resume_from: WeightsPath | None) -> Detector:
    """Build the detector for a dataset's classes, with its first weights.

    Settings under which the weights were trained (``WEIGHTS_FIELDS``) are taken over as ``ModelConfig.weights`` says.
    ``resume_from`` is the checkpoint that will be loaded over whatever the model holds: no first weights are loaded,
    and the settings are taken from it. A UserError says what contradicts the weights, or that a norm is frozen on
    random weights and not to be calibrated.
    """
    spec = DetectorSpec.model_validate(config.model_dump(include=set(DetectorSpec.model_fields)))
    stated = config.model_fields_set
    first = None
    if resume_from is not None:
        spec = _take_over(spec, stated, read_weights(resume_from))
    elif config.weights is not None:
        settings = {name: getattr(config, name) for name in WEIGHTS_FACTS if name in stated}
        first = read_first_weights(config.weights, config.arch, config.weights_origin, settings)
        spec = _take_over(spec, stated, first)
    if config.class_balance_beta is not None:
        labels = train_set.table.labels[train_set.trained]
        num_boxes = np.bincount(labels, minlength=train_set.table.num_classes)[1:]  # [K], without the background
        weights = tuple(class_balanced_weights(num_boxes.tolist(), config.class_balance_beta))
        spec = spec.model_copy(update={"class_weights": weights})
        logger.info("weights of the classes: %s", ", ".join(f"{weight:.3g}" for weight in weights))
    # A whole detector's file brings its own backbone; anything else is the backbone's first weights.
    whole = first if first is not None and first.is_detector else None
    model = build_detector(
        spec,
        num_classes=train_set.table.num_classes,
        weights_backbone=first if whole is None else None,
        trainable_layers=config.trainable_layers,
        categories=train_set.categories,
    )
    if whole is not None:
        load_detector_weights(model, whole)
    if resume_from is not None or not has_fresh_frozen_norm(model):
        return model
    if config.calibration_images == 0:
        raise UserError(
            f"model.weights: {config.weights} leaves the frozen norms as they were made, and on random weights that "
            "diverges: give trained weights, or set model.calibration_images (64, say)"
        )
    num_images = min(config.calibration_images, train_set.table.num_images)
    num_norms = calibrate_norm(model.whole_body(), _calibration_batches(model, train_set, num_images))
    logger.info("statistics of %d frozen norms calibrated from %d training images", num_norms, num_images)
    return model


def _take_over(spec: DetectorSpec, stated: Set[str], file: WeightsFile) -> DetectorSpec:
    """Return the spec with the settings of the weights, where the configuration does not state them."""
    contradictions = []
    taken: dict[str, Any] = {}
    for name, value in file.settings.items():
        own = getattr(spec, name)
        if own == value:
            continue
        if name not in stated:
            taken[name] = value
        elif name in WEIGHTS_FACTS and _differs(own, value):
            contradictions.append(f"model.{name} is {own}, the weights were trained with {value}")
        else:
            logger.info("model.%s is %s; the weights in %s were trained with %s", name, own, file.path, value)
    if contradictions:
        raise UserError(
            f"{file.path}: these settings conflict with those the weights were trained with: "
            f"{'; '.join(contradictions)}. Leave these out of the configuration, or where the file does not say how "
            "they were trained, state it in model.weights_origin"
        )
    if taken:
        logger.info("taken over from %s: %s", file.path, ", ".join(f"{name}={value}" for name, value in taken.items()))
    return spec.model_copy(update=taken)


def _differs(a: Any, b: Any) -> bool:
    """Whether two values of a setting differ by more than their rounding in a configuration."""
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return any(abs(x - y) > 1e-4 * abs(y) for x, y in pairs)


def _calibration_batches(model: Detector, dataset: DetectionDataset, num_images: int) -> Iterator[Tensor]:
    """Yield training images as the backbone sees them, ``[B, 3, H, W]``, at the size used in evaluation."""
    training = model.transform.training
    model.transform.eval()
    for start in range(0, num_images, 16):
        indices = range(start, min(start + 16, num_images))
        pixels = (torch.from_numpy(dataset.stored(i).image) for i in indices)  # uint8 [H, W, 3] each
        images = [image.permute(2, 0, 1).float() / 255 for image in pixels]  # [3, H, W] in [0, 1]
        yield model.transform(images)[0].tensors
    model.transform.train(training)


def config_of_checkpoint(path: WeightsPath, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that a run's checkpoint carries, with overrides.

    For other weights the overrides must say on which data: ``data.val`` or ``data.train``, which then stands for both.
    """
    file = read_weights(path)
    if file.kind == "classifier":
        raise WeightsError(f"{file.path}: holds a classifier, not a detector; `resdet eval-classifier` evaluates it")
    if "config" not in file.content:
        if not any(text.startswith("data") for text in overrides):
            raise WeightsError(
                f"{file.path}: carries no configuration (it is not a checkpoint of `resdet train`): say on which data, "
                "as in data.val.format=coco data.val.images=FOLDER data.val.annotations=FILE"
            )
        train, val = ([text for text in overrides if re.match(rf"data\.{name}[.=]", text)] for name in ("train", "val"))
        both = [text.replace("data.val", "data.train", 1) for text in val if not train]
        both += [text.replace("data.train", "data.val", 1) for text in train if not val]
        # The rest is what a run must state, too.
        plain = {"model": {"weights": str(file.path)}, "train": {"steps": 1}, "output_dir": "."}
        return config_from_plain(plain, [*both, *overrides], source=str(file.path))
    config = file.content["config"]
    if not isinstance(config, dict) or not is_plain(config):
        raise WeightsError(f"{file.path}: its configuration must be a mapping of plain values")
    return config_from_plain(config, overrides, source=str(file.path))
