"""Measure loading an annotation file of COCO's size, and the memory of its table in data-loading workers."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

from torch.utils.data import DataLoader, Dataset

from benchmarks.coco_json import write_coco_json
from benchmarks.own_process import check_linux, forget_peak, in_own_process, peak_mb
from benchmarks.report import Report
from benchmarks.settings import check_counts
from resdet.data.annotations import AnnotationTable
from resdet.errors import UserError

START_METHODS = ("fork", "spawn", "forkserver")


def benchmark_annotations(
    *,
    num_images: int = 118_287,
    num_boxes: int = 860_000,
    num_workers: int = 8,
    repeats: int = 3,
    start_methods: str = "fork,spawn",
    seed: int = 0,
) -> Report:
    """Compare loading with pycocotools' and measure what the table adds to the memory of workers.

    Loading: pycocotools, this package with an empty cache (which includes writing it) and with that cache, in turn,
    each in a process of its own, from a file that the operating system has in memory. Times leave imports out; peaks
    of memory are above what the process had before loading.

    Memory: proportional set size (PSS: a page that n processes share counts 1/n in each) of a process and its
    DataLoader workers, together and without program code, while the workers index every image of the table once;
    against the same processes indexing nothing.

    Args:
        num_images: Images in the generated annotation file.
        num_boxes: Annotations in it.
        num_workers: Worker processes.
        repeats: Measurements of each way of loading; medians are reported.
        start_methods: How workers are started, separated by commas: fork, spawn, forkserver.
        seed: Seed of the file's contents.

    Raises:
        UserError: If a setting is out of range, or this is not Linux, which alone reports proportional memory.
    """
    settings = dict(locals())
    check_counts(settings, "num_images", "num_boxes", "num_workers", "repeats")
    methods = start_methods.split(",")
    unknown = [method for method in methods if method not in START_METHODS]
    if unknown:
        raise UserError(f"start_methods must be among {', '.join(START_METHODS)}, got {', '.join(map(repr, unknown))}")
    check_linux("smaps")

    with tempfile.TemporaryDirectory(prefix="resdet-benchmark-") as folder:
        path = Path(folder, "instances.json")
        write_coco_json(path, num_images=num_images, num_boxes=num_boxes, seed=seed)
        settings["file_mb"] = path.stat().st_size / 1e6
        caches = [Path(folder, f"cache{number}") for number in range(repeats)]
        loading = _loading_rows(path, caches)
        memory = [_memory_row(path, caches[0], method, num_workers, num_images) for method in methods]
    title = f"Loading {num_images:,} images and {num_boxes:,} annotations ({settings['file_mb']:.0f} MB)"
    return Report(
        work="annotations",
        settings=settings,
        tables={
            f"{title}, median of {repeats}": loading,
            "Proportional memory that the table adds to a process and its workers, over an epoch": memory,
        },
    )


def _loading_rows(path: Path, caches: list[Path]) -> list[dict[str, str | float]]:
    """Measure each way of loading once for each cache, in turn."""
    ways: dict[str, list[dict[str, float]]] = {"pycocotools.COCO": [], "cold cache": [], "from cache": []}
    for cache in caches:
        for what, runs in ways.items():
            environment = {"RESDET_CACHE": str(cache)}
            runs.append(in_own_process(measure_loading, path, what == "pycocotools.COCO", environment=environment))
    medians = {what: {key: median(run[key] for run in runs) for key in runs[0]} for what, runs in ways.items()}
    return [
        {
            "what": what,
            "seconds": row["seconds"],
            "times faster": medians["pycocotools.COCO"]["seconds"] / row["seconds"],
            "CPU seconds": row["cpu_seconds"],
            "peak [MB]": row["peak_mb"],
        }
        for what, row in medians.items()
    ]


def _memory_row(path: Path, cache: Path, method: str, num_workers: int, num_images: int) -> dict[str, str | float]:
    """Measure the memory of processes with the table and without it."""
    environment = {"RESDET_CACHE": str(cache)}
    with_table, without = (
        in_own_process(measure_memory, path, method, num_workers, num_images, loads, environment=environment)
        for loads in (True, False)
    )
    return {
        "workers": f"{num_workers} by {method}",
        **{f"{when} [MB]": with_table[when] - without[when] for when in with_table},
        "all, with table [MB]": with_table["end"],
    }


def measure_loading(path: Path, by_pycocotools: bool) -> dict[str, float]:
    """Load an annotation file; return seconds, seconds of CPU and the peak of memory above the level before.

    Args:
        path: The annotation file.
        by_pycocotools: Whether pycocotools loads it, or this package.
    """
    from pycocotools.coco import COCO

    from resdet.data.coco import read_coco

    load: Callable[[Path], object] = COCO if by_pycocotools else read_coco
    before = forget_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    loaded = load(path)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = peak_mb() - before
    del loaded
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak}


def measure_memory(
    path: Path, start_method: str, num_workers: int, num_images: int, loads_table: bool
) -> dict[str, float]:
    """Return the proportional memory in MB of this process and its workers at three points of an epoch of indexing.

    Args:
        path: The annotation file.
        start_method: fork, spawn or forkserver.
        num_workers: Worker processes.
        num_images: Images of the table.
        loads_table: Whether there is a table, or the workers index nothing.
    """
    from resdet.data.coco import read_coco

    # More workers than cores are intended.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    items = _Items(read_coco(path) if loads_table else None, num_images)
    loader = DataLoader(
        items,
        batch_size=max(1, min(64, num_images // num_workers)),
        num_workers=num_workers,
        collate_fn=sum,
        multiprocessing_context=start_method,
        persistent_workers=True,  # alive to be measured after the last batch
    )
    num_batches = len(loader)
    pss = {}
    num_boxes = 0
    for number, boxes in enumerate(loader):
        num_boxes += boxes
        if number == 0:
            pss["start"] = _pss_mb()
        if number == num_batches // 2:
            pss["middle"] = _pss_mb()
    pss["end"] = _pss_mb()
    assert items.table is None or num_boxes == items.table.num_boxes
    return pss


class _Items(Dataset[int]):
    """The reads of a dataset from its table for each image."""

    def __init__(self, table: AnnotationTable | None, num_images: int) -> None:
        self.table = table
        self._num_images = num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> int:
        table = self.table
        if table is None:
            return 0
        rows = table.rows(index)
        columns = (table.labels, table.area, table.crowd, table.difficult, table.annotation_ids)
        values = [column[rows].copy() for column in columns]
        name, image_id = table.file_names[index], int(table.image_ids[index])
        assert name
        assert image_id
        boxes, _ = table.boxes_of(index)
        assert len(boxes) == len(values[0])
        return len(boxes)


def _pss_mb() -> float:
    """Return the proportional memory of this process and its children in MB, without program code.

    Code is the same with and without a table, but its share falls and rises with the other programs on the machine
    that use the same libraries, by far more than a table weighs.
    """
    total = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        is_code = False
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            key, *values = line.split()
            if not key.endswith(":"):  # a mapping's first line; the sixth word is its file
                name = values[4] if len(values) > 4 else ""
                is_code = ".so" in name or name == os.path.realpath(sys.executable)
            elif key == "Pss:" and not is_code:
                total += int(values[0])
    return total / 1000
