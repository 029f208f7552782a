"""From a model and images to detections, and from a dataset's detections to its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from resdet.data.annotations import AnnotationTable
from resdet.data.dataset import DetectionDataset, without_subset
from resdet.data.loader import eval_loader
from resdet.data.torch_datasets import wrap_dataset
from resdet.evaluation.coco import MAX_DETECTIONS, ClassMetrics, CocoMetrics, coco_metrics
from resdet.evaluation.curves import best_score_threshold
from resdet.evaluation.inference import inference
from resdet.evaluation.labels import label_names, match_labels, with_model_classes
from resdet.evaluation.reference import Reference, reference_of
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import placed
from resdet.evaluation.voc import VocMetrics, voc_metrics
from resdet.processes import Processes
from resdet.random_states import random_states_kept
from resdet.types import Detections, Floats, Ints, Prediction, Target


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a dataset."""

    coco: CocoMetrics
    voc: VocMetrics  # at IoU 0.5
    detections: Detections  # images in the dataset's order, by falling score in each
    # The score from which showing detections gives the best F1 at IoU 0.5, all classes pooled; None if none is right.
    score_threshold: float | None
    reference: Reference | None = None  # pycocotools' numbers, of a final evaluation

    @property
    def metrics(self) -> dict[str, float]:
        """COCO's ``AP``, ``AP50``, ... and VOC's ``voc_AP50``, ``voc_AP50_11point`` by name; -1 is undefined.

        ``AR_100`` bears the number of ``max_detections``, where that is another.
        """
        return self.coco.as_dict() | self.voc.as_dict()

    @property
    def per_class(self) -> tuple[ClassMetrics, ...]:
        """COCO's rows per class, in the dataset's label order."""
        return self.coco.per_class

    def with_reference(self, table: AnnotationTable) -> Evaluation:
        """Return this evaluation, measured on ``table``, with the numbers that pycocotools computes (``Reference``)."""
        return replace(self, reference=reference_of(self.coco, table, self.detections))


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> Evaluation:
    """Run a model over a dataset and measure it.

    A dataset may list the model's classes in another order, with other ids, or only some of them: they are matched by
    name. Classes of the model that the dataset lacks have labels above the dataset's own (``with_model_classes``);
    their metrics are -1 and stay out of the means.

    Args:
        model: A ``Detector``, or any of torchvision's ``FasterRCNN`` (which has no class names: its number of classes
            is compared, and its labels are taken to be the dataset's).
        dataset: Images and ground truth: a dataset, or a ``Subset`` of one (of a ``Subset``, ...), which counts as the
            dataset of its images: repeated indices are images of their own. Detections refer to the table of
            ``without_subset(dataset)``. Any other dataset of ``(image, target)`` is read twice, first by
            ``wrap_dataset``, whose result may be given instead; without class names its labels are the model's.
        settings: How to run the model.
        team: The processes that share the work, each of which must call this and gets the whole result; None: this
            process alone. Where it computes is up to ``settings``.

    Raises:
        DataError: If the dataset has a class that the model does not have, or there is no image.
        WeightsError: If the model computes NaN or infinity.
        UserError: If this model does not support ``settings.tricks``, or ``settings.tiles`` are no tiles.
    """
    team = team or Processes(0, 1, placed(model, settings.device))
    wrapped = wrap_dataset(dataset, unnamed=label_names(model), num_workers=settings.num_workers, team=team)
    dataset = with_model_classes(model, wrapped)
    table, labels = dataset.table, match_labels(model, dataset.table)
    found = detect(model, dataset, settings, team)
    if labels is not None:
        matched = labels[found.labels]
        kept = matched > 0
        found = Detections(found.image_index[kept], found.boxes[kept], matched[kept], found.scores[kept])
    limit = MAX_DETECTIONS if settings.max_detections is None else settings.max_detections
    coco = coco_metrics(table, found, max_detections=limit)
    return Evaluation(coco, voc_metrics(table, found), found, best_score_threshold(table, found))


def detect(
    model: nn.Module,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> Detections:
    """Run a model over every image of a dataset, each once; arguments and errors are as for ``evaluate``.

    Detections have the model's own labels; images are in the dataset's order, by falling score in each. The model's
    training flags and the random states of torch, NumPy and Python are restored.
    """
    dataset, device = without_subset(dataset), placed(model, settings.device)
    team = team or Processes(0, 1, device)
    image_ids = dataset.table.image_ids
    seen: list[int] = []
    predictions: list[Prediction] = []
    num_images = len(range(team.rank, len(image_ids), team.world_size))
    with (
        random_states_kept(device),
        inference(model, settings) as run,
        tqdm(total=num_images, unit="image", disable=not settings.progress or not team.is_main) as bar,
    ):
        for batch in eval_loader(dataset, team, batch_size=settings.num_images_read, num_workers=settings.num_workers):
            where = f"image_id={image_ids[batch.indices].tolist()} of {dataset.table.name}"
            predictions += run(batch.images, where)
            seen += batch.indices
            bar.update(len(batch.indices))
    shares, columns = zip(*team.gather((seen, _columns(seen, predictions))), strict=True)
    assert sorted(index for share in shares for index in share) == list(range(len(image_ids)))
    image_index, boxes, labels, scores = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.argsort(image_index, kind="stable")
    return Detections(image_index[order], boxes[order], labels[order], scores[order])


def _columns(indices: Sequence[int], predictions: Sequence[Prediction]) -> tuple[Ints, Floats, Ints, Floats]:
    """Return the predictions of images as the four columns of ``Detections``: the one conversion to float64."""
    counts = [len(prediction["scores"]) for prediction in predictions]
    return (
        np.repeat(np.asarray(indices, dtype=np.int64), counts),  # [D]
        torch.cat([torch.empty(0, 4), *(prediction["boxes"] for prediction in predictions)]).double().numpy(),  # [D, 4]
        torch.cat([torch.empty(0).long(), *(prediction["labels"] for prediction in predictions)]).numpy(),  # [D]
        torch.cat([torch.empty(0), *(prediction["scores"] for prediction in predictions)]).double().numpy(),  # [D]
    )
