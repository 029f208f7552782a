"""From a model and images to detections, and from a dataset's detections to its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset, without_subset
from resdet.data.loader import eval_loader
from resdet.errors import DataError, WeightsError
from resdet.evaluation.coco import ClassMetrics, CocoMetrics, coco_metrics
from resdet.evaluation.curves import best_score_threshold
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed, random_states_kept
from resdet.evaluation.voc import VocMetrics, voc_metrics
from resdet.malloc import keep_freed_memory
from resdet.models.test_time import detect_with_tricks
from resdet.precision import Precision, autocast
from resdet.processes import Processes
from resdet.types import Category, Detections, Prediction, Target

Detect = Callable[[Sequence[Tensor], str], list[Prediction]]
"""Takes uint8 images ``[3, H, W]`` and what to call them in messages; gives their detections, on the CPU."""


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a dataset.

    Attributes:
        coco: COCO's metrics.
        voc: VOC's metrics at IoU 0.5.
        detections: What the model found, images in the dataset's order, by falling score in each.
        score_threshold: The score from which showing its detections gives the best F1 at IoU 0.5, all classes pooled;
            None where it found nothing right.
    """

    coco: CocoMetrics
    voc: VocMetrics
    detections: Detections
    score_threshold: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """COCO's ``AP``, ``AP50``, ... and VOC's ``voc_AP50``, ``voc_AP50_11point`` by name; -1 is undefined."""
        return self.coco.as_dict() | self.voc.as_dict()

    @property
    def per_class(self) -> tuple[ClassMetrics, ...]:
        """COCO's rows per class, in the dataset's label order."""
        return self.coco.per_class


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> Evaluation:
    """Run a model over a dataset and measure it.

    A dataset may list the model's classes in another order: they are matched by name.

    Args:
        model: A ``Detector``, or any of torchvision's ``FasterRCNN`` (which has no class names: its number of classes
            is compared, and its labels are taken to be the dataset's).
        dataset: Images and ground truth: a dataset, or a ``Subset`` of one (of a ``Subset``, ...), which counts as the
            dataset of its images: repeated indices are images of their own. Detections refer to the table of
            ``without_subset(dataset)``.
        settings: How to run the model.
        team: The processes that share the work, each of which must call this and gets the whole result; None: this
            process alone. Where it computes is up to ``settings``.

    Raises:
        DataError: If model and dataset do not have the same classes, or there is no image.
        WeightsError: If the model computes NaN or infinity.
        UserError: If this model does not support ``settings.tricks``.
    """
    dataset = without_subset(dataset)
    labels = match_labels(model, dataset.table)
    found = detect(model, dataset, settings, team)
    if labels is not None:
        found = Detections(found.image_index, found.boxes, labels[found.labels], found.scores)
    return Evaluation(
        coco_metrics(dataset.table, found),
        voc_metrics(dataset.table, found),
        found,
        best_score_threshold(dataset.table, found),
    )


def detect(
    model: nn.Module,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> Detections:
    """Run a model over every image of a dataset, each once.

    The model's training flags and the random states of torch, NumPy and Python are afterwards what they were.

    Args:
        model: As for ``evaluate``, like the others.
        dataset: Images.
        settings: How to run the model.
        team: The processes that share the work.

    Returns:
        The model's own labels; images in the dataset's order, by falling score in each.

    Raises:
        WeightsError: If the model computes NaN or infinity.
        UserError: If this model does not support ``settings.tricks``.
    """
    dataset, device = without_subset(dataset), placed(model, settings.device)
    team = team or Processes(0, 1, device)
    image_ids = dataset.table.image_ids
    seen: list[int] = []
    predictions: list[Prediction] = []
    with random_states_kept(device), inference(model, settings) as run:
        loader = eval_loader(
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            rank=team.rank,
            world_size=team.world_size,
        )
        num_images = len(range(team.rank, len(image_ids), team.world_size))
        with tqdm(total=num_images, unit="image", disable=not settings.progress or not team.is_main) as bar:
            for batch in loader:
                where = f"image_id={image_ids[batch.indices].tolist()} of {dataset.table.name}"
                predictions += run(batch.images, where)
                seen += batch.indices
                bar.update(len(batch.indices))
    shares, parts = zip(*team.gather((seen, _rows(seen, predictions))), strict=True)
    assert sorted(index for share in shares for index in share) == list(range(len(image_ids)))
    image_index, boxes, labels, scores = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(image_index, kind="stable")
    return Detections(image_index[order], boxes[order], labels[order], scores[order])


@contextmanager
def inference(model: nn.Module, settings: InferenceSettings = InferenceSettings()) -> Iterator[Detect]:
    """Put a model into evaluation mode and yield a function that runs it on uint8 images.

    Every module's training flag is restored at the end. Gradients are off inside that function only, and by
    ``no_grad``: tensors that a model caches in ``inference_mode`` could not take part in training afterwards.

    Args:
        model: A torchvision ``FasterRCNN``.
        settings: ``device``, ``precision`` and ``tricks`` count here.

    Raises:
        UserError: By the yielded function, if this model does not support ``settings.tricks``.
        WeightsError: By the yielded function, if the model computes NaN or infinity. Thresholds drop such boxes, so
            without a look at what comes before them a diverged model would pass for one that finds nothing.
    """
    device, precision, tricks = placed(model, settings.device), settings.precision, settings.tricks
    if device.type == "cpu":
        keep_freed_memory()
    finite: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: Any, outputs: Sequence[Tensor | Sequence[Tensor]]) -> None:
        for output in outputs:
            finite.extend(torch.isfinite(part).all() for part in ([output] if isinstance(output, Tensor) else output))

    @torch.no_grad()
    def run(images: Sequence[Tensor], where: str) -> list[Prediction]:
        finite.clear()
        batch = [image.to(device, non_blocking=True).float() / 255 for image in images]
        with autocast(device, precision):
            outputs = model(batch) if tricks is None else detect_with_tricks(model, batch, tricks)
        finite.extend(torch.isfinite(output[key]).all() for output in outputs for key in ("boxes", "scores"))
        if finite and not torch.stack(finite).all():
            raise WeightsError(f"the model computes NaN or infinity on {where} ({suspect(model, precision)})")
        return [
            Prediction(
                boxes=output["boxes"].float().cpu(),
                labels=output["labels"].cpu(),
                scores=output["scores"].float().cpu(),
            )
            for output in outputs
        ]

    watched = [name for name in ("rpn.head", "roi_heads.box_predictor") if _has_submodule(model, name)]
    handles = [model.get_submodule(name).register_forward_hook(watch) for name in watched]
    try:
        with evaluation_mode(model):
            yield run
    finally:
        for handle in handles:
            handle.remove()


def model_categories(model: nn.Module) -> tuple[Category, ...]:
    """Give a detector's classes, or none for a model that does not know them (torchvision's own)."""
    categories: tuple[Category, ...] = getattr(model, "categories", ())
    return tuple(categories)


def match_labels(model: nn.Module, table: AnnotationTable) -> npt.NDArray[np.int64] | None:
    """Give the dataset's label for each of the model's, int64 ``[K + 1]``, or None where they are the same.

    Classes are matched by name; a model that knows no names (torchvision's own) by their number.

    Raises:
        DataError: If model and dataset do not have the same classes.
    """
    ours, theirs = model_categories(model), table.categories
    if not ours:
        predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
        num_classes = getattr(getattr(predictor, "cls_score", None), "out_features", table.num_classes)
        if num_classes != table.num_classes:
            raise DataError(
                f"the model has {num_classes} classes, background included, and {table.name} has {table.num_classes}: "
                "they must agree (a torchvision model of 91 classes is trained on COCO's category ids, not on labels)"
            )
        return None
    label_of = {category.name: category.label for category in theirs}
    names = {category.name for category in ours}
    missing = [category.name for category in theirs if category.name not in names]
    unknown = [category.name for category in ours if category.name not in label_of]
    if missing or unknown:
        raise DataError(
            f"model and dataset must have the same classes: only {table.name} has {_listed(missing)}; "
            f"only the model has {_listed(unknown)}"
        )
    if all(label_of[category.name] == category.label for category in ours):
        return None
    labels = np.zeros(len(ours) + 1, dtype=np.int64)
    for category in ours:
        labels[category.label] = label_of[category.name]
    return labels


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def suspect(model: nn.Module, precision: Precision) -> str:
    """Say where NaN or infinity may come from."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"its {name} is not finite: training diverged"
    return (
        "its weights are finite: fp16 ends at 65504, try bf16 or fp32"
        if precision == "fp16"
        else "its weights are finite"
    )


def _rows(
    indices: Sequence[int], predictions: Sequence[Prediction]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Give predictions as the four columns of ``Detections``."""
    counts = [len(prediction["scores"]) for prediction in predictions]
    return (
        np.repeat(np.asarray(indices, dtype=np.int64), counts),
        torch.cat([torch.empty(0, 4), *(prediction["boxes"] for prediction in predictions)]).double().numpy(),
        torch.cat([torch.empty(0).long(), *(prediction["labels"] for prediction in predictions)]).numpy(),
        torch.cat([torch.empty(0), *(prediction["scores"] for prediction in predictions)]).double().numpy(),
    )


def _has_submodule(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules())
