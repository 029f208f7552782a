"""Every knob of a run: typed, documented in place, checked all at once.

``load_config`` reads a YAML file and ``key=value`` overrides into one frozen ``Config``. A field's docstring is its
documentation and goes into the JSON Schema, with which editors complete and check the YAML files (``python -m
resdet.config > configs/schema.json``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer, model_validator
from typing_extensions import Self

from resdet.config_reading import Overrides, Section, json_schema, load_settings, or_text, parse_settings
from resdet.data.folder import folder_sections, folder_splits
from resdet.models.archs import VGGArch, find_arch
from resdet.models.spec import WEIGHTS_FIELDS, DetectorSpec, Tiles, Tricks, WeightsOrigin

Fraction = Annotated[float, Field(gt=0, lt=1)]


class ModelConfig(Section, DetectorSpec):
    """The detector and where its first weights come from."""

    weights: str | None = "IMAGENET1K_V1"
    """First weights: a torchvision name (``IMAGENET1K_V1``), that of a published detector (``detectron2_r101_fpn_3x``;
    ``resdet weights`` lists them), a run's folder, a file (.pth, .pt, .safetensors, .pkl) or a URL of a classification
    ResNet, an exported backbone or a whole detector, also of detectron2 or mmdetection; null starts from random
    weights. Settings that the weights were trained with are taken over where they are not stated here, and
    logged: image_mean, image_std, norm_eps and stride_in_1x1, and for a whole detector its library's resize, anchors,
    RoIAlign and rules for small boxes (detectron2's are not torchvision's). A different value stated here is an error
    for the first four, which the weights cannot do without, and wins for the rest. Where the file does not say how they
    were trained, these four decide between the ways its library has, or else its usual one is assumed, with a warning.
    Class-specific rows are kept only for the same classes."""
    weights_origin: WeightsOrigin = WeightsOrigin()
    """What is known of these weights, where their file does not say it."""
    trainable_layers: int = Field(3, ge=0, le=5)
    """Number of stages of the body to train, counted from the top: 3 trains C3-C5, 5 everything, 0 nothing."""
    calibration_images: int = Field(0, ge=0)
    """Training images from which frozen norms take their statistics when ``weights`` is null. A frozen norm on random
    weights does not normalise and the losses diverge, so training such a model is refused for 0."""
    class_balance_beta: float | None = Field(None, ge=0, lt=1)
    """Weight classes in the classification loss by their effective number of boxes in the training data (Cui et al.
    2019, who use 0.99 to 0.9999); null weights all equally. It fills ``class_weights``."""

    @model_serializer(mode="wrap")
    def _without_what_weights_decide(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Written out, a default would be a statement, and contradict weights that were trained with another value.
        plain: dict[str, Any] = serialize(self)
        unstated = set(WEIGHTS_FIELDS) - self.model_fields_set
        return {name: value for name, value in plain.items() if name not in unstated}

    @model_validator(mode="after")
    def _frozen_norm_needs_statistics(self) -> Self:
        arch = find_arch(self.arch)
        has_norm = not isinstance(arch, VGGArch) or arch.norm
        if has_norm and self.norm == "frozen" and self.weights is None and self.calibration_images == 0:
            raise ValueError(
                "norm frozen on random weights does not normalise and diverges: give weights, set "
                "calibration_images (64, say), or train the norm (norm: batch or group)"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_class_weights(self) -> Self:
        if self.class_weights is not None and self.class_balance_beta is not None:
            raise ValueError("give class_weights or class_balance_beta, which computes them from the data, not both")
        return self


class CocoSource(Section):
    """Images with one COCO json."""

    format: Literal["coco"]
    """COCO's layout: a folder of images and one json of annotations."""
    images: Path
    """Folder of the images; ``file_name`` in the json is relative to it (in LVIS the end of ``coco_url``)."""
    annotations: Path
    """The json, e.g. ``annotations/instances_train2017.json``."""
    unreadable: Literal["error", "skip"] = "error"
    """What happens at an image that is missing or cannot be read: error ends the run; skip, for data.train only, trains
    on another image, drawn by the seed, and logs each skipped image once with their number so far."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses all. A class without boxes may be named too."""


class VocSource(Section):
    """One or several folders in Pascal VOC's layout."""

    format: Literal["voc"]
    """Pascal VOC's layout: Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages/*."""
    root: Path
    """A folder with Annotations, ImageSets and JPEGImages, or the parent of several (VOCdevkit)."""
    split: str | list[str] | None = None
    """Name of a list in ImageSets/Main (``train``), or several to join; ``VOC2007/trainval`` below a parent folder. A
    list's lines are names without suffix, with the subfolder of Annotations and JPEGImages if there is one. In a folder
    without lists, as Roboflow and labelImg leave it, the name of a subfolder, or null for all of it."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses VOC's 20, or those of the annotations. A class without
    boxes may be named too."""
    use_difficult: bool = False
    """Train on objects marked difficult too. Evaluation always ignores them, as VOC does."""
    unreadable: Literal["error", "skip"] = "error"
    """As for coco: error ends the run, skip trains on another image in place of one that cannot be read."""


class YoloSource(Section):
    """A data set in YOLO's layout."""

    format: Literal["yolo"]
    """YOLO's layout, by the conventions of Ultralytics: a folder of images, one of label files (.txt), a data.yaml."""
    root: Path
    """The folder of the data set or its data.yaml. Without one, splits are folders such as train/images or
    images/train, and class names are in classes.txt or obj.names."""
    split: str | None = None
    """train, val (also valid) or test. If not stated, that of the section: data.train takes train, data.val takes val.
    A stated null takes all images of the folder."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses all. A class without boxes may be named too."""
    unreadable: Literal["error", "skip"] = "error"
    """As for coco: error ends the run, skip trains on another image in place of one that cannot be read."""


class ShapesSource(Section):
    """Generated images of shapes: nothing to download."""

    format: Literal["shapes"]
    """Images of circles, squares and triangles, drawn when they are read."""
    num_images: int = Field(2000, ge=1)
    """Size of the dataset."""
    image_size: int = Field(128, ge=32)
    """Side of the square images, pixels."""
    seed: int = Field(0, ge=0)
    """Seed of the images; use different ones for training and validation."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses all."""


class HeldOut(Section):
    """A part of data.train that is not trained on. ``fraction`` alone makes it one: ``val: {fraction: 0.2}``."""

    format: Literal["held_out"] = "held_out"
    """A part of data.train; need not be stated."""
    fraction: Fraction
    """Share of the images of data.train, approximately: each is held out or not by a hash of its own file, whatever the
    others are, so that renamed, reordered and added images move none. Images that look alike, frames of one video and
    copies that Roboflow made of one image stay together, and a class is on both sides if it can be
    (``resdet/data/split.py``). The log says what came of it, and train_images.txt and val_images.txt in the run's
    folder list it. All images are decoded for it, once; of more than 20,000 only parts of the files are read, and those
    that look alike are not found."""
    seed: int = Field(0, ge=0)
    """Another seed holds out other images."""


class PythonSource(Section):
    """A dataset that a Python program passes to ``resdet.train``; a run's config.yaml says so."""

    format: Literal["python"] = "python"
    """No files: ``resdet.train(config, train_set=..., val_set=...)``. Need not be stated."""
    dataset: str | None = None
    """What kind of object was given."""
    num_images: int | None = Field(None, ge=1)
    """Its size."""
    classes: list[str] | None = None
    """Names of its classes, in label order."""


_Labelled = Union[CocoSource, VocSource, YoloSource, ShapesSource, PythonSource]  # noqa: UP007
Source = Annotated[_Labelled, Field(discriminator="format")]


class DataConfig(Section):
    """Where the images and boxes are: a dataset's folder, whose layout is then recognised and logged, or both sections.

    A folder holds COCO's, Roboflow's, YOLO's or Pascal VOC's layout (``resdet/data/folder.py``).
    """

    train: Source = PythonSource()
    """Training data."""
    val: Annotated[Union[_Labelled, HeldOut], Field(discriminator="format")] = PythonSource()  # noqa: UP007
    """Validation data, for evaluation during training and by ``resdet eval``."""

    @classmethod
    def in_full(cls, value: Any) -> Any:
        """Return the sections that a folder's path stands for, or that a bare ``fraction`` does."""
        if isinstance(value, (str, Path)):
            value = folder_sections(str(value))
        val = value.get("val") if isinstance(value, dict) else None
        if isinstance(val, dict) and "fraction" in val and "format" not in val:
            return {**value, "val": {"format": "held_out", **val}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_in_full(cls, value: Any) -> Any:
        return cls.in_full(value)

    @model_validator(mode="after")
    def _nothing_drawn_is_held_out(self) -> Self:
        if isinstance(self.val, HeldOut) and isinstance(self.train, ShapesSource):
            raise ValueError("val.fraction: shapes are drawn, not divided: give val format shapes with another seed")
        return self

    @model_validator(mode="after")
    def _each_section_has_its_split(self) -> Self:
        for name in ("train", "val"):
            source = getattr(self, name)
            if isinstance(source, YoloSource) and "split" not in source.model_fields_set:
                self.__dict__[name] = source.model_copy(update={"split": name})  # the model is frozen
        return self

    @model_validator(mode="after")
    def _every_image_is_evaluated(self) -> Self:
        if getattr(self.val, "unreadable", "error") == "skip":
            raise ValueError(
                "val.unreadable must be error: a metric over fewer images is not that of the dataset. Remove images "
                "that cannot be read from the annotations (`resdet check CONFIG --fix OUT.json` writes such a copy)"
            )
        return self


class LoaderConfig(Section):
    """How images reach the model."""

    num_workers: int = Field(2, ge=0)
    """Worker processes that read and augment images, for each training process; 0 uses the training process itself."""
    sampling: Literal["uniform", "repeat_factor", "class_balanced"] = "uniform"
    """uniform draws each training image once per epoch; repeat_factor draws images of rare classes more often (Gupta et
    al. 2019, LVIS); class_balanced draws every class equally often, and for each an image that has it (Shen et al.
    2016), so that images without boxes are never drawn. An epoch is as many draws as there are images."""
    repeat_threshold: float = Field(0.001, gt=0, le=1)
    """repeat_factor: a class in less than this share of the images is rare; an image with a class in a quarter of it is
    drawn twice as often. COCO has no class below 0.001."""
    stall_seconds: float = Field(60.0, gt=0)
    """The log reports when a batch takes longer than this, and again after each such interval."""


class OptimConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, as every Faster R-CNN recipe here; AdamW for training from random weights."""
    lr: float = Field(0.02, gt=0)
    """Learning rate for ``lr_batch_size`` images per step."""
    lr_batch_size: int | None = Field(16, ge=1)
    """The rate is ``lr * train.batch_size / lr_batch_size`` (Goyal et al. 2017, section 2.1: linear scaling); null uses
    ``lr`` unscaled. The resulting rate is logged."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of all trained parameters except those of norms."""
    norm_weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the scales and offsets of trained norms."""
    warmup_steps: int = Field(500, ge=0)
    """Steps over which the rate rises linearly from ``warmup_factor`` times its value."""
    warmup_factor: float = Field(0.001, ge=0, le=1)
    """Start of the warmup, as a fraction of the rate."""
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    """How the rate falls after the warmup; cosine falls to 0 at the last step."""
    milestones: list[Fraction] = Field([0.6667, 0.8889])
    """multistep: the fractions of the run at which the rate is multiplied by ``gamma`` (60k and 80k of 90k steps)."""
    gamma: float = Field(0.1, gt=0, le=1)
    """multistep: the factor at each milestone."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Clip the 2-norm of the whole gradient to this value; null does not clip."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        if sorted(set(self.milestones)) != self.milestones:
            raise ValueError(f"milestones must rise, got {self.milestones}")
        return self


class DetectorOptimConfig(OptimConfig):
    """Optimizer and learning rate."""

    body_lr_factor: float = Field(1.0, gt=0)
    """Factor of the rate for the body, whose weights are trained already, where those of pyramid, RPN and box head
    begin at random; 1 trains all alike."""


class TrainConfig(Section):
    """Length, batch size, precision and intervals of training."""

    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps; give this or ``epochs``. Beside a detector's ``minutes`` it is the most of them, and
    may be left out."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training images; give this or ``steps``. Beside a detector's ``minutes`` it is the most of them,
    and may be left out."""
    batch_size: int = Field(16, ge=1)
    """Images per optimizer step, over all processes and micro-batches together."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per step: each process holds ``batch_size / processes / accumulate`` images at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast to bf16 or fp16 (with loss scaling); parameters and losses stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one."""
    log_every: int = Field(20, ge=1)
    """Steps between lines in metrics.jsonl and TensorBoard; losses are means over these steps."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on ``data.val``; null evaluates only after the last step."""
    eval_images: int | None = Field(None, ge=1)
    """Images of ``data.val`` that these evaluations look at, evenly spread over it: for many images and little time.
    null takes all. The commands that evaluate a finished run (``resdet eval``) always take all."""
    save_every: int | None = Field(None, ge=1)
    """Steps between writings of last.pt; null writes it with each evaluation."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a new best ``eval.best_metric``; null never stops early."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights (0.999, say), which is evaluated and saved as best.pt; null
    keeps none. last.pt holds both."""
    deterministic: bool = False
    """On GPUs, use only algorithms that give the same bits every time: slower, and RoIAlign by torchvision's Python
    code. It sets CUBLAS_WORKSPACE_CONFIG=:4096:8 unless the environment has a value; a process that has used CUDA
    before must set it itself. CPUs give the same bits without it, for the same number of threads."""
    compile: bool = False
    """Train the network (of a detector, body and pyramid) as torch.compile makes it. For GPUs, where it saves launches
    and passes over memory; on a CPU a step takes 1.1 times as long (ResNet-18 and -50, 320 pixels, one thread). Each
    size of a padded batch is compiled by itself, in a minute or more, so sizes are made few: the longer side is a
    multiple of 128, not of 32, which moves losses a little, and with one ``model.min_size`` some tens are left. From
    the 65th on nothing is compiled. Evaluation runs as without it. It needs a C++ compiler, on GPUs Triton too. CUDA
    graphs are not made: the forward waits once for the numbers of regions."""
    retry_out_of_memory: bool = False
    """Halve micro-batches from then on when memory runs out (one process only)."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        return self


class EvalConfig(Section):
    """Evaluation of the model."""

    batch_size: int = Field(1, ge=1)
    """Images (with ``tiles``, tiles) per forward pass. Those of a batch are padded to one size, which can move scores a
    little."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of evaluation; null uses ``train.precision``."""
    loss: bool = False
    """Also compute the losses on ``data.val``, logged as ``val_loss``. Costs one more pass over its images."""
    max_detections: int = Field(100, ge=1)
    """Detections that count of each class in an image, best first; 100 makes numbers comparable with published ones.
    Any other number is also how many the model returns for an image, of all classes together (by itself
    ``model.box_detections_per_img``), and at least how many proposals it looks at. Images with more objects need it."""
    reference: bool = True
    """Let pycocotools compute COCO's twelve numbers too in every final evaluation (of ``resdet eval``, and at the end
    of training): metrics.json has both, and a difference above 1e-9 is an error. Interim evaluations go without: at the
    size of COCO's val2017 pycocotools takes half a minute and holds every detection as Python objects."""
    tricks: Tricks = Tricks()
    """Test-time tricks: more computation for each image, for better detections from the same weights."""
    tiles: Tiles | None = None
    """``[side, overlap]``, as in ``[800, 0.2]``: detect in square tiles of ``side`` pixels, which overlap by this part
    of their side or a bit more, and in the whole image scaled down. For large images with small objects. The detector
    scales a tile like any image: one whose side is ``model.min_size`` keeps its pixels as they are. null detects in
    images as they are. ``loss`` always does."""
    num_pictures: int = Field(8, ge=0)
    """Pictures of detections on the first images of ``data.val``, written to output_dir/pictures and TensorBoard."""
    picture_score: float | None = Field(None, ge=0, le=1)
    """Detections below this score are not drawn; null takes the threshold of the best F1 of this evaluation."""
    best_metric: str = "AP"
    """Metric whose highest value makes an evaluation the best: it decides best.pt and ``train.patience``. One of AP,
    AP50, AP75, AP_small, AP_medium, AP_large, voc_AP50, and AR_100, which bears the number of ``max_detections``."""

    @model_validator(mode="after")
    def _best_metric_is_computed(self) -> Self:
        names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", f"AR_{self.max_detections}", "voc_AP50")
        if self.best_metric not in names:
            raise ValueError(f"best_metric must be one of {', '.join(names)}, got {self.best_metric!r}")
        return self


class Config(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    """The detector and its first weights."""
    data: DataConfig = Field(DataConfig(), json_schema_extra=or_text)
    """Training and validation data: a dataset's folder, or sections for both. It may be left out where a Python program
    gives datasets to ``resdet.train``."""
    augment: list[dict[str, dict[str, Any]]] = Field([{"HorizontalFlip": {"p": 0.5}}])
    """Steps applied in this order to training images: ``- HorizontalFlip: {p: 0.5}``. Any transform of albumentations
    by its name (ColorJitter for colours, GaussianBlur, CoarseDropout for cutout, ...), and RandomTile,
    LargeScaleJitter, Mosaic and CopyPaste (``resdet/data/augment/steps.py`` documents their parameters); the images
    that the last two mix in pass through the steps before them. The short side is not set here: the detector scales the
    result of these steps to ``model.min_size``, of which it draws one for each training image if there are several."""
    min_visibility: float = Field(0.1, ge=0, le=1)
    """A box is dropped when steps of ``augment`` leave less than this share of its area: cut off by the image border
    or covered by holes and pasted objects."""
    loader: LoaderConfig = LoaderConfig()
    """Data loading."""
    optim: DetectorOptimConfig = DetectorOptimConfig()
    """Optimizer and learning rate."""
    minutes: float | None = Field(None, gt=0)
    """Time of the whole run, evaluations included: the schedule follows the clock and is finished when the time is up,
    also on a machine that becomes slower or faster, or when ``train.steps`` or ``train.epochs`` are done, if one is
    given. A resumed run has what is left of the time."""
    plan: bool = False
    """Whether to choose what is not stated. When the run begins, rules (``resdet/plan/rules.py``) choose by facts of
    the data and the measured speed of the machine; what came of it is logged with its reasons and written to
    config.yaml, where ``plan`` is false: that file repeats the run without choosing again."""
    train: TrainConfig = TrainConfig()
    """Length, batch size, precision, intervals."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    output_dir: Path
    """Folder of the run: config.yaml, metrics.jsonl, last.pt, best.pt, TensorBoard events, pictures."""
    resume: str | None = None
    """``auto`` resumes from output_dir/last.pt if it exists; a path resumes from that checkpoint; null starts a new
    run. The last two refuse a folder that already holds another. Changed keys are logged and applied, or refused where
    the checkpoint's weights depend on them."""
    seed: int = Field(0, ge=0)
    """Seed of all random numbers: weights, order of images, augmentation, sampling of boxes."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        steps, epochs = self.train.steps, self.train.epochs
        if steps is not None and epochs is not None:
            got = f"train.steps {steps} and train.epochs {epochs:g} (train.steps=null takes one back)"
            raise ValueError(f"give train.steps or train.epochs, not both, got {got}")
        if steps is None and epochs is None and self.minutes is None:
            raise ValueError("give train.steps, train.epochs or minutes, got none of them")
        return self


def load_config(config: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> Config:
    """Read a configuration and check all of it.

    >>> load_config("frcnn_r101", {"train.steps": 5000, "output_dir": "runs/mine"})  # doctest: +SKIP

    Args:
        config: A YAML file, the name of a recipe (``resdet recipes`` lists them), or a mapping of keys and values.
        overrides: ``key=value``, as in ``optim.lr=0.01``, with values in YAML; or a mapping of keys and values of
            Python (``plain_values``). Keys are dotted, a section as a value replaces that section, later ones win.

    Raises:
        ConfigError: With every problem found, each with its file and line or its override.
    """
    return load_settings(Config, config, overrides, command="train")


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "<text>") -> Config:
    """Check a configuration as ``load_config`` does, from YAML text; ``source`` is what messages call it."""
    return parse_settings(Config, text, overrides, source=source)


def config_from_plain(plain: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Config:
    """Rebuild a configuration from the plain values that a checkpoint carries; ``source`` is what messages call it."""
    return parse_config(yaml.safe_dump(dict(plain), sort_keys=False), overrides, source=source)


def folder_config(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a dataset's folder with defaults for all else, for what does not train.

    Raises:
        DataError: If the folder's layout is not recognised.
        ConfigError: As ``load_config``, for the overrides.
    """
    plain = {"data": folder_sections(str(folder)), "train": {"steps": 1}, "output_dir": "runs"}
    return config_from_plain(plain, overrides, source=str(folder))


def folder_sources(folder: Path) -> dict[str, Source]:
    """Return all sets of images in a dataset's folder, by "train", "val" and "test"; raises as ``folder_config``."""
    parse: TypeAdapter[Source] = TypeAdapter(Source)
    return {name: parse.validate_python(section, strict=False) for name, section in folder_splits(folder).items()}


def parse_tricks(settings: Sequence[str]) -> Tricks:
    """Read test-time tricks from ``key=value``, as in ``refine=1``; each value is read as YAML, later ones win."""
    return parse_settings(Tricks, "{}", settings, source="tricks")


if __name__ == "__main__":
    print(json_schema(Config), end="")  # noqa: T201 - this module's one command
