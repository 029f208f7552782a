"""Every knob of a run: typed, documented in place, checked all at once.

``load_config`` reads a YAML file and ``key=value`` overrides into one frozen ``Config``. A field's docstring is its
documentation and goes into the JSON Schema (``python -m resdet.config`` prints it; ``configs/schema.json`` is that
output, and lets editors complete and check the YAML files).

The YAML itself is read by ``resdet.yaml12``, strictly.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from resdet.errors import ConfigError
from resdet.models.archs import VGGArch, find_arch
from resdet.models.spec import DetectorSpec, Tricks
from resdet.yaml12 import KeyPath, dotted, read_yaml

_SECTION = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

Fraction = Annotated[float, Field(gt=0, lt=1)]

_Settings = TypeVar("_Settings", bound=BaseModel)


class ModelConfig(DetectorSpec):
    """The detector and where its first weights come from."""

    model_config = _SECTION

    weights: str | None = "IMAGENET1K_V1"
    """First weights: a torchvision name (``IMAGENET1K_V1``), a file (.pth, .pt, .safetensors, .pkl) or a URL, of a
    classification ResNet, an exported backbone or a whole detector, also of detectron2 or mmdetection; null starts from
    random numbers. What weights were trained under they bring along, if the file tells, and it is logged: image_mean,
    image_std, norm_eps and stride_in_1x1, without which they mean nothing, and of a whole detector its library's
    resize, anchors, RoIAlign and rules for small boxes (detectron2's are not torchvision's). This holds for settings
    left at their defaults. Another value stated here is an error for the first four, and wins for the rest. Everything
    else is as stated here, and class-specific rows are kept only for the same classes."""
    trainable_layers: int = Field(3, ge=0, le=5)
    """How many stages of the body are trained, counted from the top: 3 trains C3-C5, 5 everything, 0 nothing."""
    calibration_images: int = Field(0, ge=0)
    """Training images from which a frozen norm takes its statistics when ``weights`` is null. A frozen norm on
    random weights normalises nothing and the losses diverge, so 0 refuses to train such a model."""
    class_balance_beta: float | None = Field(None, ge=0, lt=1)
    """Weigh classes in the loss of the scores by their effective number of boxes in the training data (Cui et al. 2019,
    who take 0.99 to 0.9999); null weighs all alike. It fills ``class_weights``."""

    @model_validator(mode="after")
    def _frozen_norm_needs_statistics(self) -> Self:
        arch = find_arch(self.arch)
        has_norm = not isinstance(arch, VGGArch) or arch.norm
        if has_norm and self.norm == "frozen" and self.weights is None and self.calibration_images == 0:
            raise ValueError(
                "norm frozen on random weights normalises nothing and diverges: give weights, set "
                "calibration_images (64, say), or train the norm (norm: batch or group)"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_class_weights(self) -> Self:
        if self.class_weights is not None and self.class_balance_beta is not None:
            raise ValueError("give class_weights or class_balance_beta, which makes them from the data, not both")
        return self


class CocoSource(BaseModel):
    """Images with one COCO json."""

    model_config = _SECTION

    format: Literal["coco"]
    """COCO's own layout: a folder of images and one json of annotations."""
    images: Path
    """Folder of the images; ``file_name`` in the json is relative to it."""
    annotations: Path
    """The json, e.g. ``annotations/instances_train2017.json``."""
    unreadable: Literal["error", "skip"] = "error"
    """What an image does that is missing or cannot be read: error ends the run; skip, for data.train alone, puts
    another image, drawn by the seed, in its place, and logs each such image once with their number so far."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses all."""


class VocSource(BaseModel):
    """One or several folders in Pascal VOC's layout."""

    model_config = _SECTION

    format: Literal["voc"]
    """Pascal VOC's layout: Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages/*."""
    root: Path
    """A folder with Annotations, ImageSets and JPEGImages, or the parent of several (VOCdevkit)."""
    split: str | list[str]
    """Name of a list in ImageSets/Main (``train``); below a parent folder ``VOC2007/trainval``; several are joined."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses VOC's 20, or whatever the annotations hold."""
    use_difficult: bool = False
    """Train on objects marked difficult too. Evaluation always ignores them, as VOC does."""
    unreadable: Literal["error", "skip"] = "error"
    """As for coco: error ends the run, skip puts another training image in the place of one that cannot be read."""


class ShapesSource(BaseModel):
    """Generated pictures of shapes: nothing to download."""

    model_config = _SECTION

    format: Literal["shapes"]
    """Pictures of circles, squares and triangles, drawn as they are read."""
    num_images: int = Field(2000, ge=1)
    """Size of the dataset."""
    image_size: int = Field(128, ge=32)
    """Side of the square images, pixels."""
    seed: int = Field(0, ge=0)
    """Another seed gives other pictures: use different ones to train and to validate."""
    classes: list[str] | None = None
    """Names of the classes to use, in label order; null uses all."""


Source = Annotated[Union[CocoSource, VocSource, ShapesSource], Field(discriminator="format")]  # noqa: UP007


class DataConfig(BaseModel):
    """Where the images and boxes are."""

    model_config = _SECTION

    train: Source
    """What the model learns from."""
    val: Source
    """What it is judged on, during training and by tools/eval.py."""

    @model_validator(mode="after")
    def _every_image_is_judged(self) -> Self:
        if not isinstance(self.val, ShapesSource) and self.val.unreadable == "skip":
            raise ValueError(
                "val.unreadable must be error: a metric over fewer images is not that of the dataset. Take images that "
                "cannot be read out of the annotations (tools/check_data.py --fix writes such a copy)"
            )
        return self


class LoaderConfig(BaseModel):
    """How images reach the model."""

    model_config = _SECTION

    num_workers: int = Field(2, ge=0)
    """Processes that read and augment images beside each training process; 0 does it in the training process."""
    sampling: Literal["uniform", "repeat_factor", "class_balanced"] = "uniform"
    """uniform draws each training image once per epoch; repeat_factor draws images of rare classes more often (Gupta et
    al. 2019, LVIS); class_balanced draws every class equally often and for each an image that has it (Shen et al.
    2016): images without boxes are then never drawn. ``train.epochs`` counts as many draws as there are images."""
    repeat_threshold: float = Field(0.001, gt=0, le=1)
    """repeat_factor: a class in less than this share of the images is rare; an image with a class in a quarter of it is
    drawn twice as often. COCO has no class below 0.001."""
    stall_seconds: float = Field(60.0, gt=0)
    """Waiting longer than this for a batch is told in the log, again after each such time."""


class OptimConfig(BaseModel):
    """Optimizer and learning rate."""

    model_config = _SECTION

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, as every Faster R-CNN recipe here; AdamW for training from random weights."""
    lr: float = Field(0.02, gt=0)
    """Learning rate for ``lr_batch_size`` images per step."""
    lr_batch_size: int | None = Field(16, ge=1)
    """The rate used is ``lr * train.batch_size / lr_batch_size`` (Goyal et al. 2017, section 2.1: linear scaling);
    null uses ``lr`` as it stands. The log says which rate came out."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of all trained parameters but those of norms."""
    norm_weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the scales and offsets of trained norms."""
    warmup_steps: int = Field(500, ge=0)
    """Steps over which the rate rises linearly from ``warmup_factor`` times its value."""
    warmup_factor: float = Field(0.001, ge=0, le=1)
    """Where the warmup begins, as a fraction of the rate."""
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    """How the rate falls after the warmup; cosine falls to 0 at the last step."""
    milestones: list[Fraction] = [0.6667, 0.8889]
    """multistep: the fractions of the run at which the rate is multiplied by ``gamma`` (60k and 80k of 90k steps)."""
    gamma: float = Field(0.1, gt=0, le=1)
    """multistep: the factor at each milestone."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest allowed 2-norm of the whole gradient; null does not clip."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        if sorted(set(self.milestones)) != self.milestones:
            raise ValueError(f"milestones must rise, got {self.milestones}")
        return self


class TrainConfig(BaseModel):
    """How long, how many, how exact."""

    model_config = _SECTION

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or ``epochs``."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training images; give this or ``steps``."""
    batch_size: int = Field(16, ge=1)
    """Images per optimizer step, over all processes and micro-batches together."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per step: each process holds ``batch_size / processes / accumulate`` images at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast to bf16 or fp16 (with loss scaling); parameters and losses stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""
    log_every: int = Field(20, ge=1)
    """Steps between lines in metrics.jsonl and TensorBoard; losses are means over these steps."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on ``data.val``; null evaluates only after the last step."""
    save_every: int | None = Field(None, ge=1)
    """Steps between writings of last.pt; null writes it with each evaluation."""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many evaluations in a row without a new best ``eval.best_metric``; null never does."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights (0.999, say), evaluate it, and make best.pt of it; null does
    not. last.pt holds both."""
    deterministic: bool = False
    """On GPUs, use only algorithms that give the same bits every time: slower, and RoIAlign by torchvision's Python
    code. CPUs give the same bits without it, for the same number of threads."""
    retry_out_of_memory: bool = False
    """When memory does not suffice, compute micro-batches in halves from then on (one process only)."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        return self


class EvalConfig(BaseModel):
    """How the model is judged."""

    model_config = _SECTION

    batch_size: int = Field(1, ge=1)
    """Images per forward pass. Images of a batch are padded to one size, which can move scores a little."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """null takes ``train.precision``."""
    loss: bool = False
    """Compute the losses on ``data.val`` too, as ``val_loss`` beside AP. Costs one more pass over its images."""
    tricks: Tricks = Tricks()
    """More computation for each image, for a better answer from the same weights; all of it is off by default."""
    num_pictures: int = Field(8, ge=0)
    """Pictures of detections on the first images of ``data.val``, written to output_dir/pictures and TensorBoard."""
    picture_score: float = Field(0.5, ge=0, le=1)
    """Detections below this score are not drawn."""
    best_metric: Literal["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "voc_AP50"] = "AP"
    """The number whose highest value makes an evaluation the best: it decides best.pt and ``train.patience``."""


class Config(BaseModel):
    """A whole run."""

    model_config = _SECTION

    model: ModelConfig = ModelConfig()
    """The detector and its first weights."""
    data: DataConfig
    """Training and validation data."""
    augment: list[dict[str, dict[str, Any]]] = [{"HorizontalFlip": {"p": 0.5}}]
    """Steps applied in this order to training images: ``- HorizontalFlip: {p: 0.5}``. Any transform of albumentations
    by its name (ColorJitter for colours, GaussianBlur, CoarseDropout for cutout, ...), and LargeScaleJitter, Mosaic and
    CopyPaste (``resdet/data/augment/steps.py`` documents their parameters); images that the last two mix in go through
    the steps before them. The length of the short side is not set here: ``model.min_size`` draws one of several for
    each training image, and the detector scales whatever comes out of these steps to it."""
    min_visibility: float = Field(0.1, ge=0, le=1)
    """A box is dropped when steps of ``augment`` leave less than this share of its area: cut off by the border of the
    image or covered by holes and pasted objects."""
    loader: LoaderConfig = LoaderConfig()
    """Reading of images."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    train: TrainConfig
    """Length, batch, precision, intervals."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    output_dir: Path
    """Folder of the run: config.yaml, metrics.jsonl, last.pt, best.pt, TensorBoard events, pictures."""
    resume: str | None = None
    """``auto`` goes on from output_dir/last.pt if it is there; a path goes on from that checkpoint; null begins anew,
    and refuses a folder that already holds a run."""
    seed: int = Field(0, ge=0)
    """Start of every random number: weights, order of images, augmentation, sampling of boxes."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and check all of it.

    Args:
        path: A YAML file.
        overrides: ``key=value`` with dotted keys, as in ``optim.lr=0.01``; the value is read as YAML. Later ones win.

    Raises:
        ConfigError: With every problem found, each with its file and line or its override.
    """
    return load_settings(Config, path, overrides)


def load_settings(root: type[_Settings], path: str | Path, overrides: Sequence[str] = ()) -> _Settings:
    """Do as ``load_config``, for the settings of another kind of run."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), [_missing_file(path)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    return parse_settings(root, text, overrides, source=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "<text>") -> Config:
    """Do as ``load_config``, with the YAML itself; ``source`` is what messages call it."""
    return parse_settings(Config, text, overrides, source=source)


def parse_settings(
    root: type[_Settings], text: str, overrides: Sequence[str] = (), *, source: str = "<text>"
) -> _Settings:
    """Do as ``parse_config``, for the settings of another kind of run."""
    problems: list[str] = []
    places: dict[KeyPath, str] = {}
    tree = read_yaml(text, source, problems, places)
    if not isinstance(tree, dict):
        problems = problems or [f"must be a mapping of sections, got {_describe(tree)}"]
        raise ConfigError(source, problems)
    for override in overrides:
        _apply_override(tree, override, problems, places)
    try:
        # JSON mode is the one in which strict typing still takes a string for a Path and a list for a tuple.
        config = root.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems.extend(_explain(item, tree, places, source, root) for item in error.errors())
    if problems:
        raise ConfigError(source, problems)
    return config


def config_from_plain(plain: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Config:
    """Rebuild a configuration from the plain values a checkpoint carries; ``source`` is what messages call it."""
    return parse_config(yaml.safe_dump(dict(plain), sort_keys=False), overrides, source=source)


def config_to_plain(config: BaseModel) -> dict[str, Any]:
    """Give the whole configuration, defaults included, as plain values."""
    plain: dict[str, Any] = config.model_dump(mode="json")
    return plain


def config_to_yaml(config: BaseModel) -> str:
    """Give the whole configuration, defaults included, as YAML that ``load_config`` reads back to the same."""
    return yaml.safe_dump(config_to_plain(config), sort_keys=False, default_flow_style=None, width=120)


def parse_tricks(settings: Sequence[str]) -> Tricks:
    """Read test-time tricks from ``key=value``, as in ``refine=1``; each value is read as YAML, later ones win.

    Raises:
        ConfigError: With every problem found.
    """
    problems: list[str] = []
    places: dict[KeyPath, str] = {}
    tree: dict[str, Any] = {}
    for setting in settings:
        _apply_override(tree, setting, problems, places)
    try:
        tricks = Tricks.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems.extend(_explain(item, tree, places, "tricks", Tricks) for item in error.errors())
    if problems:
        raise ConfigError("tricks", problems)
    return tricks


def _missing_file(path: Path) -> str:
    siblings = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [p.name for p in siblings], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"no such file{hint}"


def _apply_override(tree: dict[str, Any], override: str, problems: list[str], places: dict[KeyPath, str]) -> None:
    """Set one ``key=value`` in the tree; a mapping on the way that is missing or not a mapping is made anew."""
    place = f"command line ({override})"
    key, equals, text = override.partition("=")
    keys = key.split(".")
    if not equals or not all(keys):
        problems.append(f"{place}: must be key=value with a dotted key, as in optim.lr=0.01")
        return
    try:
        value = read_yaml(text, place, problems, {})
    except ConfigError as error:
        problems.extend(f"{place}: {problem}" for problem in error.problems)
        return
    node = tree
    for name in keys[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    node[keys[-1]] = value
    prefix = tuple(keys)
    for stale in [known for known in places if known[: len(prefix)] == prefix]:
        del places[stale]
    places[prefix] = place


def _explain(item: Any, tree: Any, places: Mapping[KeyPath, str], source: str, root: type[BaseModel]) -> str:
    """Turn one of pydantic's errors on a ``root`` into ``place: key: what must hold, what was got``."""
    path = _real_path(item["loc"], tree)
    # A key's own place; that of something below it, if an override made both; or that of the section around it.
    below = [place for known, place in places.items() if known[: len(path)] == path]
    around = [places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places]
    place = places.get(path) or (below + around + [source])[0]
    where = f"{place}: {dotted(path)}" if path else place
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(path[:-1], tree, root)
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
        return f"{where}: unknown key{hint}"
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        got = item["input"].get("format") if isinstance(item["input"], dict) else item["input"]
        formats = ", ".join(_formats_at(path, root))
        return f"{where}.format: must be one of {formats}; got {_describe(got)}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    if kind == "value_error":
        return f"{where}: {context.get('error', message)}"
    return f"{where}: must be {message}; got {_describe(item['input'])}"


def _real_path(location: KeyPath, tree: Any) -> KeyPath:
    """Drop from pydantic's location what is no key of the file: union tags and type names."""
    path: list[str | int] = []
    node = tree
    for i, part in enumerate(location):
        is_last = i == len(location) - 1
        if isinstance(node, dict):
            if part not in node and (part == node.get("format") or not is_last):
                continue
            path.append(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            path.append(part)
            node = node[part] if part < len(node) else None
    return tuple(path)


def _fields_at(path: KeyPath, tree: Any, root: type[BaseModel]) -> list[str]:
    """Name the keys that may stand in the section of ``root`` at ``path``."""
    model: Any = root
    node = tree
    for part in path:
        annotation = model.model_fields[part].annotation
        node = node[part] if isinstance(node, dict) else None
        members: list[type[BaseModel]] = [
            member
            for member in (annotation, *get_args(annotation))
            if isinstance(member, type) and issubclass(member, BaseModel)
        ]
        if len(members) > 1 and isinstance(node, dict):
            members = [m for m in members if node.get("format") in get_args(m.model_fields["format"].annotation)]
        model = members[0]
    return list(model.model_fields)


def _formats_at(path: KeyPath, root: type[BaseModel]) -> list[str]:
    """Name the formats that the sources of ``root`` at ``path`` may have."""
    model: Any = root
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    return [
        name
        for source in get_args(model.model_fields[path[-1]].annotation)
        for name in get_args(source.model_fields["format"].annotation)
    ]


def _describe(value: Any) -> str:
    text = json.dumps(value, default=str)
    kind = {str: "text", bool: "true/false", int: "whole number", float: "number", list: "list", dict: "mapping"}
    if value is None:
        return "nothing (null)"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind.get(type(value), type(value).__name__)})"


def json_schema(root: type[BaseModel] = Config) -> str:
    """Give the JSON Schema of the YAML files, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **root.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")  # noqa: T201 - this module's one command
