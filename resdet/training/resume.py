"""What may change between a run and its continuation: every key of both configurations is decided here.

A changed key is refused where the checkpoint's weights or optimizer mean nothing under its new value, or where it would
have no effect any more; every other change is applied from the next step on and logged with both values. Where a change
makes evaluations incomparable with earlier ones, the best checkpoint is sought anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from resdet.config_reading import config_to_plain, flattened, parse_settings
from resdet.errors import ConfigError, UserError, WeightsError, name_some
from resdet.models.spec import WeightsOrigin
from resdet.weights.files import WeightsFile

logger = logging.getLogger(__name__)

_Config = TypeVar("_Config", bound=BaseModel)

_SHAPE = "the checkpoint's weights are of the old one"
_MEANING = "the checkpoint's weights were trained with the old one"
_BEGUN = "it decides how a run begins, and this one has begun"


def _keys(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


REFUSED: dict[str, str] = {
    **dict.fromkeys(_keys("model", "arch layout norm out_channels box_head_channels aspect_ratios"), _SHAPE),
    **dict.fromkeys(
        _keys(
            "model",
            "norm_eps image_mean image_std anchor_sizes stride_in_1x1 resize anchor_rounding anchor_stride roi_aligned "
            "roi_sampling_ratio",
        ),
        _MEANING,
    ),
    **dict.fromkeys(_keys("model", "weights calibration_images measured_mean measured_images"), _BEGUN),
    **dict.fromkeys((f"model.weights_origin.{name}" for name in WeightsOrigin.model_fields), _BEGUN),
    "model.trainable_layers": "the checkpoint's optimizer has a state for the old one's layers",
    "optim.name": "the checkpoint's optimizer state is the old one's",
    "optim.body_lr_factor": "the checkpoint's optimizer has a state for the old one's groups",
    "data.train.format": "a run's training data may grow, but not become another dataset",
}
"""Keys that must not change, and why."""

APPLIED = frozenset(
    [
        *_keys(
            "model",
            "fast rpn_pre_nms_top_n_train rpn_post_nms_top_n_train rpn_fg_iou_thresh rpn_bg_iou_thresh "
            "rpn_batch_size_per_image rpn_positive_fraction box_fg_iou_thresh box_bg_iou_thresh "
            "box_batch_size_per_image box_positive_fraction class_loss box_loss class_weights class_balance_beta",
        ),
        *_keys(
            "data.train",
            "images annotations unreadable classes root split use_difficult dataset num_images image_size seed",
        ),
        *_keys(
            "augment",
            "size crop short_side area pad flip rotate shift scale trivial erase colour_pca",
        ),
        *_keys("loader", "num_workers sampling repeat_threshold stall_seconds"),
        *_keys(
            "optim",
            "lr lr_batch_size momentum weight_decay norm_weight_decay warmup_steps warmup_factor schedule milestones "
            "gamma clip_grad_norm warmup_until_error plateau_patience",
        ),
        *_keys(
            "train",
            "steps epochs batch_size accumulate precision device log_every eval_every save_every patience ema_decay "
            "deterministic compile retry_out_of_memory label_smoothing mixup cutmix",
        ),
        *_keys("eval", "batch_size precision loss reference num_pictures picture_score"),
        *("augment", "min_visibility", "minutes", "plan", "output_dir", "resume", "seed"),
    ]
)
"""Keys whose change is applied."""

REJUDGED = frozenset(
    [
        *_keys(
            "model",
            "min_size max_size image_size rpn_pre_nms_top_n_test rpn_post_nms_top_n_test rpn_nms_thresh rpn_rank_by "
            "rpn_score_thresh rpn_min_size box_score_thresh box_nms_thresh box_detections_per_img box_min_size",
        ),
        *_keys("data", "val"),
        *_keys("train", "eval_images"),
        *_keys("eval", "tricks tiles best_metric max_detections resize views scales"),
    ]
)
"""Keys, or whole sections, whose change is applied and makes evaluations incomparable with earlier ones."""

_OWN = ("output_dir", "resume")  # of each start of a run


def check_configuration(file: WeightsFile, config: BaseModel) -> bool:
    """Compare the configuration of a checkpoint's run with the one that is to continue it.

    Changes are logged. Returns whether one of them makes evaluations incomparable with earlier ones.

    Raises:
        UserError: If a key of ``REFUSED`` has changed; the message has both values of each.
        WeightsError: If the checkpoint carries no configuration, or one of another command.
    """
    before, now = (flattened(config_to_plain(one)) for one in (configuration_of(file, type(config)), config))
    changed = [key for key in now if key not in _OWN and before.get(key) != now[key]]
    changed += [key for key in before if key not in now]  # of a dataset in another format
    refused = [
        f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))} ({REFUSED[key]})"
        for key in changed
        if key in REFUSED and not _is_the_same(file, key, before.get(key), now.get(key))
    ]
    if refused:
        raise UserError(
            f"{file.path}: cannot be resumed with this configuration: {'; '.join(refused)}. Leave these as they were, "
            f"or begin another run with another output_dir (model.weights={file.path} starts from its weights)"
        )
    for key in changed:
        logger.info("changed since %s: %s from %s to %s", file.path, key, *map(_shown, (before.get(key), now.get(key))))
    return any(_covers(REJUDGED, key) for key in changed)


def check_data(file: WeightsFile, before: Sequence[str], classes: Sequence[str], num_images: Mapping[str, int]) -> bool:
    """Compare the data that a run resumes on with that of its checkpoint.

    Args:
        file: The checkpoint.
        before: Names of its classes, in label order.
        classes: Those of ``data.train``.
        num_images: Number of images by the name of the split, ``train`` and ``val``.

    Changed numbers of images are logged. Returns whether that of ``val`` has changed.

    Raises:
        UserError: If the classes or their order differ: the rows of the last layer would change their meaning.
    """
    if list(before) != list(classes):
        pairs = enumerate(zip([*before, *classes], [*classes, *before], strict=True), start=1)
        label = next(label for label, (one, other) in pairs if one != other)
        there, here = (names[label - 1 : label] for names in (before, classes))
        first = f"the first to differ is label {label}, {_name(there)} there and {_name(here)} here"
        cure = "data.train.classes keeps their order; " if sorted(before) == sorted(classes) else ""
        raise UserError(
            f"{file.path}: its run has {len(before)} classes, {name_some(before, 10)}; data.train has {len(classes)}, "
            f"{name_some(classes, 10)}: {first}. Classes and their order must stay as they are: {cure}another "
            f"output_dir with model.weights={file.path} begins a run with other classes"
        )
    training = file.content.get("training")
    known: dict[str, int] = training.get("num_images", {}) if isinstance(training, dict) else {}  # older files: none
    changed = [split for split in num_images if known.get(split, num_images[split]) != num_images[split]]
    for split in changed:
        now = num_images[split]
        logger.info("changed since %s: data.%s from %d to %d images", file.path, split, known[split], now)
    return "val" in changed


def configuration_of(file: WeightsFile, kind: type[_Config]) -> _Config:
    """Return the configuration that a checkpoint carries; a WeightsError if it is not one of this command."""
    if "config" not in file.content:
        raise WeightsError(f"{file.path}: carries no configuration: is it the last.pt of a run?")
    try:
        return parse_settings(kind, yaml.safe_dump(file.content["config"]), source=str(file.path))
    except (ConfigError, yaml.YAMLError) as error:
        problem = error.problems[0] if isinstance(error, ConfigError) else error
        raise WeightsError(f"{file.path}: its configuration is not one of this command: {problem}") from error


def _is_the_same(file: WeightsFile, key: str, before: Any, now: Any) -> bool:
    """Return whether first weights have only moved, or a setting that a run took over from them is now stated."""
    if key == "model.weights":
        return isinstance(before, str) and isinstance(now, str) and Path(before).name == Path(now).name
    spec = {} if file.spec is None else file.spec.model_dump(mode="json")
    section, _, name = key.partition(".")
    return section == "model" and name in spec and spec[name] == now


def _covers(keys: frozenset[str], key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in keys for n in range(1, len(parts) + 1))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _name(names: Sequence[str]) -> str:
    return repr(names[0]) if names else "none"
