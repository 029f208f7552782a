"""Views of images: random crops in training, one or several fixed views in evaluation.

All of them are torchvision's transforms of 8-bit pixels, in Pillow's arithmetic. All random choices follow from the
image's seed, in whatever process they are made.

Legend: ``S`` side of a square crop, ``H, W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from resdet.classification.config import AugmentConfig

# Principal components of the colours of ImageNet's training images in [0, 1] and their standard deviations.
# Source: facebookarchive/fb.resnet.torch, datasets/imagenet.lua.
_PCA_STD = torch.tensor([0.2175, 0.0188, 0.0045])
_PCA_VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


MOST_OBLONG = 16
"""How many times as long as wide an image may be. Of longer ones the middle is seen: a strip of 30000x1 pixels, scaled
to a short side of 256, would have 2 gigapixels."""


def scale_short_side(image: Image.Image, length: int) -> Image.Image:
    """Scale an image so that its short side has ``length`` pixels: bilinear, antialiased."""
    image = not_too_oblong(image)
    if min(image.size) == length:
        return image
    scaled: Image.Image = F.resize(image, [length], interpolation=InterpolationMode.BILINEAR)
    return scaled


def not_too_oblong(image: Image.Image) -> Image.Image:
    """Return an image, or the middle of one that is more than ``MOST_OBLONG`` times as long as wide."""
    most = MOST_OBLONG * min(image.size)
    if max(image.size) <= most:
        return image
    middle: Image.Image = F.center_crop(image, [min(image.height, most), min(image.width, most)])
    return middle


def centre_views(image: Image.Image, *, resize: int, size: int) -> list[Tensor]:
    """Return the centre of an image whose short side is scaled to ``resize``: one uint8 ``[3, size, size]``."""
    return [F.pil_to_tensor(F.center_crop(scale_short_side(image, resize), [size, size]))]


def ten_crop_views(image: Image.Image, *, resize: int, size: int) -> list[Tensor]:
    """Return the four corners and the centre, then those of the mirrored image: ten uint8 ``[3, size, size]``.

    Source: Krizhevsky et al. 2012, section 4.1. The image whose corners they are is not cut square first.
    """
    return [F.pil_to_tensor(crop) for crop in F.ten_crop(scale_short_side(image, resize), [size, size])]


def dense_views(image: Image.Image, *, scales: Sequence[int]) -> list[Tensor]:
    """Return the whole image at every scale, and mirrored: uint8 ``[3, H, W]``, two for each scale.

    Source: He et al. 2016, section 3.4, "the fully-convolutional form as in [41, 13], and average the scores at
        multiple scales"; the mirrored images are those of [41] (Simonyan & Zisserman 2015, section 3.2).
    """
    views = []
    for length in scales:
        view = F.pil_to_tensor(scale_short_side(image, length))
        views += [view, F.horizontal_flip(view)]
    return views


def fixed_views(kind: str, *, resize: int, size: int, scales: Sequence[int]) -> Callable[[Image.Image], list[Tensor]]:
    """Return what makes the views ``single``, ``ten_crop`` or ``dense`` of an image."""
    if kind == "dense":
        return partial(dense_views, scales=scales)
    return partial(ten_crop_views if kind == "ten_crop" else centre_views, resize=resize, size=size)


class TrainView:
    """Makes the random view of an image that one step of training sees: a square of side ``size``.

    Short sides have the length ``resize`` where ``augment.crop`` is ``pad`` or ``none``; ``erase`` paints with
    ``mean_colour``, in 0..255.
    """

    def __init__(
        self, augment: AugmentConfig, *, size: int, resize: int, mean_colour: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        bilinear = InterpolationMode.BILINEAR
        steps: list[Callable[[Any], Any]] = []
        if augment.crop == "short_side":
            shortest, longest = augment.short_side
            steps += [v2.RandomShortestSize(list(range(shortest, longest + 1)), interpolation=bilinear)]
            # A rounded side may come out a pixel short of the crop.
            steps += [v2.RandomCrop(size, pad_if_needed=True, padding_mode="edge")]
        elif augment.crop == "area":
            steps += [v2.RandomResizedCrop(size, scale=augment.area, interpolation=bilinear)]
        else:
            steps += [v2.Resize(resize, interpolation=bilinear)]
            pads = augment.crop == "pad"
            steps += [v2.RandomCrop(size, padding=augment.pad)] if pads else [v2.CenterCrop(size)]
        if augment.flip:
            steps += [v2.RandomHorizontalFlip(augment.flip)]
        if augment.rotate or augment.shift or augment.scale != 1:
            shift, scale = (augment.shift, augment.shift), (1 / augment.scale, augment.scale)
            steps += [v2.RandomAffine(augment.rotate, translate=shift, scale=scale, interpolation=bilinear)]
        if augment.trivial:
            steps += [v2.TrivialAugmentWide(interpolation=bilinear)]
        steps += [F.pil_to_tensor]
        if augment.erase:
            steps += [v2.RandomErasing(augment.erase, value=list(mean_colour))]
        self._steps = steps
        self._colour_pca = augment.colour_pca

    def __call__(self, image: Image.Image, seed: int) -> tuple[Tensor, Tensor]:
        """Make the view whose random choices follow from ``seed``, in 0..2**63 - 1.

        Returns the view, uint8 ``[3, S, S]``, and what is to be added to its red, green and blue in [0, 1], float32
        ``[3]``: eight bits would round small shifts away.
        """
        # torchvision draws from the CPU's global generator, which training depends on. torch.manual_seed would also
        # reseed the GPUs' generators, which fork_rng does not restore here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            view: Any = not_too_oblong(image)
            for step in self._steps:
                view = step(view)
            shift = torch.zeros(3)
            if self._colour_pca:
                shift = _PCA_VECTORS @ (_PCA_STD * torch.randn(3) * self._colour_pca)
        return view, shift
