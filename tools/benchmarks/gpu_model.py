"""Model the time that a GPU would take for a training step and an inference, from what a pretend GPU counts.

Nothing here is measured on a GPU. ``modelled_seconds`` says what is assumed and what is left out.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.models.detection import FasterRCNN

from benchmarks.inference import detection_runs
from benchmarks.pair import NUM_CLASSES, TRAINABLE_LAYERS, Variant, build_torchvision
from benchmarks.pretend_gpu import DEVICE, Operator, PretendTensor, pretend_gpu, to_pretend
from benchmarks.report import Report
from benchmarks.settings import check_counts, check_positive, check_size, parse_counts
from benchmarks.shape_only import shape_only
from benchmarks.training import make_step
from resdet.data.loader import Batch
from resdet.models.archs import find_arch
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.types import Target

BOXES_PER_IMAGE = 7
"""Objects of a picture, as many as COCO's have on average."""

PICTURE_HEIGHT = 480
"""Height of pictures before the networks scale them."""

OUTPUT_LAYERS = (
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
)
"""Layers whose outputs decide which boxes there are: they have values."""

CHANNELS_LAST = "torchvision, channels last"

_NUM_OPERATORS_SHOWN = 12
_HALF = (torch.bfloat16, torch.float16)


class Card(NamedTuple):
    """What is assumed of a GPU and its host.

    Attributes:
        bytes_per_second: Bandwidth of its memory.
        half_flops: Operations a second, two for each multiply-add, of products of bfloat16 or float16.
        tf32_flops: Those of float32 convolutions, for which torch uses TF32 by default.
        fp32_flops: Those of products of float32 matrices, for which it does not.
        launch_s: Seconds of the host for an operator.
        wait_s: Seconds that a wait adds when the device has done what was queued.
    """

    bytes_per_second: float
    half_flops: float
    tf32_flops: float
    fp32_flops: float
    launch_s: float
    wait_s: float

    def flops(self, operator: Operator) -> float:
        """Return the rate at which an operator can compute."""
        if operator.dtype in _HALF:
            return self.half_flops
        return self.tf32_flops if "convolution" in operator.name else self.fp32_flops


class Counted(NamedTuple):
    """What a piece of work was counted to do.

    Attributes:
        stretches: Operators in order, cut where the host waited.
        waits: By what waited and the line of code.
        before_optimizer: How many of the operators came before the optimizer's step; all of them at inference.
    """

    stretches: list[list[Operator]]
    waits: Counter[tuple[str, str]]
    before_optimizer: int

    @property
    def operators(self) -> list[Operator]:
        """All operators, in order."""
        return [operator for stretch in self.stretches for operator in stretch]

    @property
    def num_bytes(self) -> int:
        """Bytes that they read and write."""
        return sum(operator.read + operator.written for operator in self.operators)


def benchmark_gpu_model(
    *,
    arch: str = "resnet101",
    min_size: int = 800,
    max_size: int = 1333,
    batch_sizes: str = "2,16",
    channels_last: bool = False,
    bandwidth_tb: float = 3.0,
    bf16_tflops: float = 798.0,
    tf32_tflops: float = 399.0,
    fp32_tflops: float = 54.0,
    launch_us: float = 4.0,
    wait_us: float = 20.0,
    seed: int = 0,
) -> Report:
    """Count a training step and an inference of torchvision's detector and of ours, and model their time on a GPU.

    Both run under bfloat16 autocast on a pretend GPU (``pretend_gpu``), at true shapes and every batch size:
    nothing is extrapolated. Feature maps, weights and gradients are shapes without values (``shape_only``), outputs of
    heads are random, and all that is chosen by them is computed. Steps are those of ``work=training``.

    Args:
        arch: The body.
        min_size: Shorter side of the networks' input, in pixels.
        max_size: Its longer side.
        batch_sizes: Images of a call; several, separated by commas.
        channels_last: Count torchvision's in channels-last layout too. Operators and bytes are the same then, but for
            copies into another layout: what layout costs in cuDNN is not modelled.
        bandwidth_tb: Bandwidth in TB/s. Default: measured on an H100.
        bf16_tflops: Rate of bfloat16 in TFLOP/s. Default: measured on an H100.
        tf32_tflops: Rate of float32 convolutions. Default, not measured: half of bfloat16's, as in NVIDIA's data sheet
            of the H100 (SXM).
        fp32_tflops: Rate of float32 matrix products. Default, not measured: that data sheet's 67, times the share of
            its bfloat16 rate that was measured (798 of 989).
        launch_us: Microseconds of the host for an operator. Default: assumed.
        wait_us: Microseconds that a wait adds. Default: assumed.
        seed: Of random weights, pixels and boxes.

    Raises:
        UserError: If a setting is out of range, or torchvision has no such detector.
    """
    settings = dict(locals())
    check_size(min_size, max_size)
    find_arch(arch)
    check_positive(settings, "bandwidth_tb", "bf16_tflops", "tf32_tflops", "fp32_tflops")
    check_counts(settings, "launch_us", "wait_us", "seed", least=0)
    numbers = parse_counts("batch_sizes", batch_sizes)
    card = Card(
        bandwidth_tb * 1e12, bf16_tflops * 1e12, tf32_tflops * 1e12, fp32_tflops * 1e12, launch_us / 1e6, wait_us / 1e6
    )
    models = build_models(
        DetectorSpec(arch=arch, min_size=min_size, max_size=max_size), seed, channels_last=channels_last
    )
    tables: dict[str, Sequence[Mapping[str, str | float]]] = {"Assumed, of the modelled GPU": _assumptions(settings)}
    for training in (True, False):
        for number in numbers:
            batch = random_batch(number, min_size, max_size, seed)
            counted = {name: count(model, name, batch, training=training) for name, model in models.items()}
            what = f"{'training step' if training else 'inference'}, {number} x {min_size}x{max_size}, bfloat16"
            tables[f"Modelled, not measured: {what}"] = result_rows(counted, card)
            tables[f"Modelled, not measured: where the device's time goes, {what}"] = _device_rows(counted, card)
            if number == numbers[0]:
                tables[f"Counted for the modelled time: where the host waits, {what}"] = _wait_rows(counted)
    return Report("gpu_model", settings, tables, taken="Modelled, not measured. Counted")


def build_models(spec: DetectorSpec, seed: int, *, channels_last: bool = False) -> dict[str, FasterRCNN]:
    """Build torchvision's detector, a copy of it in another layout if wanted, and ours, with the same random weights.

    Class scores have a standard deviation of 1 for inputs of mean square 1, so that there is something to detect.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ours = build_detector(spec, num_classes=NUM_CLASSES, trainable_layers=TRAINABLE_LAYERS)
    weight = ours.roi_heads.box_predictor.cls_score.weight  # [K + 1, C]
    with torch.no_grad():
        weight.div_(weight.square().sum(dim=1).mean().sqrt())
    reference = build_torchvision(ours)
    models: dict[str, FasterRCNN] = {"torchvision": reference}
    if channels_last:
        models[CHANNELS_LAST] = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    return models | {"ours": ours}


def random_batch(num_images: int, min_size: int, max_size: int, seed: int, num_classes: int = NUM_CLASSES) -> Batch:
    """Return pictures of random pixels with boxes, of a size that the networks scale to ``min_size x max_size``."""
    generator = torch.Generator().manual_seed(seed)
    height, width = PICTURE_HEIGHT, round(PICTURE_HEIGHT * max_size / min_size)
    images, targets = [], []
    for number in range(num_images):
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        corners = torch.rand(BOXES_PER_IMAGE, 2, 2, generator=generator).sort(dim=1).values  # [N, low or high, x or y]
        boxes = corners.flatten(1) * torch.tensor([width - 16, height - 16] * 2) + torch.tensor([0, 0, 16, 16])
        labels = torch.randint(1, num_classes, (BOXES_PER_IMAGE,), generator=generator)
        targets.append(Target(boxes=boxes, labels=labels, image_id=torch.tensor(number)))
    numbers = list(range(num_images))
    return Batch(images, targets, numbers, numbers)


def without_values(model: FasterRCNN) -> FasterRCNN:
    """Make weights on the pretend GPU shapes only, in place, but for those of ``OUTPUT_LAYERS``; return the model."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and name not in OUTPUT_LAYERS:
                assert isinstance(parameter, PretendTensor)
                shape = PretendTensor(shape_only(parameter.plain))
                module._parameters[key] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    return model


def count(model: FasterRCNN, name: str, batch: Batch, *, training: bool) -> Counted:
    """Count one training step, or one inference, under bfloat16 autocast on the pretend GPU.

    It is the second that is counted: the first makes what is kept between calls, such as anchors and momentum.

    Args:
        model: On the CPU; not changed.
        name: Its name; ours begins with "ours".
        batch: In host memory.
        training: Whether to train.
    """
    before_optimizer: list[int] = []
    torch.manual_seed(0)
    with pretend_gpu() as record:
        on_device = without_values(to_pretend(copy.deepcopy(model)))
        variant = Variant(on_device.train(training), "bf16", name.startswith("ours"), DEVICE)
        run: Callable[[int], object]
        run = make_step(variant, [batch], DEVICE) if training else detection_runs({name: variant}, [batch])[name]
        run(0)
        record.clear()
        record.waits = waits = _Times(record.operators)
        hook = register_optimizer_step_pre_hook(lambda *_: before_optimizer.append(len(record.operators)))
        try:
            run(0)
        finally:
            hook.remove()
        operators = list(record.operators)
    ends = [*waits.operators_before, len(operators)]
    stretches = [operators[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return Counted(stretches, Counter(waits), before_optimizer[0] if before_optimizer else len(operators))


def device_seconds(operator: Operator, card: Card) -> float:
    """Model an operator's time on the device: that of its bytes or of its arithmetic, whichever is longer."""
    moving = (operator.read + operator.written) / card.bytes_per_second
    return max(moving, 2 * operator.multiply_adds / card.flops(operator))


def modelled_seconds(counted: Counted, card: Card) -> float:
    """Model the time of what was counted.

    For each stretch between two waits the longer of the device's time (``device_seconds`` of its operators) and the
    host's (``launch_s`` for each of them), and ``wait_s`` for each wait: host and device work side by side until the
    host has to see a result.

    Left out, on both sides: what caches hold (every operator is taken to read and write memory), operators that launch
    several kernels, the host's work between operators, shapes at which a kernel stays below the card's best rate, and
    the conversions by which cuDNN computes a convolution of torch's default layout on tensor cores.
    """
    stretches = sum(
        max(sum(device_seconds(operator, card) for operator in stretch), len(stretch) * card.launch_s)
        for stretch in counted.stretches
    )
    return stretches + counted.waits.total() * card.wait_s


class _Times(Counter[tuple[str, str]]):
    """A counter of waits that also notes how many operators came before each."""

    def __init__(self, operators: Sequence[Operator]) -> None:
        super().__init__()
        self.operators_before: list[int] = []
        self._operators = operators

    def __setitem__(self, key: tuple[str, str], value: int) -> None:
        self.operators_before += [len(self._operators)] * (value - self[key])
        super().__setitem__(key, value)


def result_rows(counted: Mapping[str, Counted], card: Card) -> list[dict[str, str | float]]:
    """Return what was counted and modelled as rows, with ratios to the first."""
    first = next(iter(counted.values()))
    return [
        {
            "of": name,
            "waits": one.waits.total(),
            "operators": len(one.operators),
            "before the optimizer": one.before_optimizer,
            "modelled GB read": sum(operator.read for operator in one.operators) / 1e9,
            "modelled GB written": sum(operator.written for operator in one.operators) / 1e9,
            "modelled GB, ratio": one.num_bytes / first.num_bytes,
            "modelled TFLOP": sum(2 * operator.multiply_adds for operator in one.operators) / 1e12,
            "modelled ms of the device": 1e3 * sum(device_seconds(operator, card) for operator in one.operators),
            "modelled ms": 1e3 * modelled_seconds(one, card),
            "modelled ms, ratio": modelled_seconds(one, card) / modelled_seconds(first, card),
        }
        for name, one in counted.items()
    ]


def _assumptions(settings: Mapping[str, object]) -> list[dict[str, str | float]]:
    """Return the card's figures, each with what is known of its default."""
    known = {
        "bandwidth_tb": "default measured on an H100",
        "bf16_tflops": "default measured on an H100",
        "tf32_tflops": "default from NVIDIA's data sheet, half of bfloat16's",
        "fp32_tflops": "default from NVIDIA's data sheet, scaled as bfloat16's was measured",
        "launch_us": "default assumed",
        "wait_us": "default assumed",
    }
    return [{"modelled with": f"{name}={settings[name]}", "source": source} for name, source in known.items()]


def _device_rows(counted: Mapping[str, Counted], card: Card) -> list[dict[str, str | float]]:
    """Return the device's time by operator, those that take longest in all first."""
    seconds: dict[str, dict[str, float]] = {name: defaultdict(float) for name in counted}
    for name, one in counted.items():
        for operator in one.operators:
            seconds[name][operator.name] += device_seconds(operator, card)
    names = {operator for times in seconds.values() for operator in times}
    longest = sorted(names, key=lambda operator: -sum(times.get(operator, 0.0) for times in seconds.values()))
    return [
        {"operator": operator, **{f"{name}, modelled ms": 1e3 * times[operator] for name, times in seconds.items()}}
        for operator in longest[:_NUM_OPERATORS_SHOWN]
    ]


def _wait_rows(counted: Mapping[str, Counted]) -> list[dict[str, str | float]]:
    """Return waits by model and line, the most frequent first."""
    rows: Iterator[dict[str, str | float]] = (
        {"of": name, "waits": number, "at": line, "for": what}
        for name, one in counted.items()
        if name != CHANNELS_LAST
        for (what, line), number in one.waits.most_common()
    )
    return list(rows) or [{"of": "all", "waits": 0, "at": "", "for": ""}]
