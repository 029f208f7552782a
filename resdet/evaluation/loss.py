"""The training losses on data that is not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from resdet.data.dataset import DetectionDataset, without_subset
from resdet.data.loader import eval_loader
from resdet.errors import UserError, WeightsError
from resdet.evaluation.inference import suspect
from resdet.evaluation.labels import match_labels, with_model_classes
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed
from resdet.models.inputs import transform_images
from resdet.precision import autocast
from resdet.processes import Processes
from resdet.random_states import random_states_kept, seed_torch
from resdet.types import Target, target_to

_PARTS = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> dict[str, float]:
    """Compute the training losses on every image of a dataset, each once, without changing anything of the model.

    Norms and image sizes are those of evaluation; proposals, their number too, and the samples that the losses are
    taken over are those of training. Boxes are sampled at random as in training, but from a seed of each image: the
    same boxes every time, whatever else is in the batch. Parameters, buffers, gradients, training flags and random
    states are afterwards bit for bit what they were.

    Targets are the dataset's: crowd regions and, unless it uses them, difficult objects are background. Arguments and
    errors are as for ``evaluate``, but the model must be a ``FasterRCNN``, and ``settings.tricks`` and
    ``settings.progress`` have no effect. Several processes get the bits of one if ``batch_size`` is 1; otherwise other
    images are padded together.

    Returns:
        ``val_loss``, and the four it is the sum of: ``val_loss_classifier``, ``val_loss_box_reg``,
        ``val_loss_objectness``, ``val_loss_rpn_box_reg``. Means over images, each of which counts the same; those
        without objects count too.
    """
    if not isinstance(model, FasterRCNN):
        raise UserError(f"the validation loss needs torchvision's FasterRCNN or a subclass, got {type(model).__name__}")
    dataset, device = with_model_classes(model, without_subset(dataset)), placed(model, settings.device)
    team = team or Processes(0, 1, device)
    own = _losses_of_images(model, dataset, settings, team, device)
    losses = dict(pair for share in team.gather(own) for pair in share)
    image_ids = dataset.table.image_ids
    # In the dataset's order, so that the sum does not depend on which process had which image.
    values = np.array([losses[index] for index in range(len(image_ids))])  # [I, 4]
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if broken.size:
        raise WeightsError(
            f"the validation loss is NaN or infinite on image_id={image_ids[broken[:10]].tolist()} of "
            f"{dataset.table.name} ({suspect(model, settings.precision)})"
        )
    means = dict(zip(_PARTS, values.mean(axis=0).tolist(), strict=True))
    return {"val_loss": sum(means.values()), **{f"val_{name}": value for name, value in means.items()}}


def _losses_of_images(
    model: FasterRCNN, dataset: DetectionDataset, settings: InferenceSettings, team: Processes, device: torch.device
) -> list[tuple[int, list[float]]]:
    """Return the row and the four losses of each image of this process's share."""
    table = dataset.table
    image_ids, labels = table.image_ids, match_labels(model, table)
    # The model's label by the dataset's; several of the model's are 0 where it has placeholders, and no target is.
    own_label = None if labels is None else torch.from_numpy(np.argsort(labels)[-table.num_classes :])
    seen: list[int] = []
    losses: list[Tensor] = []
    with random_states_kept(device), evaluation_mode(model):
        # torchvision's parts compute losses if their own flag is set; the flags of the layers in them stay off.
        model.rpn.training = model.roi_heads.training = True
        for batch in eval_loader(dataset, team, batch_size=settings.batch_size, num_workers=settings.num_workers):
            images = transform_images(model, batch.images, device)
            targets = batch.targets
            if own_label is not None:
                targets = [Target(**{**target, "labels": own_label[target["labels"]]}) for target in targets]
            seeds = image_ids[batch.indices].tolist()
            with autocast(device, settings.precision):
                losses += _losses(model, images, [target_to(target, device) for target in targets], seeds)
            seen += batch.indices
    values = torch.stack(losses).double().tolist() if losses else []  # [n, 4]; waits for the device
    return list(zip(seen, values, strict=True))


def _losses(
    model: FasterRCNN, images: Sequence[Tensor], targets: Sequence[Target], seeds: Sequence[int]
) -> list[Tensor]:
    """Return the four losses of each image, float32 ``[4]``.

    The heads take one image at a time. On several, torchvision averages over the boxes sampled in all of them, so that
    images with more samples weigh more and the samples of one depend on the images before it.
    """
    batch, scaled = model.transform(list(images), list(targets))  # [B, 3, H, W], padded
    features = model.backbone(batch.tensors)  # a level: [B, C, h, w]
    if isinstance(features, Tensor):
        features = {"0": features}
    losses = []
    for i, seed in enumerate(seeds):
        seed_torch(seed, batch.tensors.device)
        one, target = ImageList(batch.tensors[i : i + 1], batch.image_sizes[i : i + 1]), scaled[i : i + 1]
        levels = {name: level[i : i + 1] for name, level in features.items()}
        proposals, of_rpn = model.rpn(one, levels, target)
        _, of_boxes = model.roi_heads(levels, proposals, one.image_sizes, target)
        values = {**of_rpn, **of_boxes}
        losses.append(torch.stack([values[name].float() for name in _PARTS]))
    return losses
