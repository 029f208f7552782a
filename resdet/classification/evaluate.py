"""From a classifier and images to the share of right answers.

Legend: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor
from tqdm import tqdm

from resdet.classification.data import LabelledImages
from resdet.classification.loader import eval_batch
from resdet.classification.model import ImageClassifier, match_classes
from resdet.classification.views import fixed_views
from resdet.data.loader import eval_keys
from resdet.data.workers import load_batches
from resdet.errors import WeightsError
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed
from resdet.precision import autocast
from resdet.processes import Processes


@dataclass(frozen=True)
class ClassifierMetrics:
    """How good a classifier is on some images."""

    num_images: int
    top1: float  # share of images whose class has the highest probability, in [0, 1]
    top5: float  # share of images whose class is among the five of highest probability (or all, of fewer classes)
    loss: float  # mean of the cross entropy of the averaged probabilities

    def as_dict(self) -> dict[str, float]:
        """Return the metrics under the names of the log."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss}


def probabilities(classifier: ImageClassifier, views: Sequence[Tensor], *, dense: bool = False) -> Tensor:
    """Compute the class probabilities ``[B, K]`` of images seen in several views: the mean over the views.

    ``views`` are uint8 ``[B, 3, H, W]`` each, on the network's device: the same view of all images. ``dense`` takes
    every window of a view (``ImageClassifier.dense_scores``), not the view as a whole.
    """
    scores = classifier.dense_scores if dense else classifier.network
    answers = (scores(classifier.normalise(view)).float().softmax(1) for view in views)  # [B, K] each
    return reduce(torch.add, answers) / len(views)


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

    ``views``, ``resize`` and ``scales`` are as in ``ClassifierEvalConfig``; ``settings.tricks`` have no effect, and
    dense views go through one by one. The processes of ``team`` (None: this one alone) share the work: each must call
    this and gets the whole result. A WeightsError is raised if the classifier computes NaN or infinity.
    """
    network, size = classifier.network, classifier.spec.image_size
    device = placed(network, settings.device)
    team = Processes(0, 1, device) if team is None else team
    label_of = torch.from_numpy(match_classes(images.classes, classifier.classes, where=images.name))
    is_dense = views == "dense"
    batch_size = 1 if is_dense else settings.batch_size  # whole images differ in size
    keys = eval_keys(len(images), batch_size, rank=team.rank, world_size=team.world_size)
    make = partial(eval_batch, images, fixed_views(views, resize=resize or size, size=size, scales=scales))
    batches = load_batches(make, keys, num_workers=settings.num_workers, device=team.device)
    sums = torch.zeros(4, dtype=torch.float64)  # images, right answers, right among five, losses
    hides_bar = not settings.progress or not team.is_main
    progress = tqdm(total=sum(map(len, keys)), unit="image", disable=hides_bar)
    with evaluation_mode(network), closing(batches), progress as bar:
        for batch in batches:
            with autocast(device, settings.precision):
                seen = [view.to(device, non_blocking=True) for view in batch.views]
                answers = probabilities(classifier, seen, dense=is_dense).cpu()  # waits for the device
            if not answers.isfinite().all():
                raise WeightsError(
                    f"the classifier computes NaN or infinity for {images.pictures.name(batch.indices[0])} "
                    "or an image of its batch: its weights are damaged, or the precision does not hold them"
                )
            labels = label_of[batch.labels][:, None]  # [B, 1]
            right = answers.topk(min(5, answers.shape[1]), dim=1).indices == labels  # [B, 5]
            losses = -answers.gather(1, labels).clamp_min(torch.finfo(torch.float32).tiny).log()  # [B, 1]
            sums += torch.tensor([len(labels), right[:, 0].sum(), right.any(1).sum(), losses.sum()], dtype=sums.dtype)
            bar.update(len(batch.indices))
    total, top1, top5, loss = torch.stack(team.gather(sums)).sum(0).tolist()
    return ClassifierMetrics(int(total), top1 / total, top5 / total, loss / total)
