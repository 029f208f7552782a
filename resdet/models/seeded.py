"""What training draws at random for an image, decided by the image's own seed and not by its neighbours in the batch.

torchvision draws from one stream, image after image: the same image is then given other negatives, and another size,
when the batch around it is cut in another way. With seeds, a batch of four, two of two in a row and two in two
processes train on the same samples.
"""

# No "from __future__ import annotations": TorchScript reads those of methods that it leaves out, and not as text.
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from resdet.models.tracing import is_scripting

# Streams of random numbers made of one seed, so that the parts of the detector do not repeat each other's choices.
_RESIZE, _RPN, _BOX_HEAD = 1, 2, 3


class Sampler:
    """torchvision's ``BalancedPositiveNegativeSampler``, with seeds.

    Without seeds it computes what torchvision's computes, by the same operations in the same order. TorchScript knows
    no inheritance of such classes, hence the copy.

    Args:
        batch_size_per_image: Boxes drawn of each image.
        positive_fraction: Share of positives among them, at most.

    Attributes:
        seeds: One for each image of the next call; empty to draw from torch's own generator.
        num_positives: Positives drawn of each image by the last call.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.seeds: list[int] = []
        self.num_positives: list[int] = []

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw positives and negatives.

        Args:
            matched_idxs: For each image ``[N]``: positives above 0, negatives 0, others below 0.

        Returns:
            Masks of the positives and of the negatives drawn, uint8 ``[N]`` for each image.
        """
        positives: list[Tensor] = []
        negatives: list[Tensor] = []
        counts: list[int] = []
        for image, matched in enumerate(matched_idxs):
            positive = torch.where(matched >= 1)[0]
            negative = torch.where(matched == 0)[0]
            num_positives = min(positive.numel(), int(self.batch_size_per_image * self.positive_fraction))
            num_negatives = min(negative.numel(), self.batch_size_per_image - num_positives)
            if is_scripting() or len(self.seeds) == 0:
                first = torch.randperm(positive.numel(), device=positive.device)
                second = torch.randperm(negative.numel(), device=negative.device)
            else:
                generator = torch.Generator(matched.device)
                generator.manual_seed(self.seeds[image])
                first = torch.randperm(positive.numel(), generator=generator, device=positive.device)
                second = torch.randperm(negative.numel(), generator=generator, device=negative.device)
            drawn_positives = torch.zeros_like(matched, dtype=torch.uint8)
            drawn_negatives = torch.zeros_like(matched, dtype=torch.uint8)
            drawn_positives[positive[first[:num_positives]]] = 1
            drawn_negatives[negative[second[:num_negatives]]] = 1
            positives.append(drawn_positives)
            negatives.append(drawn_negatives)
            counts.append(num_positives)
        self.num_positives = counts
        return positives, negatives


class SeededTransform(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's transform, which may draw an image's size from the image's seed."""

    def __init__(self, min_size: int | tuple[int, ...], max_size: int, mean: list[float], std: list[float]) -> None:
        super().__init__(min_size, max_size, mean, std)
        self._generators: Iterator[torch.Generator] | None = None

    @torch.jit.unused
    def torch_choice(self, k: list[int]) -> int:
        """Draw one of the sizes; torchvision calls this once for each image, in their order."""
        generator = None if self._generators is None else next(self._generators)
        return k[int(torch.empty(1).uniform_(0.0, float(len(k)), generator=generator).item())]


@contextmanager
def image_seeds(model: GeneralizedRCNN, seeds: Sequence[int]) -> Iterator[None]:
    """Decide by seeds what a detector draws at random in its next forward pass, and in no other.

    Args:
        model: A ``Detector``.
        seeds: One for each image, >= 0.
    """
    transform, samplers = model.transform, (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler)
    assert isinstance(transform, SeededTransform)
    try:
        transform._generators = (torch.Generator().manual_seed(_stream(seed, _RESIZE)) for seed in seeds)
        for sampler, stream in zip(samplers, (_RPN, _BOX_HEAD), strict=True):
            sampler.seeds = [_stream(seed, stream) for seed in seeds]
        yield
    finally:
        transform._generators = None
        for sampler in samplers:
            sampler.seeds = []


def _stream(seed: int, stream: int) -> int:
    return (seed * 4 + stream) % 2**63
