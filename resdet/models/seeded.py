"""Random choices of training, made from each image's own seed and not from its neighbours in the batch.

torchvision draws from one stream, image after image: the same image is then given other negatives, and another size,
when the batch around it is cut in another way. With seeds, a batch of four, two of two in a row and two in two
processes train on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from resdet.devices import constant, send
from resdet.errors import UserError
from resdet.models.tracing import is_captured, scripted_as

# Streams of random numbers made of one seed, so that the parts of the detector do not repeat each other's choices.
_RESIZE, _RPN, _BOX_HEAD = 1, 2, 3


class Sampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision ships no types, here and below
    """torchvision's sampler, which may draw from the seeds of images; without seeds it draws what that does."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: list[int] = []  # of each image of the next call; empty to draw from torch's own generator
        self.num_positives: list[int] | Tensor = []  # drawn of each image by the last call, [B]

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw from ``[N]`` of each image, positives above 0 and negatives 0; return uint8 masks of both, ``[N]``."""
        positives, negatives, counts = [], [], []
        for image, matched in enumerate(matched_idxs):
            generator = torch.Generator(matched.device).manual_seed(self.seeds[image]) if self.seeds else None
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive, count = _draw(matched >= 1, most, generator)
            negative, _ = _draw(matched == 0, self.batch_size_per_image - count, generator)
            positives.append(positive)
            negatives.append(negative)
            counts.append(count)
        self.num_positives = counts
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


class Drawn(NamedTuple):
    """What ``draw`` has drawn: ``S`` rows of each image, positives first."""

    rows: Tensor  # int64 [B, S]
    positive: Tensor  # bool [B, S]
    used: Tensor  # bool [B, S]; false where an image has too few


def random_keys(seeds: Sequence[int], shape: torch.Size, device: torch.device) -> Tensor:
    """Return a random int64 >= 0 for each of ``[B, N]``, made of its image's seed and its place.

    They are the same on every device, and in any batch. Without seeds these are drawn from torch's own generator. A
    device's generator would have to be made for each image, and draws other numbers than the CPU's.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014),
        with arithmetic shifts, as torch has no others.
    """
    if not seeds:
        seeds = torch.randint(2**62, (shape[0],)).tolist()
    # The seeds themselves are mixed too: sequences of neighbours would be the same, shifted by one.
    first = send(_mix(torch.tensor(seeds)), device)  # [B]
    return _mix(_places(shape[1], device) + first[:, None]).bitwise_and_(2**63 - 1)


def draw(status: Tensor, keys: Tensor, size: int, positive_fraction: float) -> Drawn:
    """Draw ``size`` rows of each image, as ``Sampler`` does, by the greatest keys and without looking at a value.

    Args:
        status: int64 ``[B, N]``: 1 for positives, 0 for negatives, -1 for what is not drawn.
        keys: int64 ``[B, N]``, random, >= 0.
        size: ``S``.
        positive_fraction: Of these at most.
    """
    num_rows, most = status.shape[1], int(size * positive_fraction)
    positive_keys, positives = keys.masked_fill(status != 1, -1).topk(min(most, num_rows), dim=1)
    negative_keys, negatives = keys.masked_fill(status != 0, -1).topk(min(size, num_rows), dim=1)
    count = (positive_keys >= 0).sum(dim=1, keepdim=True)  # [B, 1]
    slot = torch.arange(size, device=status.device)  # [S]
    positive = slot < count  # [B, S]
    place = slot - count
    of_negative = place.clamp(0, negatives.shape[1] - 1)
    index = torch.where(positive, F.pad(positives, (0, size - positives.shape[1])), negatives.gather(1, of_negative))
    is_negative = (negative_keys.gather(1, of_negative) >= 0) & (place < negatives.shape[1])
    return Drawn(index, positive, positive | is_negative)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(keys: Tensor) -> Tensor:
    """Mix the bits of int64 in place."""
    keys ^= keys >> 30
    keys *= 0xBF58476D1CE4E5B9 - 2**64
    keys ^= keys >> 27
    keys *= 0x94D049BB133111EB - 2**64
    keys ^= keys >> 31
    return keys


@lru_cache(maxsize=64)
def _places(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, count + 1, device=device) * _GOLDEN  # [N]


class SeededTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform, which may draw an image's size from its seed, and takes strips and no NaN.

    Attributes:
        longer_multiple: What the longer side of a padded batch is a multiple of in training; the shorter is one of 32.
    """

    def __init__(self, min_size: int | tuple[int, ...], max_size: int, mean: list[float], std: list[float]) -> None:
        super().__init__(min_size, max_size, mean, std)
        self.longer_multiple = 32
        self._generators: Iterator[torch.Generator] | None = None

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Normalise, resize and batch images ``[3, H, W]``, and scale the boxes of their targets.

        Raises:
            UserError: If pixels of an image in host memory are not finite. On another device that would be waited for.
        """
        _check_pixels(images)
        result: tuple[ImageList, list[dict[str, Tensor]] | None] = super().forward(images, targets)
        return result

    def pad(self, images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[tuple[int, int]]]:
        """Copy, normalise, resize and batch images as ``forward`` does; return ``[B, 3, H, W]`` and their own sizes.

        Images are ``[3, H, W]`` on any device, uint8 or floats in [0, 1]. They are scaled before they are normalised,
        which is the same but for rounding and reads each pixel once less.

        Raises:
            UserError: If an image is not ``[3, H, W]``, or pixels in host memory are not finite.
        """
        for index, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != 3:
                raise UserError(f"images[{index}]: must be [3, H, W], got {list(image.shape)}")
        _check_pixels(images)
        sizes = [self.scaled_size(image.shape[-2], image.shape[-1]) for image in images]
        height, width = self.padded_size(sizes)
        dtype = images[0].dtype if images[0].is_floating_point() else torch.float32
        shape = (len(images), 3, height, width)
        batch = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()
        for place, image, (height, width) in zip(batch, images, sizes, strict=True):
            range_ = 1.0 if image.is_floating_point() else 255.0
            factor = constant(tuple(1 / (range_ * std) for std in self.image_std), dtype, device)[:, None, None]
            shift = constant(
                tuple(-mean / std for mean, std in zip(self.image_mean, self.image_std, strict=True)), dtype, device
            )[:, None, None]
            pixels = send(image, device).to(dtype)
            if (height, width) != image.shape[-2:]:
                pixels = F.interpolate(pixels[None], size=(height, width), mode="bilinear", align_corners=False)[0]
            place[:, :height, :width] = torch.addcmul(shift, pixels, factor)
        return batch, sizes

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Return images ``[3, H, W]`` as one batch ``[B, 3, H, W]`` of ``padded_size``, zeros where they end."""
        if not self.training or self.longer_multiple == size_divisible:
            batch: Tensor = super().batch_images(images, size_divisible)
            return batch
        height, width = self.padded_size([(image.shape[-2], image.shape[-1]) for image in images])
        batch = images[0].new_zeros((len(images), 3, height, width))
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[-2], : image.shape[-1]] = image
        return batch

    def padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return the size of a batch of images of these sizes: multiples of 32, the longer side as the class says."""
        height, width = (
            math.ceil(max(sides) / self.size_divisible) * self.size_divisible for sides in zip(*sizes, strict=True)
        )
        if self.training:
            longer = math.ceil(max(height, width) / self.longer_multiple) * self.longer_multiple
            height, width = (longer, width) if height >= width else (height, longer)
        return height, width

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image for the network; in training one of its lengths is drawn."""
        if self.training and self._skip_resize:
            return height, width
        shorter = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        if self.fixed_size is not None:
            return self.fixed_size[1], self.fixed_size[0]
        factor = min(shorter / min(height, width), self.max_size / max(height, width))
        return max(1, math.floor(height * factor)), max(1, math.floor(width * factor))

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


def _check_pixels(images: Sequence[Tensor]) -> None:
    """Raise a UserError if pixels of an image in host memory are not finite; looking at others would wait for them."""
    for index, image in enumerate(images):
        if not image.is_floating_point() or image.device.type != "cpu" or is_captured():
            continue
        if not math.isfinite(image.sum().item()) and (count := int((~image.isfinite()).sum())):
            raise UserError(
                f"images[{index}]: pixels must be finite, got NaN or infinity in {count} of {image.numel()} values"
            )


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
