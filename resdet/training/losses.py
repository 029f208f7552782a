"""The losses of a detector on a batch of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resdet.data.loader import Batch
from resdet.models.detector import Detector
from resdet.models.inputs import model_images, model_targets
from resdet.models.seeded import image_seeds
from resdet.precision import Precision, autocast


def detection_losses(model: Detector, parallel: nn.Module, batch: Batch, precision: Precision) -> dict[str, Tensor]:
    """Compute the losses of a batch in host memory, whose pixels travel to the device in one copy.

    ``parallel`` is the detector or its wrapper for several processes; losses are float32, whatever the precision.
    Returns ``loss``, the losses it is the sum of, and what the detector counted, means over the batch's images.
    """
    device = next(model.parameters()).device
    images = model_images(model, batch.images, device)  # [3, H, W] each; the detector resizes, pads and stacks
    targets = model_targets(model, batch.targets, device)
    with autocast(device, precision), image_seeds(model, batch.seeds):
        losses: dict[str, Tensor] = parallel(images, targets)
    loss = torch.stack(list(losses.values())).sum()
    return {"loss": loss, **losses, **model.training_counts()}
