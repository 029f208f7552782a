"""Every setting of a classification run: typed, documented in place, checked all at once, as in ``resdet.config``.

``python -m resdet.classification.config`` prints the JSON Schema; ``configs/pretrain_schema.json`` is that output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import Field, model_validator
from typing_extensions import Self

from resdet.classification.spec import ClassifierSpec
from resdet.config import LoaderConfig, OptimConfig, TrainConfig
from resdet.config_reading import Section, json_schema, load_settings

Side = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class NetworkConfig(ClassifierSpec):
    """The network, and how it takes images."""

    model_config = Section.model_config

    weights: str | None = None
    """First weights, its last layer included where the number of classes is the same: a torchvision name, a file or a
    URL; null starts from random numbers (He et al. 2015)."""
    measured_mean: Literal["no", "channel", "pixel"] = "no"
    """no subtracts ``image_mean``; channel and pixel measure the mean over training images before the first step, one
    number for each colour, or one for each colour of each pixel (He et al. 2016; a detector made from the weights, and
    images of another size, take its mean over pixels)."""
    measured_images: int = Field(10_000, ge=1)
    """How many training images it is measured on, evenly spread over all."""


class FolderSource(Section):
    """A folder of folders of images, one for each class, as ImageNet is kept."""

    format: Literal["folder"]
    """Folders named by their class, images in them."""
    root: Path
    """The folder that holds the classes' folders."""
    classes: Path | None = None
    """A text file with one class (folder) a line, in label order; null takes the folders' names, sorted. For data.val,
    null takes the classes of data.train."""


class Cifar10Source(Section):
    """CIFAR-10, in its binary or its Python version."""

    format: Literal["cifar10"]
    """60,000 images of 32 x 32 pixels, 10 classes."""
    root: Path
    """cifar-10-batches-bin, cifar-10-batches-py, or the folder that one of them is in."""
    split: Literal["train", "val", "trainval", "test"]
    """train (45,000) and val (5,000: every tenth image of each class) are parts of trainval (50,000); test (10,000)."""


class DigitsSource(Section):
    """The handwritten digits that come with scikit-learn: nothing to download."""

    format: Literal["digits"]
    """1,797 images of 8 x 8 pixels, 10 classes (needs the package scikit-learn)."""
    split: Literal["train", "val", "trainval", "test"]
    """test (355: every fifth image of each class) and trainval (1,442), by the same writers; train (1,265) and val
    (177: every eighth of each class) are parts of trainval."""


Source = Annotated[Union[FolderSource, Cifar10Source, DigitsSource], Field(discriminator="format")]  # noqa: UP007


class DataConfig(Section):
    """Where the images are."""

    train: Source
    """Training data."""
    val: Source
    """Evaluation data, during training and for ``resdet eval-classifier``."""


class AugmentConfig(Section):
    """Augmentation of training images, in the order of the keys."""

    size: Side | None = None
    """Side of the training crops in pixels; null takes ``model.image_size``."""
    crop: Literal["short_side", "area", "pad", "none"] = "short_side"
    """short_side scales the image's short side to a random length and crops anywhere (He et al. 2016); area scales a
    random part of the image to the crop (Szegedy et al. 2015); pad scales the short side to ``model.image_size``, adds
    a border and crops anywhere (CIFAR); none does without the border and takes the centre."""
    short_side: tuple[Side, Side] = (256, 480)
    """short_side: shortest and longest length in pixels, all equally likely."""
    area: tuple[Probability, Probability] = (0.08, 1.0)
    """area: smallest and largest part, as a fraction of the image; its sides are as 3:4 to 4:3."""
    pad: int = Field(4, ge=0)
    """pad: width of the black border in pixels."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest rotation to either side, degrees."""
    shift: Probability = 0.0
    """Largest shift in each direction, as a fraction of the side."""
    scale: float = Field(1.0, ge=1)
    """Largest factor of a further scaling about the centre, and its inverse the smallest."""
    trivial: bool = False
    """One random operation of random strength on each image (TrivialAugment Wide, Mueller & Hutter 2021)."""
    erase: Probability = 0.0
    """Probability that a random rectangle is painted over with the mean colour (Zhong et al. 2020)."""
    colour_pca: float = Field(0.0, ge=0)
    """Standard deviation of shifts along the principal components of ImageNet's colours (Krizhevsky et al. 2012 take
    0.1); 0 leaves colours alone."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("short_side", "area"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must rise, got [{low}, {high}]")
        if self.crop == "area" and self.area[0] == 0:
            raise ValueError("area must be above 0")
        return self


class ClassifierOptimConfig(OptimConfig):
    """Optimizer and learning rate."""

    lr: float = Field(0.1, gt=0)
    """Learning rate for ``lr_batch_size`` images per step."""
    lr_batch_size: int | None = Field(256, ge=1)
    """The rate used is ``lr * train.batch_size / lr_batch_size`` (Goyal et al. 2017, section 2.1: linear scaling);
    null uses ``lr`` as it stands. The log says which rate came out."""
    norm_weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of the scales and offsets of norms; He et al. 2016 decay them like all else."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises linearly from ``warmup_factor`` times its value."""
    warmup_until_error: float | None = Field(None, gt=0, lt=1)
    """Instead of that: the rate stays at ``warmup_factor`` times its value until the share of wrong answers in
    training, over ``train.log_every`` steps, is below this (He et al. 2016, section 4.2, for 110 layers: 0.8)."""
    plateau_patience: int | None = Field(None, ge=1)
    """With ``schedule: constant``: multiply the rate by ``gamma`` after every so many evaluations in a row without a
    new best ``eval.best_metric``; null never does."""

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.plateau_patience is not None and self.schedule != "constant":
            raise ValueError(f"plateau_patience is for schedule constant, got schedule {self.schedule}")
        if self.warmup_until_error is not None and self.warmup_steps:
            raise ValueError("give warmup_steps or warmup_until_error, not both")
        return self


class ClassifierTrainConfig(TrainConfig):
    """How long, how many, how exact; and what is learned."""

    batch_size: int = Field(256, ge=1)
    """Images per optimizer step, over all processes and micro-batches. Batch norms see one micro-batch at a time."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (Szegedy et al. 2016)."""
    mixup: float = Field(0.0, ge=0)
    """Parameter of the Beta distribution by which pairs of images are mixed (Zhang et al. 2018); 0 mixes none."""
    cutmix: float = Field(0.0, ge=0)
    """Parameter of the Beta distribution of the part pasted from another image (Yun et al. 2019); 0 pastes none. With
    ``mixup`` too, each batch has one of the two."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class ClassifierEvalConfig(Section):
    """Evaluation of the model."""

    batch_size: int = Field(64, ge=1)
    """Images per forward pass; with ``views: dense`` it is 1."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """null takes ``train.precision``."""
    resize: Side | None = None
    """Length in pixels to which the short side is scaled before cropping (256 for crops of 224); null takes
    ``model.image_size``."""
    views: Literal["single", "ten_crop", "dense"] = "single"
    """What of an image is looked at: its centre; its corners and centre, each flipped too (Krizhevsky et al. 2012); or
    all of it at several ``scales``, flipped too, with the network made fully convolutional (He et al. 2016). Answers
    are averaged as probabilities."""
    scales: tuple[Side, ...] = Field((224, 256, 384, 480, 640), min_length=1)
    """dense: lengths of the short side in pixels."""
    best_metric: Literal["top1", "top5"] = "top1"
    """The number whose highest value makes an evaluation the best: it decides best.pt, ``train.patience`` and
    ``optim.plateau_patience``."""


class PretrainConfig(Section):
    """A whole run."""

    model: NetworkConfig = NetworkConfig()
    """The network, and how it takes images."""
    data: DataConfig
    """Training and validation data."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""
    loader: LoaderConfig = LoaderConfig()
    """Reading of images."""
    optim: ClassifierOptimConfig = ClassifierOptimConfig()
    """Optimizer and learning rate."""
    train: ClassifierTrainConfig
    """Length, batch, precision, intervals, targets."""
    eval: ClassifierEvalConfig = ClassifierEvalConfig()
    """Evaluation."""
    output_dir: Path
    """Folder of the run: config.yaml, metrics.jsonl, last.pt, best.pt, TensorBoard events."""
    resume: str | None = None
    """``auto`` goes on from output_dir/last.pt if it is there; a path goes on from that checkpoint; null begins anew,
    and refuses a folder that already holds a run."""
    seed: int = Field(0, ge=0)
    """Start of every random number: weights, order of images, augmentation."""

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        size = self.augment.size or self.model.image_size
        if self.augment.crop == "short_side" and self.augment.short_side[0] < size:
            raise ValueError(
                f"augment.short_side must be at least the crop's side, {size}, got {self.augment.short_side}"
            )
        if self.eval.resize is not None and self.eval.resize < self.model.image_size:
            raise ValueError(f"eval.resize must be at least model.image_size, {self.model.image_size}")
        return self


def load_pretrain_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read the configuration of a classification run and check all of it, as ``resdet.load_config`` does."""
    return load_settings(PretrainConfig, path, overrides, command="pretrain")


if __name__ == "__main__":
    print(json_schema(PretrainConfig), end="")  # noqa: T201 - this module's one command
