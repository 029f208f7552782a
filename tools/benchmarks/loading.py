"""Measure data loading with flips and multi-scale, against the pipeline of torchvision's references/detection.

What is compared, each in a process of its own:

* **resdet**: a file is decoded and flipped in the worker and travels as uint8 pixels of its own size; normalisation
  and the random scale (``DetectorSpec.min_size``) are done by the model on its device, in the training process.
* **torchvision, multiscale**: ``train.py --use-v2 --data-augmentation multiscale`` with its default backend, PIL:
  ``CocoDetection`` wrapped by ``wrap_dataset_for_transforms_v2`` (boxes, labels, image_id),
  ``RandomShortestSize`` of the PIL image, ``RandomHorizontalFlip``, ``ToImage``, ``ToDtype(float32, scale)``,
  ``ConvertBoundingBoxFormat``, ``SanitizeBoundingBoxes``, ``ToPureTensor``; ``collate_fn`` is ``tuple(zip(*batch))``.
  Its images are scaled in the worker and travel as float32. With this preset ``train.py`` passes ``_skip_resize=True``
  to the model, whose transform then only normalises and pads.
* **the same, tv_tensor**: with ``--backend tv_tensor``, which scales uint8 tensors.
* **torchvision, hflip**: its preset without the scale, which is then the model's (``min_size`` of the same 11 sizes),
  as it is ours: the same division of labour.

The reference's own ``transforms.py``, which it uses without ``--use-v2``, is not in torchvision's wheel; it also draws,
scales and flips masks that Faster R-CNN does not need, so it is slower than what is measured here.

All are given the same images in the same order, in batches that ``TrainBatches`` makes; images without boxes are left
out, as the reference leaves them out. Three figures are taken: from file to the batch that training receives, in one
process and one thread; the same and on to the network's input (normalised, scaled, padded), all on the CPU, so that
nothing is left out for whoever scales later; and what arrives from worker processes, which includes shared memory.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.own_process import in_own_process
from benchmarks.report import Report
from benchmarks.settings import check_counts
from resdet.data.dataset import DetectionDataset
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import UserError
from resdet.files import written_whole

MIN_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
"""Lengths of the shorter side that the reference draws from, pixels."""
MAX_SIZE = 1333

PIPELINES = {
    "resdet": "resdet",
    "multiscale": "torchvision, multiscale",
    "tv_tensor": "torchvision, multiscale, tv_tensor",
    "hflip": "torchvision, hflip (the model scales)",
}
"""What each is called in tables."""

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def benchmark_loading(
    *,
    num_images: int = 64,
    batch_size: int = 2,
    num_workers: int = 2,
    repeats: int = 3,
    images: str = "",
    annotations: str = "",
    seed: int = 0,
) -> Report:
    """Measure images per second of each pipeline; the module's docstring says what they do.

    Args:
        num_images: How many images are made, or taken from the front of the annotation file.
        batch_size: Images per batch; the reference's default is 2.
        num_workers: Worker processes of the last table.
        repeats: Processes that measure each pipeline, in turn; medians are given.
        images: Folder of real images; without it JPEGs are made up (``write_photos``).
        annotations: Their COCO annotation file.
        seed: Decides what is made up, drawn and flipped.

    Raises:
        UserError: If a setting is out of range, only one of ``images`` and ``annotations`` is given, or there are
            fewer images with boxes than a batch takes.
    """
    settings = dict(locals())
    check_counts(settings, "num_images", "batch_size", "num_workers", "repeats")
    if bool(images) != bool(annotations):
        raise UserError("images= and annotations= must be given together, or neither")
    with tempfile.TemporaryDirectory(prefix="resdet-benchmark-") as folder:
        if images:
            root, file = Path(images), Path(annotations)
        else:
            root, file = Path(folder), Path(folder, "instances.json")
            write_photos(root, file, num_images=num_images, seed=seed)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in PIPELINES}
        for _ in range(repeats):
            for name, taken in runs.items():
                arguments = (name, str(root), str(file), num_images, batch_size, num_workers, seed)
                environment = {"RESDET_CACHE": str(Path(folder, "cache"))}
                taken.append(in_own_process(measure_loading, *arguments, environment=environment))
    figures = {name: {key: median(run[key] for run in taken) for key in taken[0]} for name, taken in runs.items()}
    settings["kb_per_file"] = figures["resdet"]["kb_per_file"]
    settings["images_with_boxes"] = figures["resdet"]["num_images"]
    what = f"{settings['images_with_boxes']:.0f} images of {settings['kb_per_file']:.0f} kB, median of {repeats}"
    titles = {
        "batch": f"File to batch, one process, one thread ({what})",
        "input": "File to the network's input on the CPU, one process, one thread",
        "workers": f"Batches received from {num_workers} worker process{'es' if num_workers > 1 else ''}, per worker",
    }
    return Report(
        work="loading",
        settings=settings,
        tables={title: _rows(figures, stage) for stage, title in titles.items()},
    )


def _rows(figures: dict[str, dict[str, float]], stage: str) -> list[dict[str, str | float]]:
    return [
        {
            "pipeline": PIPELINES[name],
            "images/s": values[f"{stage} images/s"],
            "CPU ms/image": values[f"{stage} CPU ms"],
            "MB/image": values["input MB" if stage == "input" else "batch MB"],
            "resdet is times faster": figures["resdet"][f"{stage} images/s"] / values[f"{stage} images/s"],
        }
        for name, values in figures.items()
    ]


def measure_loading(
    pipeline: str, images: str, annotations: str, num_images: int, batch_size: int, num_workers: int, seed: int
) -> dict[str, float]:
    """Measure one pipeline in this process; arguments as for ``benchmark_loading``.

    Args:
        pipeline: One of ``PIPELINES``.
        images: Folder of the images.
        annotations: Their COCO annotation file.
        num_images: Images taken from its front.
        batch_size: Images per batch.
        num_workers: Worker processes of the last stage.
        seed: Decides order and flips.

    Returns:
        For each stage ("batch", "input", "workers") images per second, for workers of each of them, and milliseconds
        of this process's CPU per image; megabytes per image of a batch and of the network's input; images, and
        kilobytes of their files.

    Raises:
        UserError: If there are fewer images with boxes than a batch takes.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(seed)
    dataset = _dataset(Path(images), Path(annotations), num_images)
    if len(dataset) < batch_size:
        raise UserError(f"{annotations}: batches of {batch_size} need as many images with boxes, got {len(dataset)}")
    num_batches = len(dataset) // batch_size
    warm = max(num_batches, 4 * num_workers)  # workers have started, and their queues are full
    total = warm + num_batches + 4 * num_workers  # nor do they run dry before the end
    if pipeline == "resdet":
        batches = _resdet(dataset, batch_size, seed)
    else:
        batches = _torchvision(dataset, Path(images), Path(annotations), pipeline, batch_size, total, seed)
    to_input = _to_input(pipeline)
    megabytes: dict[str, list[float]] = {"batch MB": [], "input MB": []}

    def weigh(batch: Any) -> None:
        megabytes["batch MB"].append(sum(image.nbytes for image in batch[0]) / len(batch[0]) / 1e6)
        megabytes["input MB"].append(to_input(batch).nbytes / len(batch[0]) / 1e6)

    sizes = [os.path.getsize(Path(images, name)) for name in dataset.table.file_names.tolist()]
    figures = {"num_images": float(len(dataset)), "kb_per_file": sum(sizes) / len(sizes) / 1e3}
    stages: dict[str, tuple[int, Callable[[Any], object]]] = {
        "batch": (0, len),
        "input": (0, to_input),
        "workers": (num_workers, len),
    }
    for batch in itertools.islice(batches(0), num_batches):
        weigh(batch)
    for stage, (workers, use) in stages.items():
        received = batches(workers)
        for batch in itertools.islice(received, warm):
            use(batch)
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in itertools.islice(received, num_batches):
            use(batch)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        figures[f"{stage} images/s"] = num_batches * batch_size / seconds / max(workers, 1)
        figures[f"{stage} CPU ms"] = cpu_seconds / (num_batches * batch_size) * 1e3
        del received, batch
    return {**figures, **{key: float(np.mean(values)) for key, values in megabytes.items()}}


def _dataset(images: Path, annotations: Path, num_images: int) -> DetectionDataset:
    from resdet.data.augment.pipeline import build_augment
    from resdet.data.coco import read_coco
    from resdet.data.images import FolderImages

    table = read_coco(annotations)
    table = table.select_images(np.arange(min(num_images, table.num_images)))
    augment = build_augment([{"HorizontalFlip": {"p": 0.5}}])
    dataset = DetectionDataset(table, FolderImages(images, table), augment, training=True)
    return dataset.select_images(np.unique(table.image_of_box()[dataset.trained]))


def _resdet(dataset: DetectionDataset, batch_size: int, seed: int) -> Callable[[int], Iterator[Any]]:
    from resdet.data.loader import train_loader

    return lambda num_workers: train_loader(dataset, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _torchvision(
    dataset: DetectionDataset, images: Path, annotations: Path, pipeline: str, batch_size: int, total: int, seed: int
) -> Callable[[int], Iterator[Any]]:
    """Return torchvision's loader of the same batches, ``total`` of them.

    Source: torchvision's references/detection: ``get_coco`` of coco_utils.py, ``DetectionPresetTrain`` of presets.py,
    ``collate_fn`` of utils.py. Deviation: batches are those of ``TrainBatches``, which groups images by the shape of
    their sides as the reference's ``GroupedBatchSampler`` does.
    """
    import contextlib
    import io

    from torch.utils.data import DataLoader
    from torchvision import tv_tensors
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    from resdet.data.order import TrainBatches

    scale = [] if pipeline == "hflip" else [v2.RandomShortestSize(min_size=MIN_SIZES, max_size=MAX_SIZE)]
    flip = v2.RandomHorizontalFlip(p=0.5)
    transforms = v2.Compose(
        [
            *([v2.ToImage(), *scale, flip] if pipeline == "tv_tensor" else [*scale, flip, v2.ToImage()]),
            v2.ToDtype(torch.float, scale=True),
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = CocoDetection(str(images), str(annotations), transforms=transforms)
    items = wrap_dataset_for_transforms_v2(coco, target_keys=["boxes", "labels", "image_id"])
    position = {image_id: number for number, image_id in enumerate(coco.ids)}
    rows = [position[image_id] for image_id in dataset.table.image_ids.tolist()]
    keys = itertools.islice(TrainBatches(dataset.table.sizes, batch_size, seed=seed), total)
    order = [[rows[index] for index, _ in batch] for batch in keys]
    return lambda num_workers: iter(
        DataLoader(items, batch_sampler=order, num_workers=num_workers, collate_fn=_reference_collate)
    )


def _reference_collate(batch: Any) -> tuple[Any, ...]:
    return tuple(zip(*batch, strict=True))


def _to_input(pipeline: str) -> Callable[[Any], Tensor]:
    """Return a function that makes the network's input of a batch, as in the training step of each library."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    from resdet.models.seeded import SeededTransform

    if pipeline == "resdet":
        transform: Any = SeededTransform(MIN_SIZES, MAX_SIZE, _MEAN, _STD)
    else:
        transform = GeneralizedRCNNTransform(MIN_SIZES, MAX_SIZE, _MEAN, _STD, _skip_resize=pipeline != "hflip")
    transform.train()

    def to_input(batch: Any) -> Tensor:
        images = [image if image.is_floating_point() else image.float().div_(255) for image in batch[0]]
        made: Tensor = transform(images, list(batch[1]))[0].tensors
        return made

    return to_input


def write_photos(folder: Path, annotations: Path, *, num_images: int, seed: int = 0) -> None:
    """Make up JPEG files of 640 x 480 pixels that weigh what COCO's weigh (about 130 kB), and their annotations.

    They are pictures of ``ShapesImages`` under noise whose amplitude falls with its frequency, as in photographs: a
    decoder's time goes by the bytes and by the pixels. Colours are not subsampled, as in COCO's files.

    Args:
        folder: Where the images go.
        annotations: The COCO annotation file to be written.
        num_images: At least 1.
        seed: Equal seeds give equal pixels.
    """
    from PIL import Image

    side, (height, width) = 640, (480, 640)
    table, pictures = shapes_table(num_images, side, seed), ShapesImages(side, seed)
    boxes = table.boxes_xywh * [1, height / side, 1, height / side]
    image_of_box = table.image_of_box()
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        photo = _squeezed(pictures(index), (height, width)) + _noise(rng, (height, width))
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(
            folder / f"{index + 1:012d}.jpg", quality=90, subsampling="4:4:4"
        )
    document = {
        "images": [
            {"id": index + 1, "file_name": f"{index + 1:012d}.jpg", "height": height, "width": width}
            for index in range(num_images)
        ],
        "categories": [{"id": category.category_id, "name": category.name} for category in table.categories],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(image_of_box[row]) + 1,
                "category_id": table.categories[int(table.labels[row]) - 1].category_id,
                "bbox": boxes[row].round(2).tolist(),
                "area": float(boxes[row, 2] * boxes[row, 3]),
                "iscrowd": 0,
            }
            for row in range(table.num_boxes)
        ],
    }
    with written_whole(annotations) as temporary:
        temporary.write_text(json.dumps(document))


def _squeezed(picture: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    resized = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, dtype=np.float32)


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return noise ``[H, W, 3]`` of octaves from 2 pixels to 64, each 1.5 times as strong as the one before."""
    total = np.zeros((*size, 3), dtype=np.float32)
    for octave in range(1, 7):
        cells = rng.normal(0, 3.2 * 1.5**octave / 1.5, size=(size[0] >> octave, size[1] >> octave, 3))
        total += cv2.resize(cells.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return total
