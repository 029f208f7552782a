"""The transform of images into the network's input with Pillow's resize, as detectron2 has it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes

from resdet.errors import UserError
from resdet.models.seeded import SeededTransform
from resdet.models.tracing import is_captured


class PilTransform(SeededTransform):
    """torchvision's transform with the resize that detectron2's models were trained on.

    torchvision normalises first and then interpolates float pixels between their four neighbours, so a picture that is
    made smaller skips pixels. Here Pillow scales the picture in 8 bits with its antialiasing bilinear filter, and the
    result is normalised. Images not made of whole 255ths (augmented ones) are rounded to them. On another device than
    the CPU each image travels to the CPU and back.

    The new size differs too, by up to a pixel: sides are rounded to the nearest, torchvision rounds them down.

    It runs in Python alone: TorchScript, tracing, ``torch.compile`` and ``torch.export`` of a whole detector need
    ``resize="torch"``; its backbone is free of this.

    Raises:
        UserError: When it is scripted, traced or exported.

    Source: detectron2's ``ResizeShortestEdge`` and ``ResizeTransform`` (``data/transforms``), of which only the case
        of 8-bit images of three channels is here.
    """

    def normalize(self, image: Tensor) -> Tensor:
        """Return the image as it is: torchvision's forward calls this first, and here the resize normalises."""
        if not image.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {image.dtype}")
        return image

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale an image and its boxes, then normalise it.

        Args:
            image: ``[3, H, W]`` in [0, 1].
            target: Its ``boxes`` are replaced by scaled ones.
        """
        if is_captured():
            raise UserError(_NOT_EXPORTABLE)
        height, width = image.shape[-2:]
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        new_height, new_width = scaled_size(height, width, shorter, self.max_size)
        pixels = image.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
        resized = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(image.device, image.dtype) / 255
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], (height, width), (new_height, new_width))
        return super().normalize(resized), target

    def __prepare_scriptable__(self) -> PilTransform:
        raise UserError(_NOT_EXPORTABLE)


def scaled_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return ``(height, width)`` with the shorter side ``min_size``, or less to keep the longer below ``max_size``.

    Source: ``ResizeShortestEdge.get_output_shape`` of detectron2, the same operations in the same order.
    """
    scale = min_size / min(height, width)
    new_height, new_width = (float(min_size), scale * width) if height < width else (scale * height, float(min_size))
    longer = max(new_height, new_width)
    if longer > max_size:
        scale = max_size / longer
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


_NOT_EXPORTABLE = (
    "this detector resizes images with Pillow (spec.resize='pil', as detectron2 does), which no exported program can "
    "hold: build it with resize='torch' to export it whole (scores move a little), or export its backbone"
)
