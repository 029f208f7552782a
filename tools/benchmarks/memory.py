"""Measure the memory of a training step: torchvision's Faster R-CNN and ours, each in a process of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.bound import PRECISIONS
from benchmarks.own_process import check_linux, forget_peak, in_own_process, peak_mb
from benchmarks.pair import Variant, build_ours, build_torchvision, input_shape, shape_text, weights_text
from benchmarks.pictures import annotated_pictures
from benchmarks.report import Report
from benchmarks.settings import check_counts, find_device, parse_sizes
from benchmarks.timing import REFERENCES
from benchmarks.training import make_step
from resdet.files import save_tensors
from resdet.malloc import keep_freed_memory
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.precision import Precision

NUM_STEPS = 2
"""Steps of which the peak is taken: from the second on the optimizer has its momentum during the forward pass."""


def benchmark_memory(
    *,
    images: str = "",
    annotations: str = "",
    weights: str = "",
    arch: str = "resnet101",
    sizes: str = "480/640,800/1333",
    batch_size: int = 2,
    device: str = "auto",
    seed: int = 0,
) -> Report:
    """Measure the peak of memory over two training steps, above what the process had before its first.

    What it had is the model and the pictures; what it takes is activations, gradients and the optimizer's state. The
    steps are those of ``benchmark_training``. On a CPU it is resident memory (VmHWM), on a GPU what torch allocated.

    Args:
        images: Folder of photographs; empty for generated pictures.
        annotations: Their boxes, a COCO json.
        weights: As for ``benchmark_training``.
        arch: The body, unless ``weights`` holds a detector.
        sizes: Shorter side that images are scaled to and longest side allowed; several, separated by commas.
        batch_size: Images of a step.
        device: auto, cpu or cuda.
        seed: Of random weights.

    Raises:
        UserError: If a setting is out of range, there are too few images, torchvision has no such detector, or memory
            is to be read on a CPU and this is not Linux.
    """
    settings = dict(locals())
    check_counts(settings, "batch_size")
    check_counts(settings, "seed", least=0)
    parsed = parse_sizes(sizes)
    torch_device = find_device(device)
    if torch_device.type == "cpu":
        check_linux("clear_refs")
    pictures = annotated_pictures(images, annotations, num_images=batch_size, batch_size=batch_size)
    tables: dict[str, list[dict[str, str | float]]] = {}
    with tempfile.TemporaryDirectory(prefix="resdet-benchmark-") as folder:
        path = Path(folder, "detector.pt")
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
            save_tensors(checkpoint_payload(ours), path)
            peaks = {
                f"{'ours' if is_ours else 'torchvision'} {precision}": in_own_process(
                    measure_steps, path, is_ours, precision, images, annotations, batch_size, torch_device
                )["peak_mb"]
                for precision in PRECISIONS
                for is_ours in (False, True)
            }
            title = (
                f"Memory of a training step: {weights_text(ours, weights)}; {batch_size} of {pictures.origin} at "
                f"{min_size}/{max_size} ({shape_text([input_shape(ours, pictures.batches[0])])}), {torch_device.type}"
            )
            tables[title] = [
                {
                    "what": name,
                    "peak [MB]": peak,
                    **{f"of {reference} [%]": 100 * peak / peaks[reference] for reference in REFERENCES},
                }
                for name, peak in peaks.items()
            ]
    return Report(work="memory", settings=settings, tables=tables)


def measure_steps(
    path: Path,
    is_ours: bool,
    precision: Precision,
    images: str,
    annotations: str,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Take ``NUM_STEPS`` training steps and return the peak of memory above the level before, ``peak_mb``.

    Args:
        path: Checkpoint of our detector.
        is_ours: Whether to measure ours, or torchvision's.
        precision: Of the forward pass.
        images: Folder of photographs; empty for generated pictures.
        annotations: Their boxes.
        batch_size: Images of a step.
        device: Where to compute.
    """
    batches = annotated_pictures(images, annotations, num_images=batch_size, batch_size=batch_size).batches
    model = load_detector(path)
    if not is_ours:
        model = build_torchvision(model)
    model = model.to(device).train()
    if is_ours and device.type == "cpu":
        keep_freed_memory()  # as training does
    step = make_step(Variant(model, precision, is_ours, device), batches, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before_mb = forget_peak()
    for number in range(NUM_STEPS):
        step(number)
    if device.type == "cuda":
        return {"peak_mb": (torch.cuda.max_memory_allocated(device) - before) / 1e6}
    return {"peak_mb": peak_mb() - before_mb}
