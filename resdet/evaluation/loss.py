"""The losses of training on data that is not trained on."""

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
from resdet.evaluation.detect import match_labels, suspect
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.state import evaluation_mode, placed, random_states_kept, seed_torch
from resdet.precision import autocast
from resdet.processes import Processes
from resdet.types import Target, target_to

_PARTS = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    dataset: DetectionDataset | Subset[tuple[Tensor, Target]],
    settings: InferenceSettings = InferenceSettings(),
    team: Processes | None = None,
) -> dict[str, float]:
    """Compute the losses of training on every image of a dataset, each once, without changing anything of the model.

    Norms and sizes of images are those of evaluation; proposals, their number too, and what the losses are taken over
    are those of training. Boxes are drawn at random for the losses as in training, but for each image the same ones
    every time, whatever is evaluated beside it. Parameters, buffers, gradients, training flags and random states are
    afterwards bit for bit what they were.

    Targets are the dataset's: crowd regions and, unless it uses them, difficult objects are background.

    Args:
        model: A ``Detector`` or any of torchvision's ``FasterRCNN``.
        dataset: Images and ground truth, as for ``evaluate``; classes are matched by name.
        settings: How to run the model; ``tricks`` and ``progress`` have no effect.
        team: The processes that share the work, as for ``evaluate``. The result has the same bits as that of one
            process if ``batch_size`` is 1; otherwise other images are padded together.

    Returns:
        ``val_loss``, and the four it is the sum of: ``val_loss_classifier``, ``val_loss_box_reg``,
        ``val_loss_objectness``, ``val_loss_rpn_box_reg``. Means over images, each of which counts the same; those
        without objects count too.

    Raises:
        DataError: If model and dataset do not have the same classes.
        UserError: If the model is no ``FasterRCNN``.
        WeightsError: If the losses of an image are NaN or infinite.
    """
    if not isinstance(model, FasterRCNN):
        raise UserError(
            f"the validation loss is that of torchvision's FasterRCNN or a subclass, got {type(model).__name__}"
        )
    dataset, device = without_subset(dataset), placed(model, settings.device)
    team = team or Processes(0, 1, device)
    image_ids = dataset.table.image_ids
    labels = match_labels(model, dataset.table)
    own_label = None if labels is None else torch.from_numpy(np.argsort(labels))
    seen: list[int] = []
    losses: list[Tensor] = []
    with random_states_kept(device), evaluation_mode(model):
        # torchvision's parts compute losses where their own flag says so; those of the layers in them stay off.
        model.rpn.training = model.roi_heads.training = True
        loader = eval_loader(
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            rank=team.rank,
            world_size=team.world_size,
        )
        for batch in loader:
            images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
            targets = batch.targets
            if own_label is not None:
                targets = [Target(**{**target, "labels": own_label[target["labels"]]}) for target in targets]
            seeds = image_ids[batch.indices].tolist()
            with autocast(device, settings.precision):
                losses += _losses(model, images, [target_to(target, device) for target in targets], seeds)
            seen += batch.indices
    own = torch.stack(losses).double().cpu().numpy() if losses else np.empty((0, len(_PARTS)))
    all_seen, all_losses = zip(*team.gather((seen, own)), strict=True)
    indices, values = np.concatenate(all_seen).astype(np.int64), np.concatenate(all_losses)
    assert sorted(indices.tolist()) == list(range(len(image_ids)))
    # In the dataset's order, so that the sum does not depend on who did what.
    values = values[np.argsort(indices)]
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if broken.size:
        raise WeightsError(
            f"the validation loss is NaN or infinite on image_id={image_ids[broken[:10]].tolist()} of "
            f"{dataset.table.name} ({suspect(model, settings.precision)})"
        )
    means = dict(zip(_PARTS, values.mean(axis=0).tolist(), strict=True))
    return {"val_loss": sum(means.values()), **{f"val_{name}": value for name, value in means.items()}}


def _losses(
    model: FasterRCNN, images: Sequence[Tensor], targets: Sequence[Target], seeds: Sequence[int]
) -> list[Tensor]:
    """Give the four losses of each image, float32 ``[4]``.

    The heads take one image at a time: torchvision's losses of several are means over all boxes drawn of them, in which
    an image counts by how many were, and what is drawn for one depends on those before it.
    """
    batch, scaled = model.transform(list(images), list(targets))
    features = model.backbone(batch.tensors)
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
