"""The transform of images into the network's input with Pillow's resize, as detectron2 has it.

Pillow works on the host, so images are resized before they are copied to the device: those of training by the data
workers (``host_resize``), others by the transform itself, which takes uint8 images on the CPU (``models/inputs.py``): a
detector scales boxes back to the size of the images that it was given, so they cannot come resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes

from resdet.devices import send
from resdet.errors import UserError
from resdet.models.seeded import SeededTransform, choose_size, size_generator
from resdet.models.tracing import is_captured
from resdet.types import HostResize, Target


class PilTransform(SeededTransform):
    """torchvision's transform with the resize that detectron2's models were trained on.

    torchvision normalises first and then interpolates float pixels between their four neighbours, so a picture that is
    made smaller skips pixels. Here Pillow scales the picture in 8 bits with its antialiasing bilinear filter, and the
    result is normalised. The new size differs too, by up to a pixel: sides are rounded to the nearest, torchvision
    rounds them down. An image that has its new size already, because a data worker has resized it, is only normalised.

    Images are uint8 on the CPU, which are resized there and then moved to the model's device, or floats in [0, 1].
    Floats are rounded to whole 255ths; those on another device than the CPU travel to the CPU and back.

    It runs in Python alone: TorchScript, tracing, ``torch.compile`` and ``torch.export`` of a whole detector need
    ``resize="torch"``; its backbone is free of this.

    Raises:
        UserError: When it is scripted, traced or exported.

    Source: detectron2's ``ResizeShortestEdge`` and ``ResizeTransform`` (``data/transforms``), of which only the case
        of 8-bit images of three channels is here.
    """

    _marker: Tensor

    def __init__(self, min_size: int | tuple[int, ...], max_size: int, mean: list[float], std: list[float]) -> None:
        super().__init__(min_size, max_size, mean, std)
        self.register_buffer("_marker", torch.zeros(1, dtype=torch.uint8), persistent=False)  # is on the model's device

    def normalize(self, image: Tensor) -> Tensor:
        """Return the image as it is: torchvision's forward calls this first, and here the resize normalises."""
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, or floating point in [0, 1], got {image.dtype}")
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale ``[3, H, W]``, uint8 or floats in [0, 1], and the boxes of its target, then normalise it."""
        if is_captured():
            raise UserError(NOT_EXPORTABLE)
        height, width = image.shape[-2:]
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        size = scaled_size(height, width, shorter, self.max_size)
        device, dtype = self._marker.device, torch.float32
        if image.is_floating_point():
            device, dtype = image.device, image.dtype
            image = image.mul(255).round().clamp(0, 255).to(torch.uint8)
        if size != (height, width):
            image = _resized(image.cpu(), size)  # waits for the device, if the image is on one
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], (height, width), size)
        return super().normalize(send(image, device).to(dtype) / 255), target

    def pad(self, images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[tuple[int, int]]]:
        """Resize on the host what is there, and batch; see ``SeededTransform.pad``."""
        batch, _ = self(list(images))
        return batch.tensors, batch.image_sizes

    def __prepare_scriptable__(self) -> PilTransform:
        raise UserError(NOT_EXPORTABLE)


def host_resize(model: nn.Module) -> HostResize | None:
    """Return the resize that data workers apply to a detector's training images; None if its transform does it.

    The size is the one that the transform draws in ``image_seeds``, so the transform then finds nothing left to do.
    """
    transform = getattr(model, "transform", None)
    if not isinstance(transform, PilTransform):
        return None
    return partial(_resize_for_training, tuple(transform.min_size), transform.max_size)


def _resize_for_training(
    min_sizes: tuple[int, ...], max_size: int, image: Tensor, target: Target, seed: int
) -> tuple[Tensor, Target]:
    height, width = image.shape[-2:]
    size = scaled_size(height, width, choose_size(min_sizes, size_generator(seed)), max_size)
    boxes = resize_boxes(target["boxes"], (height, width), size)
    return _resized(image, size), Target(boxes=boxes, labels=target["labels"], image_id=target["image_id"])


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 ``[3, H, W]`` on the CPU to ``(height, width)``."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())  # from [H, W, 3]
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def scaled_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return ``(height, width)`` with the shorter side ``min_size``, or less to keep the longer within ``max_size``.

    A size that it returned is returned again as it is: ``PilTransform`` relies on this.

    Source: ``ResizeShortestEdge.get_output_shape`` of detectron2, the same operations in the same order. Deviation: a
        side is one pixel at least.
    """
    scale = min_size / min(height, width)
    new_height, new_width = (float(min_size), scale * width) if height < width else (scale * height, float(min_size))
    longer = max(new_height, new_width)
    if longer > max_size:
        scale = max_size / longer
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


NOT_EXPORTABLE = (
    "this detector resizes images with Pillow (spec.resize='pil', as detectron2 does), which no exported program can "
    "hold: build it with resize='torch' to export it whole (scores move a little), or export its backbone"
)
