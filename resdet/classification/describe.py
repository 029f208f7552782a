"""Responses of the layers of trained networks, measured on image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resdet.classification.summary import default_image_size, response_deviations
from resdet.data.image_files import find_images
from resdet.data.images import read_image
from resdet.models.archs import find_arch
from resdet.models.bodies import make_body
from resdet.models.loading import load_backbone_weights
from resdet.models.spec import DetectorSpec
from resdet.weights.source import read_first_weights


def measure_responses(
    arch: str,
    weights: str,
    images: Sequence[Path | str],
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Measure the responses of a trained network's 3x3 layers on image files, as ``response_deviations`` does.

    ``weights`` is a torchvision weight name, a file or a URL, of a classifier, a backbone or a detector with a pyramid;
    ``images`` are files, folders or patterns. Images are turned upright (EXIF), scaled to ``image_size``, by default
    ``default_image_size``, and normalised as the file states, or else as ImageNet's.
    """
    last = len(find_arch(arch).strides)
    files = find_images(images)
    file = read_first_weights(weights, arch)
    settings = file.settings
    has_statistics = any(name.endswith("running_mean") for name in file.tensors)
    body = make_body(
        arch,
        norm="frozen" if has_statistics else "group",
        norm_eps=settings.get("norm_eps", 1e-5),
        returned_layers=(last,),
        stride_in_1x1=settings.get("stride_in_1x1", False),
    )
    load_backbone_weights(body, file, arch)
    fields = DetectorSpec.model_fields
    mean = torch.tensor(settings.get("image_mean", fields["image_mean"].default)).view(3, 1, 1)
    std = torch.tensor(settings.get("image_std", fields["image_std"].default)).view(3, 1, 1)
    size = image_size or default_image_size(arch)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(files), batch_size):
            pictures = [_scaled(file, size) for file in files[start : start + batch_size]]
            yield (torch.stack(pictures) - mean) / std

    return response_deviations(body.eval(), batches())


def _scaled(file: Path, size: tuple[int, int]) -> Tensor:
    """Read an image as float ``[3, H, W]`` in [0, 1]."""
    pixels = torch.from_numpy(read_image(file, upright=True)).permute(2, 0, 1).float() / 255
    if pixels.shape[1:] == size:
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
