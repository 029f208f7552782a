"""Images and targets on their way from host memory into a detector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resdet.devices import send
from resdet.models.detector import Detector
from resdet.models.padded import is_padded
from resdet.models.transform import PilTransform
from resdet.types import Target, target_to


def model_images(model: nn.Module, images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return uint8 images ``[3, H, W]`` in host memory as a detector on ``device`` takes them.

    A detector that runs padded takes bytes: it makes them floats where it scales them. Others take floats in [0, 1].
    """
    if _runs_padded(model, device) and not isinstance(getattr(model, "transform", None), PilTransform):
        return send_whole(images, device)
    return transform_images(model, images, device)


def transform_images(model: nn.Module, images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return uint8 images ``[3, H, W]`` in host memory as the detector's transform on ``device`` takes them."""
    if isinstance(getattr(model, "transform", None), PilTransform):
        # Those of training have their size from the data workers; others are resized on the host first.
        return send_whole(images, device) if model.training else list(images)
    return [image.float().div_(255) for image in send_whole(images, device)]  # in [0, 1]


def model_targets(model: nn.Module, targets: Sequence[Target], device: torch.device) -> list[Target]:
    """Return targets in host memory as a detector on ``device`` takes them.

    One that runs padded copies them itself, all in two tensors.
    """
    if _runs_padded(model, device):
        return list(targets)
    return [target_to(target, device) for target in targets]


def send_whole(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return images on a device, without waiting; those that are parts of one batch's memory are copied at once.

    It is found out by their addresses, so that a batch that was cut into pieces needs nothing else.
    """
    whole = _whole(images) if len(images) > 1 else None
    if whole is None or whole.device == device:
        return [send(image, device) for image in images]
    sent, first = send(whole, device), whole.storage_offset()
    return [sent[i.storage_offset() - first :][: i.numel()].view(i.shape) for i in images]


def _whole(images: Sequence[Tensor]) -> Tensor | None:
    """Return the flat tensor that holds just these images side by side, in any order; None if there is none."""
    storage = images[0].untyped_storage().data_ptr()
    for image in images:
        if image.untyped_storage().data_ptr() != storage or not image.is_contiguous() or image.dtype != images[0].dtype:
            return None
    spans = sorted((image.storage_offset(), image.numel()) for image in images)
    if any(start + size != after for (start, size), (after, _) in itertools.pairwise(spans)):
        return None
    (start, _), (last, size) = spans[0], spans[-1]
    return images[0].as_strided((last + size - start,), (1,), start)


def _runs_padded(model: nn.Module, device: torch.device) -> bool:
    return isinstance(model, Detector) and is_padded(model, device)
