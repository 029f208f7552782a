"""Random choices of training, made from each image's own seed and not from its neighbours in the batch.

torchvision draws from one stream, image after image: the same image is then given other negatives, and another size,
when the batch around it is cut in another way. With seeds, a batch of four, two of two in a row and two in two
processes train on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from resdet.errors import UserError
from resdet.models.tracing import is_captured, scripted_as

# Streams of random numbers made of one seed, so that the parts of the detector do not repeat each other's choices.
_RESIZE, _RPN, _BOX_HEAD = 1, 2, 3


class Sampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision ships no types, here and below
    """torchvision's sampler, which may draw from the seeds of images; without seeds it draws what that does."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: list[int] = []  # of each image of the next call; empty to draw from torch's own generator
        self.num_positives: list[int] = []  # drawn of each image by the last call

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw from ``[N]`` of each image, positives above 0 and negatives 0; return uint8 masks of both, ``[N]``."""
        positives, negatives = [], []
        self.num_positives = []
        for image, matched in enumerate(matched_idxs):
            generator = torch.Generator(matched.device).manual_seed(self.seeds[image]) if self.seeds else None
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive, count = _draw(matched >= 1, most, generator)
            negative, _ = _draw(matched == 0, self.batch_size_per_image - count, generator)
            positives.append(positive)
            negatives.append(negative)
            self.num_positives.append(count)
        return positives, negatives


def plain_sampler(sampler: BalancedPositiveNegativeSampler) -> BalancedPositiveNegativeSampler:
    """Return torchvision's sampler with the settings of another, for TorchScript."""
    return BalancedPositiveNegativeSampler(sampler.batch_size_per_image, sampler.positive_fraction)


def _draw(candidates: Tensor, most: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Draw up to ``most`` of the boxes that a mask ``[N]`` marks; return their mask, uint8 ``[N]``, and how many."""
    indices = torch.where(candidates)[0]  # [M]; waits for the device
    count = min(len(indices), most)
    order = torch.randperm(len(indices), generator=generator, device=indices.device)
    drawn = torch.zeros_like(candidates, dtype=torch.uint8)
    drawn[indices[order[:count]]] = 1
    return drawn, count


class SeededTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform, which may draw an image's size from its seed, and takes strips and no NaN."""

    def __init__(self, min_size: int | tuple[int, ...], max_size: int, mean: list[float], std: list[float]) -> None:
        super().__init__(min_size, max_size, mean, std)
        self._generators: Iterator[torch.Generator] | None = None

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Normalise, resize and batch images ``[3, H, W]``, and scale the boxes of their targets.

        Raises:
            UserError: If pixels of an image in host memory are not finite. On another device that would be waited for.
        """
        for index, image in enumerate(images):
            if not image.is_floating_point() or image.device.type != "cpu" or is_captured():
                continue
            if not math.isfinite(image.sum().item()) and (count := int((~image.isfinite()).sum())):
                raise UserError(
                    f"images[{index}]: pixels must be finite, got NaN or infinity in {count} of {image.numel()} values"
                )
        result: tuple[ImageList, list[dict[str, Tensor]] | None] = super().forward(images, targets)
        return result

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scale ``[3, H, W]`` and the boxes of its target as torchvision does, but to one pixel at least.

        The shorter side of an image that is more than ``max_size`` times as long as wide has none left in torchvision.
        """
        old = list(image.shape[-2:])
        new = old if is_captured() else [math.floor(side * (self.max_size / max(old))) for side in old]
        if min(new) > 0:
            result: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)
            return result
        if self.training:
            self.torch_choice(self.min_size)  # the draw of this image, which its size does not depend on
        new = [max(1, side) for side in new]
        image = F.interpolate(image[None], size=new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], old, new)
        return image, target

    def __prepare_scriptable__(self) -> GeneralizedRCNNTransform:
        return scripted_as(self, GeneralizedRCNNTransform)

    def torch_choice(self, k: list[int]) -> int:
        """Draw one of the sizes; torchvision calls this once for each image, in their order."""
        return choose_size(k, None if self._generators is None else next(self._generators))


def choose_size(sizes: Sequence[int], generator: torch.Generator | None) -> int:
    """Draw one of the sizes as torchvision does, from torch's own generator if none is passed."""
    return sizes[int(torch.empty(1).uniform_(0.0, float(len(sizes)), generator=generator).item())]


def size_generator(seed: int) -> torch.Generator:
    """Return the generator from which the size of the image with this seed is drawn."""
    return torch.Generator().manual_seed(_stream(seed, _RESIZE))


@contextmanager
def image_seeds(model: GeneralizedRCNN, seeds: Sequence[int]) -> Iterator[None]:
    """Let a ``Detector`` draw from the seeds of its images, each >= 0, in the next forward pass, and in no other."""
    transform, samplers = model.transform, (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler)
    assert isinstance(transform, SeededTransform)
    try:
        transform._generators = map(size_generator, seeds)
        for sampler, stream in zip(samplers, (_RPN, _BOX_HEAD), strict=True):
            sampler.seeds = [_stream(seed, stream) for seed in seeds]
        yield
    finally:
        transform._generators = None
        for sampler in samplers:
            sampler.seeds = []


def _stream(seed: int, stream: int) -> int:
    return (seed * 4 + stream) % 2**63
