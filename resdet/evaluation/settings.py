"""How a model is run on a dataset: the settings that evaluation, prediction and the validation loss share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resdet.models.spec import Tricks
from resdet.precision import Precision


@dataclass(frozen=True)
class InferenceSettings:
    """How to run a model on images.

    Attributes:
        batch_size: Images per forward pass in each process. Images of a batch are padded to one size, which can move
            scores and losses a little.
        num_workers: Processes that read images; 0 reads them in this one.
        device: Where to compute; the model is moved there and stays. None: where it is.
        precision: fp32, or autocast to bf16 or fp16.
        tricks: What to do at test time beyond running the model once; None does nothing.
        tiles: ``(side, overlap)``: detect in square tiles of ``side`` pixels, in [32, inf), that overlap by a share of
            it, in [0, 0.9], and in the whole image scaled down; ``batch_size`` then counts tiles, and images are read
            one by one. None detects in images as they are.
        max_detections: Detections, at least 1, that COCO's metrics count per class and image, and that a FasterRCNN
            returns for an image. Its number of proposals (1,000 unless built otherwise) is raised to it. None: COCO's
            100, and as many as the model was built for. With ``tiles`` a tile and the merged image may each have so
            many; with None the merged image keeps what its tiles have.
        progress: Show a progress bar on standard error (in rank 0 only).
    """

    batch_size: int = 1
    num_workers: int = 0
    device: torch.device | None = None
    precision: Precision = "fp32"
    tricks: Tricks | None = None
    tiles: tuple[int, float] | None = None
    max_detections: int | None = None
    progress: bool = False

    @property
    def num_images_read(self) -> int:
        """Images to read at a time: of tiled images one, which may have 500 MB."""
        return self.batch_size if self.tiles is None else 1
