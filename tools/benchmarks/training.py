"""Time a training step of torchvision's Faster R-CNN and of ours with the same weights, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data._utils.pin_memory import pin_memory

from benchmarks.bound import Flops, best_rates, bound_rows, count_flops
from benchmarks.pair import Variant, build_ours, float_images, input_shape, shape_text, variants, weights_text
from benchmarks.pictures import Pictures, annotated_pictures
from benchmarks.report import Report
from benchmarks.settings import check_counts, find_device, parse_sizes
from benchmarks.timing import in_turn, time_rows
from resdet.data.loader import Batch
from resdet.errors import TrainingError
from resdet.models.detector import Detector
from resdet.precision import Precision, autocast
from resdet.training.losses import detection_losses
from resdet.training.optim import build_optimizer
from resdet.training.step import accumulate_gradients
from resdet.types import target_to

LR = 1e-5
"""Learning rate of the timed steps.

A step's arithmetic is the same at any rate. At this one the weights of all four stay where they were, so that all find
as many proposals and positives in the last step as in the first; putting 240 MB of weights back before each step
instead would leave the caches as no training finds them.
"""

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


def benchmark_training(
    *,
    images: str = "",
    annotations: str = "",
    weights: str = "",
    arch: str = "resnet101",
    sizes: str = "480/640,800/1333",
    batch_size: int = 2,
    num_images: int = 8,
    repeats: int = 4,
    warmup: int = 1,
    device: str = "auto",
    seed: int = 0,
) -> Report:
    """Time a training step of torchvision's Faster R-CNN and of ours, in float32 and under bfloat16 autocast.

    Each step goes from pictures in memory to stepped weights, with C3 to C5 trained by SGD with momentum 0.9 and weight
    decay 1e-4, as each library trains. Ours: ``accumulate_gradients`` from uint8 pixels, which it turns into float
    itself, ``build_optimizer``, the norm of the gradient and a look whether that and the loss are finite.
    torchvision's, as in its ``references/detection/engine.py``: from float pixels, ``torch.optim.SGD``, a look whether
    the loss is finite.
    Neither reads or augments images here. Each repetition runs each of the four on the next batch, in turn; each has
    its own copy of the weights.

    The bound is as for inference; the multiply-adds of the gradients are those that torchvision's backward pass does.

    Args:
        images: Folder of photographs; empty for generated pictures.
        annotations: Their boxes, a COCO json.
        weights: A detector's file, a body's (heads are random then), or empty for random ones; see ``build_ours``.
        arch: The body, unless ``weights`` holds a detector.
        sizes: Shorter side that images are scaled to and longest side allowed; several, separated by commas.
        batch_size: Images of a step.
        num_images: Images to go through.
        repeats: Steps of each, of which medians are given.
        warmup: Steps of each before these.
        device: auto, cpu or cuda.
        seed: Of random weights, and of what torchvision samples.

    Raises:
        UserError: If a setting is out of range, there are too few images, or torchvision has no such detector.
        TrainingError: If a loss is not finite.
    """
    settings = dict(locals())
    check_counts(settings, "batch_size", "num_images", "repeats")
    check_counts(settings, "warmup", "seed", least=0)
    parsed = parse_sizes(sizes)
    torch_device = find_device(device)
    pictures = annotated_pictures(images, annotations, num_images=num_images, batch_size=batch_size)
    rates = best_rates(torch_device)
    tables = {}
    for min_size, max_size in parsed:
        ours = build_ours(
            arch=arch,
            weights=weights,
            batches=pictures.batches,
            min_size=min_size,
            max_size=max_size,
            num_classes=pictures.num_classes,
            seed=seed,
        )
        settings |= {"arch": ours.spec.arch, "device": str(torch_device)}
        seconds, losses, flops, shapes = _measure(
            ours, pictures, torch_device, repeats=repeats, warmup=warmup, seed=seed
        )
        rates = best_rates(torch_device, rates)
        title = (
            f"Training: {weights_text(ours, weights)}; forward, backward and SGD step on {batch_size} of "
            f"{pictures.origin} at {min_size}/{max_size} ({shapes}), {torch_device.type}; medians of {repeats}"
        )
        tables[title] = [{**row, "loss": losses[str(row["what"])]} for row in time_rows(seconds)]
        tables[f"What arithmetic alone would take at {min_size}/{max_size}"] = bound_rows(rates, flops, seconds)
    return Report(work="training", settings=settings, tables=tables)


def make_step(variant: Variant, batches: list[Batch], device: torch.device) -> Callable[[int], float]:
    """Return a function that takes a training step on a batch, by its number, and returns the loss.

    Args:
        variant: What to train, in training mode and on ``device``.
        batches: To be used over and over.
        device: Where to compute.

    Raises:
        TrainingError: By the function, if the loss or gradient is not finite.

    Source: torchvision's ``references/detection/engine.py`` and ``train.py``; ``resdet.training.loop``.
    """
    if variant.is_ours:
        assert isinstance(variant.model, Detector)
        if device.type != "cpu":
            # As the loader does.
            batches = [pin_memory(batch) for batch in batches]  # type: ignore[no-untyped-call]
        return _our_step(variant.model, variant.precision, batches, device)
    return _torchvision_step(variant, batches, device)


def _our_step(
    model: Detector, precision: Precision, batches: list[Batch], device: torch.device
) -> Callable[[int], float]:
    optimizer = build_optimizer(model, name="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def losses(parallel: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return detection_losses(model, parallel, batch, precision)

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        values = accumulate_gradients(losses, model, [batch], 1, scaler)
        norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        loss, norm_value = torch.stack([values["loss"], norm.detach()]).tolist()
        _check_finite(loss, norm_value, "ours", precision)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _torchvision_step(variant: Variant, batches: list[Batch], device: torch.device) -> Callable[[int], float]:
    model = variant.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    host = torch.device("cpu")
    pixels = [float_images(batch, host) for batch in batches]

    def step(number: int) -> float:
        number %= len(batches)
        images = [image.to(device) for image in pixels[number]]
        targets = [target_to(target, device) for target in batches[number].targets]
        with autocast(device, variant.precision):
            losses = model(images, targets)
            loss = torch.stack(list(losses.values())).sum()
        value = loss.item()
        _check_finite(value, 0.0, "torchvision", variant.precision)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(value)

    return step


def _check_finite(loss: float, norm: float, name: str, precision: Precision) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"{name} {precision}: loss {loss}, gradient norm {norm}: must be finite to be compared")


def _measure(
    ours: Detector, pictures: Pictures, device: torch.device, *, repeats: int, warmup: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, float], Flops, str]:
    """Return seconds by variant, each one's median loss, the operations of a step, and the sizes of inputs."""
    batches = pictures.batches
    models = variants(ours, device, training=True)
    losses: dict[str, list[float]] = {name: [] for name in models}

    def logged(name: str, step: Callable[[int], float]) -> Callable[[int], None]:
        return lambda number: losses[name].append(step(number))

    torch.manual_seed(seed)
    runs = {name: logged(name, make_step(variant, batches, device)) for name, variant in models.items()}
    seconds = in_turn(runs, repeats=repeats, warmup=warmup, device=device)

    reference = models["torchvision fp32"].model
    used = [repetition % len(batches) for repetition in range(repeats)]
    shapes = [input_shape(reference, batches[number]) for number in used]
    # A step's operations depend on the input's size and on how many proposals are sampled, which is nearly constant.
    middle = sorted(zip(shapes, used, strict=True))[len(used) // 2][1]
    flops = count_flops(
        lambda: reference(
            float_images(batches[middle], device), [target_to(target, device) for target in batches[middle].targets]
        ),
        backward=True,
    )
    return seconds, {name: median(values[-repeats:]) for name, values in losses.items()}, flops, shape_text(shapes)
