"""Time detection by torchvision's Faster R-CNN and by ours with the same weights, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from benchmarks.bound import Flops, best_rates, bound_rows, count_flops
from benchmarks.pair import Variant, build_ours, float_images, input_shape, shape_text, variants, weights_text
from benchmarks.peers import Detect, detection_peers, feature_runs, parse_peers
from benchmarks.pictures import photographs
from benchmarks.report import Report
from benchmarks.settings import check_counts, check_size, find_device
from benchmarks.timing import in_turn, time_rows
from resdet.data.loader import Batch
from resdet.models.detector import Detector
from resdet.models.int8_calibration import quantize_detector
from resdet.precision import autocast
from resdet.types import Prediction

MATCH_PX = 1.0
"""Corners of a detection may be this far from those of another, in pixels, for the two to be the same."""

Found = dict[str, dict[int, list[Prediction]]]
"""Detections of a batch's images, by the model's name and the batch's number."""


def benchmark_inference(
    *,
    images: str = "",
    weights: str = "",
    arch: str = "resnet101",
    min_size: int = 800,
    max_size: int = 1333,
    batch_size: int = 1,
    num_images: int = 8,
    repeats: int = 8,
    warmup: int = 1,
    int8: bool = False,
    peers: str = "",
    device: str = "auto",
    seed: int = 0,
) -> Report:
    """Time ``model(images)`` of torchvision's Faster R-CNN and of ours, in float32 and under bfloat16 autocast.

    Both have the same weights and knobs and are given the same float images on the device; scaling, padding and
    suppression are inside. Each repetition runs each of the four on the next batch, in turn. The bound is the
    multiply-adds of torchvision's convolutions and fully connected layers over the best rate that any matrix product
    or convolution reached on this machine: pooling, norms, proposals and suppression count as free.

    Args:
        images: Folder of photographs, the first of which are taken; empty for generated pictures.
        weights: A detector's file, a body's (heads are random then), or empty for random ones; see ``build_ours``.
        arch: The body, unless ``weights`` holds a detector.
        min_size: Shorter side that images are scaled to, in pixels.
        max_size: Longest side allowed.
        batch_size: Images of a call.
        num_images: Images to go through.
        repeats: Calls of each, of which medians are given.
        warmup: Calls of each before these.
        int8: Whether to time ours in int8 too, on the CPU, calibrated on the same images.
        peers: What else runs our export on the CPU, separated by commas: onnxruntime, openvino (body and pyramid alone
            too, with ``int8`` and NNCF in int8 as well).
        device: auto, cpu or cuda.
        seed: Of random weights.

    Raises:
        UserError: If a setting is out of range, there are too few images, or torchvision has no such detector.
    """
    settings = dict(locals())
    check_counts(settings, "batch_size", "num_images", "repeats")
    check_counts(settings, "warmup", "seed", least=0)
    check_size(min_size, max_size)
    torch_device = find_device(device)
    peer_names = parse_peers(peers)
    pictures = photographs(images, num_images=num_images, batch_size=batch_size)
    sizes = {"min_size": min_size, "max_size": max_size}
    ours = build_ours(arch=arch, weights=weights, batches=pictures.batches, num_classes=0, seed=seed, **sizes)
    settings |= {"arch": ours.spec.arch, "device": str(torch_device)}
    models = variants(ours, torch_device, training=False)
    reference = models["torchvision fp32"].model
    if int8:
        models["ours int8"] = quantized_variant(ours, pictures.batches)
    runs = detection_runs(models, pictures.batches) | detection_peers(peer_names, ours, pictures.batches)
    found: Found = {name: {} for name in runs}
    rates = best_rates(torch_device)
    recorded = _recorded(runs, found, len(pictures.batches))
    seconds = in_turn(recorded, repeats=repeats, warmup=warmup, device=torch_device)
    rates = best_rates(torch_device, rates)
    used = [repetition % len(pictures.batches) for repetition in range(repeats)]
    flops = _median_flops(reference, [float_images(batch, torch_device) for batch in pictures.batches], used)
    shapes = shape_text([input_shape(reference, pictures.batches[number]) for number in used])
    tables: dict[str, Sequence[Mapping[str, str | float]]] = {
        f"Inference: {weights_text(ours, weights)}; {batch_size} of {pictures.origin} at {min_size}/{max_size} "
        f"({shapes}), {torch_device.type}; medians of {repeats}": time_rows(seconds),
        "What arithmetic alone would take": bound_rows(rates, flops, seconds),
        "Detections against ours in the same precision": _agreements(found),
    }
    if peer_names:
        rows = [row for name in peer_names for row in peer_rows(seconds, name)]
        tables["Detectors, the peers' times over ours"] = rows
    if "openvino" in peer_names:
        inputs = [ours.transform(float_images(batch, torch.device("cpu")))[0].tensors for batch in pictures.batches]
        parts = feature_runs(ours, models["ours int8"].model if int8 else None, inputs)
        times = in_turn(parts, repeats=repeats, warmup=warmup, device=torch_device)
        tables["Body and pyramid alone"] = peer_rows(times, "openvino")
    return Report(work="inference", settings=settings, tables=tables)


def _agreements(found: Found) -> list[dict[str, str | float]]:
    """Compare what each of the others found with what ours did in the same precision."""
    return [
        {"of": name, **agreement(_in_order(found[f"ours {name.split()[1]}"]), _in_order(found[name]))}
        for name in found
        if not name.startswith("ours") and name != "torchvision bf16"
    ]


def peer_rows(seconds: Mapping[str, Sequence[float]], peer: str) -> list[dict[str, str | float]]:
    """Return medians of a peer and of ours by precision, and their ratio."""
    precisions = [name.split()[1] for name in seconds if name.startswith(f"{peer} ")]
    return [
        {
            "peer": peer,
            "precision": precision,
            "peer [s]": median(seconds[f"{peer} {precision}"]),
            "ours [s]": median(seconds[f"ours {precision}"]),
            "peer / ours": median(seconds[f"{peer} {precision}"]) / median(seconds[f"ours {precision}"]),
        }
        for precision in precisions
        if f"ours {precision}" in seconds
    ]


def _in_order(found: Mapping[int, list[Prediction]]) -> list[Prediction]:
    return [image for number in sorted(found) for image in found[number]]


def _recorded(runs: Mapping[str, Detect], found: Found, num_batches: int) -> dict[str, Callable[[int], None]]:
    """Return runs that keep what they detect by the number of the batch."""

    def record(name: str, detect: Detect) -> Callable[[int], None]:
        def run(repetition: int) -> None:
            found[name][repetition % num_batches] = detect(repetition)

        return run

    return {name: record(name, detect) for name, detect in runs.items()}


def quantized_variant(ours: Detector, batches: Sequence[Batch]) -> Variant:
    """Quantise our detector, calibrated on these images; an int8 detector computes on the CPU, whatever the others do.

    Raises:
        UserError: If the CPU or torch cannot compute in int8.
    """
    host = torch.device("cpu")
    images = [image for batch in batches for image in float_images(batch, host)]
    return Variant(quantize_detector(ours.eval(), images), "fp32", is_ours=True, device=host)


def detection_runs(models: Mapping[str, Variant], batches: Sequence[Batch]) -> dict[str, Detect]:
    """Return, for each model, a function that detects on a batch by the number of the repetition.

    Args:
        models: What to run, each on batches on its own device.
        batches: To be used over and over.
    """

    def run(variant: Variant) -> Detect:
        inputs = [float_images(batch, variant.device) for batch in batches]

        @torch.no_grad()
        def detect(repetition: int) -> list[Prediction]:
            with autocast(variant.device, variant.precision):
                found: list[Prediction] = variant.model(inputs[repetition % len(inputs)])
            return found

        return detect

    return {name: run(variant) for name, variant in models.items()}


@torch.no_grad()
def _median_flops(model: FasterRCNN, batches: Sequence[list[Tensor]], used: Sequence[int]) -> Flops:
    """Return the operations of the batch in the middle, by operations, of those used."""
    flops = {number: count_flops(lambda n=number: model(batches[n])) for number in set(used)}  # type: ignore[misc]
    return sorted((flops[number] for number in used), key=lambda one: one.total)[len(used) // 2]


def agreement(reference: Sequence[Prediction], others: Sequence[Prediction]) -> dict[str, str | float]:
    """Compare detections in the same images, given in any order.

    A detection's counterpart is the nearest of the same class that no better one has, no corner further off than
    ``MATCH_PX``.

    Args:
        reference: Of each image, best first.
        others: Of each image.

    Returns:
        How many there are, how many of both sides have no counterpart, and the largest differences of the others.
    """
    num_unmatched = 0
    box_difference = score_difference = 0.0
    for one, other in zip(reference, others, strict=True):
        distances = (one["boxes"][:, None] - other["boxes"][None]).abs().amax(dim=2)  # [N, M]
        distances[one["labels"][:, None] != other["labels"][None]] = torch.inf
        num_matched = 0
        for index, row in enumerate(distances if distances.shape[1] else []):
            nearest = int(row.argmin())
            distance = float(row[nearest])
            if distance > MATCH_PX:
                continue
            num_matched += 1
            box_difference = max(box_difference, distance)
            score_difference = max(score_difference, _difference(one["scores"][index], other["scores"][nearest]))
            distances[:, nearest] = torch.inf
        num_unmatched += len(one["boxes"]) + len(other["boxes"]) - 2 * num_matched
    return {
        "detections": sum(len(image["boxes"]) for image in reference),
        "unmatched": num_unmatched,
        "largest difference of a corner [px]": f"{box_difference:.1e}",
        "of a score": f"{score_difference:.1e}",
    }


def _difference(one: Tensor, other: Tensor) -> float:
    return abs(float(one) - float(other))
