"""From a classifier and images to the share of right answers.

Legend: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from resdet.classification.data import LabelledImages
from resdet.classification.loader import eval_loader
from resdet.classification.model import ImageClassifier, match_classes
from resdet.errors import WeightsError
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed
from resdet.precision import autocast
from resdet.processes import Processes


@dataclass(frozen=True)
class ClassifierMetrics:
    """How good a classifier is on some images.

    Attributes:
        num_images: Number of images.
        top1: Share of images whose class has the highest probability, in [0, 1].
        top5: Share of images whose class is among the five of highest probability (or all, of fewer classes).
        loss: Mean of the cross entropy of the averaged probabilities.
    """

    num_images: int
    top1: float
    top5: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """Return the metrics under the names of the log."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss}


def probabilities(classifier: ImageClassifier, views: Sequence[Tensor], *, dense: bool = False) -> Tensor:
    """Compute the class probabilities of images seen in several views: the mean over the views.

    Args:
        classifier: In evaluation mode.
        views: uint8 ``[B, 3, H, W]`` each, on the network's device: the same view of all images.
        dense: Classify every window of each view, not the view as a whole (``ImageClassifier.dense_scores``).

    Returns:
        float32 ``[B, K]``.
    """
    scores = classifier.dense_scores if dense else classifier.network
    total: Tensor | None = None
    for view in views:
        answer = scores(classifier.normalise(view)).float().softmax(1)  # [B, K]
        total = answer if total is None else total + answer
    assert total is not None
    return total / len(views)


@torch.no_grad()
def evaluate_classifier(
    classifier: ImageClassifier,
    images: LabelledImages,
    settings: InferenceSettings = InferenceSettings(batch_size=64),
    team: Processes | None = None,
    *,
    views: str = "single",
    resize: int | None = None,
    scales: Sequence[int] = (224, 256, 384, 480, 640),
) -> ClassifierMetrics:
    """Run a classifier over images and count its right answers.

    The images may have part of the classifier's classes, or list them in another order: they are matched by name
    (``match_classes``); the classifier still chooses among all of its own.

    Args:
        classifier: The model; its training flags are restored afterwards.
        images: Images and their classes.
        settings: How to run it; ``tricks`` have no effect, and dense views go through one by one.
        team: The processes that share the work, each of which must call this and gets the whole result; None: this
            process alone.
        views: ``single`` (the centre), ``ten_crop`` (corners and centre, flipped too) or ``dense`` (everything, at
            several scales, flipped too).
        resize: Length of the short side before cropping; None: ``spec.image_size``.
        scales: dense: lengths of the short side.

    Raises:
        DataError: If the images have a class that the classifier does not have, or one cannot be read.
        WeightsError: If the classifier computes NaN or infinity.
    """
    network, size = classifier.network, classifier.spec.image_size
    device = placed(network, settings.device)
    team = Processes(0, 1, device) if team is None else team
    label_of = torch.from_numpy(match_classes(images.classes, classifier.classes, where=images.name))
    batches = eval_loader(
        images,
        team,
        views=views,
        resize=resize or size,
        size=size,
        scales=scales,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
    )
    sums = torch.zeros(4, dtype=torch.float64)  # images, right answers, right among five, losses
    num_images = len(range(team.rank, len(images), team.world_size))
    with (
        evaluation_mode(network),
        tqdm(total=num_images, unit="image", disable=not settings.progress or not team.is_main) as bar,
    ):
        for batch in batches:
            with autocast(device, settings.precision):
                seen = [view.to(device, non_blocking=True) for view in batch.views]
                answers = probabilities(classifier, seen, dense=views == "dense").cpu()  # waits for the device
            if not answers.isfinite().all():
                raise WeightsError(
                    f"the classifier computes NaN or infinity for {images.pictures.name(batch.indices[0])} "
                    "or an image of its batch: its weights are damaged, or the precision does not hold them"
                )
            sums += _sums(answers, label_of[batch.labels])
            bar.update(len(batch.indices))
    total, top1, top5, loss = torch.stack(team.gather(sums)).sum(0).tolist()
    return ClassifierMetrics(int(total), top1 / total, top5 / total, loss / total)


def _sums(answers: Tensor, labels: Tensor) -> Tensor:
    """Return number, right answers, right ones among five, and sum of losses of probabilities, float64 ``[4]``."""
    best = answers.topk(min(5, answers.shape[1]), dim=1).indices  # [B, 5]
    right = best == labels[:, None]
    of_class = answers.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    parts = [len(labels), right[:, 0].sum(), right.any(1).sum(), -of_class.log().sum()]
    return torch.tensor(parts, dtype=torch.float64)
