"""From a classifier and images to the share of right answers.

Legend: ``B`` images, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from resdet.classification.data import LabelledImages
from resdet.classification.loader import eval_loader
from resdet.classification.model import ImageClassifier, match_classes
from resdet.errors import WeightsError
from resdet.precision import Precision, autocast


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
        """Give the numbers as they are logged."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss}


def probabilities(classifier: ImageClassifier, views: Sequence[Tensor], *, dense: bool = False) -> Tensor:
    """Give what a classifier thinks of images that it sees in several views: the mean of its probabilities.

    Args:
        classifier: In evaluation mode.
        views: uint8 ``[B, 3, H, W]`` each, on the network's device: the same view of all images.
        dense: Look at all places of each view, not at the whole of it (``ImageClassifier.dense_scores``).

    Returns:
        float32 ``[B, K]``.
    """
    scores = classifier.dense_scores if dense else classifier.network
    total: Tensor | None = None
    for view in views:
        answer = scores(classifier.normalise(view)).float().softmax(1)
        total = answer if total is None else total + answer
    assert total is not None
    return total / len(views)


@torch.no_grad()
def evaluate_classifier(
    classifier: ImageClassifier,
    images: LabelledImages,
    *,
    views: str = "single",
    resize: int | None = None,
    scales: Sequence[int] = (224, 256, 384, 480, 640),
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "fp32",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> ClassifierMetrics:
    """Run a classifier over images and count its right answers.

    The images may have part of the classifier's classes, or list them in another order: they are matched by name
    (``match_classes``); the classifier still chooses among all of its own.

    Args:
        classifier: The model; where its network is, is computed. Its training flag is afterwards what it was.
        images: Images and their classes.
        views: ``single`` (the centre), ``ten_crop`` (corners and centre, flipped too) or ``dense`` (everything, at
            several scales, flipped too).
        resize: Length of the short side before cropping; None: ``spec.image_size``.
        scales: dense: lengths of the short side.
        batch_size: Images per forward pass; 1 if dense.
        num_workers: Processes that read images; 0 reads them in this one.
        precision: fp32, or autocast to bf16 or fp16.
        rank: This process's number.
        world_size: Processes that share the work; each must call this, and each is given the whole result.
        progress: Show a progress bar on standard error (rank 0).

    Raises:
        DataError: If the images have a class that the classifier has not, or one cannot be read.
        WeightsError: If the classifier answers with NaN or infinity.
    """
    network = classifier.network
    device = next(network.parameters()).device
    label_of = torch.from_numpy(match_classes(images.classes, classifier.classes, where=images.name))
    size = classifier.spec.image_size
    batches = eval_loader(
        images,
        views=views,
        resize=resize or size,
        size=size,
        scales=scales,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        rank=rank,
        world_size=world_size,
    )
    sums = torch.zeros(4, dtype=torch.float64)
    training = network.training
    network.eval()
    try:
        with tqdm(
            total=len(range(rank, len(images), world_size)), unit="image", disable=not progress or rank > 0
        ) as bar:
            for batch in batches:
                with autocast(device, precision):
                    seen = [view.to(device, non_blocking=True) for view in batch.views]
                    answers = probabilities(classifier, seen, dense=views == "dense").cpu()
                labels = label_of[batch.labels]
                if not answers.isfinite().all():
                    raise WeightsError(
                        f"the classifier answers with NaN or infinity to {images.pictures.name(batch.indices[0])} "
                        "or an image of its batch: its weights are damaged, or the precision does not hold them"
                    )
                best = answers.topk(min(5, answers.shape[1]), dim=1).indices
                right = best == labels[:, None]
                of_class = answers.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
                sums += torch.tensor(
                    [len(labels), right[:, 0].sum(), right.any(1).sum(), -of_class.log().sum()], dtype=torch.float64
                )
                bar.update(len(labels))
    finally:
        network.train(training)
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    num_images, *totals = sums.tolist()
    top1, top5, loss = np.array(totals) / num_images
    return ClassifierMetrics(int(num_images), float(top1), float(top5), float(loss))
