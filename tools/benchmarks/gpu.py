"""Measure everything that a CUDA device is claimed to do, within a few minutes, in one report."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import FasterRCNN

from benchmarks.cuda_waits import counted_waits, measured_waits
from benchmarks.gpu_model import random_batch
from benchmarks.inference import detection_runs
from benchmarks.pair import Variant, build_ours, build_torchvision
from benchmarks.report import Report
from benchmarks.settings import check_counts, check_positive, check_size, parse_counts
from benchmarks.training import make_step
from resdet.config import load_config
from resdet.data.loader import Batch
from resdet.errors import UserError
from resdet.models.detector import Detector
from resdet.training.detection import train

PARTS = ("speed", "waits", "profile", "fine_tune", "tests")
"""What is measured, in this order."""

Rows = list[dict[str, str | float]]

_NUM_PROFILED = 30
_NOT_PASSED = ("failure", "error", "skipped")
_ROOT = Path(__file__).resolve().parents[2]
_LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


class Work(NamedTuple):
    """What all parts share.

    Attributes:
        ours: Our detector on the CPU.
        device: Where to measure.
        sizes: Shorter and longer side of the networks' input.
        batch_sizes: Images of a call.
        repeats: Runs of each, of which medians are given.
        warmup: Runs of each before these.
        seed: Of pictures and weights.
    """

    ours: Detector
    device: torch.device
    sizes: tuple[int, int]
    batch_sizes: list[int]
    repeats: int
    warmup: int
    seed: int

    @property
    def size_text(self) -> str:
        """The networks' input in words."""
        return f"{self.sizes[0]}x{self.sizes[1]}"

    def batch(self, num_images: int) -> Batch:
        """Return pictures that are scaled to ``sizes``."""
        num_classes = self.ours.roi_heads.box_predictor.cls_score.out_features
        return random_batch(num_images, *self.sizes, self.seed, num_classes)


def benchmark_gpu(
    *,
    arch: str = "resnet101",
    weights: str = "",
    min_size: int = 800,
    max_size: int = 1333,
    batch_sizes: str = "8,16",
    repeats: int = 8,
    warmup: int = 2,
    parts: str = ",".join(PARTS),
    bccd: str = "",
    steps: int = 200,
    minutes: float = 8.0,
    figures: str = "",
    device: str = "cuda",
    seed: int = 0,
) -> Report:
    """Run the tests for a GPU there, and measure speed, waits, a profile and a fine-tune, under bfloat16 autocast.

    Both libraries' detectors are timed in turn by the device's own events, torchvision's and ours in torch's default
    layout and in channels-last. A part that fails leaves its error in the report and the others their figures; parts
    that would begin after ``minutes`` are left out.

    Args:
        arch: The body, unless ``weights`` holds a detector.
        weights: A detector's file, a body's (heads are random then), or empty for random ones; see ``build_ours``.
        min_size: Shorter side of the networks' input, in pixels.
        max_size: Its longer side.
        batch_sizes: Images of a call; several, separated by commas.
        repeats: Runs of each, of which medians are given.
        warmup: Runs of each before these.
        parts: Which of ``PARTS`` to do, separated by commas.
        bccd: Folder of BCCD in VOC's layout, for a fine-tune of ``steps`` steps; empty leaves it out.
        steps: Its steps.
        minutes: Time for everything.
        figures: A file to which the report is written after each part, so that nothing is lost if the machine is taken
            away; empty for none.
        device: cuda; cpu tries the parts that can run there, and measures nothing of interest.
        seed: Of random weights and pictures.

    Raises:
        UserError: If there is no CUDA device, or a setting is out of range.
    """
    settings = dict(locals())
    check_counts(settings, "repeats", "steps")
    check_counts(settings, "warmup", "seed", least=0)
    check_positive(settings, "minutes")
    check_size(min_size, max_size)
    numbers = parse_counts("batch_sizes", batch_sizes)
    wanted = [part.strip() for part in parts.split(",")]
    if not set(wanted) <= set(PARTS):
        raise UserError(f"parts must be of {', '.join(PARTS)}, separated by commas, got {parts!r}")
    deadline = time.perf_counter() + 60 * minutes
    where = _device(device)
    sizes = {"min_size": min_size, "max_size": max_size}
    pictures = [random_batch(1, min_size, max_size, seed)]
    ours = build_ours(arch=arch, weights=weights, batches=pictures, num_classes=0, seed=seed, **sizes)
    work = Work(ours, where, (min_size, max_size), numbers, repeats, warmup, seed)
    jobs: dict[str, Callable[[], Mapping[str, Rows]]] = {
        "speed": lambda: measure_speed(work),
        "waits": lambda: compare_waits(work),
        "profile": lambda: profile_ours(work),
        "fine_tune": lambda: fine_tune(Path(bccd), weights, steps, where),
        "tests": lambda: run_tests(deadline - time.perf_counter()),
    }
    jobs = {name: job for name, job in jobs.items() if name in wanted and (bccd or name != "fine_tune")}
    report = Report("gpu", settings, {})
    for tables in each_part(jobs, deadline):
        report = replace(report, tables=tables)
        if figures:
            report.write(Path(figures))
    return report


def _device(name: str) -> torch.device:
    if name not in ("cuda", "cpu"):
        raise UserError(f"device must be cuda or cpu, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("work=gpu measures a CUDA device, and torch finds none here; device=cpu tries its parts")
    return torch.device(name)


def each_part(
    jobs: Mapping[str, Callable[[], Mapping[str, Rows]]], deadline: float
) -> Iterator[dict[str, Sequence[Mapping[str, str | float]]]]:
    """Do one part after another; yield all tables so far after each, the first of which says how each part went.

    A part that raises, or would begin after ``deadline`` (of ``time.perf_counter``), has no further table.
    """
    parts: Rows = []
    tables: dict[str, Sequence[Mapping[str, str | float]]] = {"Parts": parts}
    for name, job in jobs.items():
        begun = time.perf_counter()
        outcome = "done"
        if begun > deadline:
            outcome = "left out: no time was left"
        else:
            try:
                tables |= job()
            except Exception as error:  # whatever it is, the other parts' figures must not be lost
                outcome = f"{type(error).__name__}: {error}"
        parts.append({"part": name, "seconds": time.perf_counter() - begun, "outcome": outcome})
        yield tables


def measure_speed(work: Work) -> dict[str, Rows]:
    """Time inference and training step at each batch size; what runs out of memory is named in a table of its own."""
    tables: dict[str, Rows] = {}
    for training in (False, True):
        for number in work.batch_sizes:
            runs = _runs(work, number, training=training)
            seconds, failed = times_in_turn(runs, work.device, repeats=work.repeats, warmup=work.warmup)
            title = f"{'Training step' if training else 'Inference'}, {number} x {work.size_text}, bfloat16, medians"
            tables[title] = speed_rows(seconds, number)
            if failed:
                tables[f"{title}: not measured"] = [{"what": name, "error": error} for name, error in failed.items()]
            del runs
            _forget(work.device)
    return tables


def times_in_turn(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Run each in turn; return seconds by name, and the errors of those that ran out of memory."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for repetition in range(-warmup, repeats):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                taken = seconds_of(run, device)
            except torch.OutOfMemoryError as error:
                failed[name] = str(error).splitlines()[0]
                del seconds[name]
                _forget(device)
                continue
            if repetition >= 0:
                seconds[name].append(taken)
    return seconds, failed


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a device takes for something: by its own events on a CUDA device, else by the clock."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000  # from milliseconds


def speed_rows(seconds: Mapping[str, Sequence[float]], num_images: int) -> Rows:
    """Return medians, images a second, and the speed against each of torchvision's."""
    medians = {name: median(times) for name, times in seconds.items()}
    references = {name: value for name, value in medians.items() if name.startswith("torchvision")}
    return [
        {
            "what": name,
            "median [s]": value,
            "fastest [s]": min(seconds[name]),
            "slowest [s]": max(seconds[name]),
            "images/s": num_images / value,
            **{f"speed ({reference} = 1)": of_it / value for reference, of_it in references.items()},
        }
        for name, value in medians.items()
    ]


def _runs(work: Work, num_images: int, *, training: bool) -> dict[str, Callable[[], object]]:
    """Return what to run, torchvision's and ours in both layouts, each with weights of its own."""
    reference, batch = build_torchvision(work.ours), work.batch(num_images)
    return {
        name + layout: _run(
            copy.deepcopy(model).to(work.device).to(memory_format=memory_format), name, batch, training=training
        )
        for layout, memory_format in _LAYOUTS.items()
        for name, model in (("torchvision", reference), ("ours", work.ours))
    }


def _run(model: FasterRCNN, name: str, batch: Batch, *, training: bool) -> Callable[[], object]:
    device = next(model.parameters()).device
    variant = Variant(model.train(training), "bf16", name == "ours", device)
    run: Callable[[int], object]
    run = make_step(variant, [batch], device) if training else detection_runs({name: variant}, [batch])[name]
    return lambda: run(0)


def _forget(device: torch.device) -> None:
    """Free the memory of models that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare_waits(work: Work) -> dict[str, Rows]:
    """Measure where the host waits for two images, and compare with what is counted on the pretend GPU."""
    totals: Rows = []
    lines: Rows = []
    batch = work.batch(2)
    for name, model in (("torchvision", build_torchvision(work.ours)), ("ours", work.ours)):
        for training in (False, True):
            what = f"{name}, {'training step' if training else 'inference'}"
            run = _run(copy.deepcopy(model).to(work.device), name, batch, training=training)
            run()  # what is kept between calls is made by the first
            measured = measured_waits(run) if work.device.type == "cuda" else None
            counted = counted_waits(model, name, batch, training=training)
            row: dict[str, str | float] = {"of": what, "counted": counted.total()}
            totals.append(row | {"measured": "-" if measured is None else measured.total()})
            lines += [{"of": what, "by": "counted", "waits": n, "at": at} for at, n in counted.most_common()]
            lines += [{"of": what, "by": "measured", "waits": n, "at": at} for at, n in (measured or {}).items()]
    return {"Waits of the host, two images": totals, "Waits of the host by line": lines}


def profile_ours(work: Work) -> dict[str, Rows]:
    """Profile our inference and step at the largest batch size; return what took the device longest."""
    activities = [ProfilerActivity.CPU]
    if work.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    tables = {}
    for training in (False, True):
        model = copy.deepcopy(work.ours).to(work.device)
        run = _run(model, "ours", work.batch(max(work.batch_sizes)), training=training)
        for _ in range(max(1, work.warmup)):
            run()
        with profile(activities=activities) as profiler:
            run()
            if work.device.type == "cuda":
                torch.cuda.synchronize(work.device)
        rows: Rows = [
            {
                "what": event.key[:80],
                "calls": event.count,
                "device [ms]": event.self_device_time_total / 1000,  # from microseconds
                "host [ms]": event.self_cpu_time_total / 1000,
            }
            for event in profiler.key_averages()
        ]
        key = "device [ms]" if work.device.type == "cuda" else "host [ms]"
        rows.sort(key=lambda row: -float(row[key]))
        what = f"{'training step' if training else 'inference'}, {max(work.batch_sizes)} x {work.size_text}"
        tables[f"Profile of our {what}"] = rows[:_NUM_PROFILED]
    return tables


def fine_tune(
    folder: Path, weights: str, steps: int, device: torch.device, overrides: Sequence[str] = ()
) -> dict[str, Rows]:
    """Train on BCCD for a while, from a file of weights or random ones, and evaluate on its val split.

    From random weights so few steps learn nothing, and only the speed is of interest. ``overrides`` of the
    configuration come last.
    """
    with tempfile.TemporaryDirectory() as output_dir:
        settings = [
            *(f"data.{split}.{key}" for split in ("train", "val") for key in (f"root={folder}", f"split={split}")),
            *([f"model.weights={weights}"] if weights else ["model.weights=null", "model.calibration_images=64"]),
            "model.min_size=416",
            "model.max_size=640",
            "train.batch_size=8",
            f"train.steps={steps}",
            f"train.log_every={min(20, steps)}",
            "train.eval_every=null",
            "train.precision=bf16",
            f"train.device={device.type}",
            "optim.name=adamw",
            "optim.lr=1e-4",
            "optim.lr_batch_size=null",
            "optim.warmup_steps=50",
            "optim.schedule=cosine",
            "eval.num_pictures=0",
            f"output_dir={output_dir}",
        ]
        speeds: list[float] = []
        result = train(
            load_config(_ROOT / "configs" / "frcnn_r101_voc.yaml", [*settings, *overrides]),
            on_log=lambda line: speeds.append(line["images_per_s"]),
        )
    row: dict[str, str | float] = {"steps": result.steps, "seconds": result.seconds, "images/s": median(speeds)}
    return {f"Fine-tune on {folder.name}": [row | {name: result.metrics[name] for name in ("AP", "AP50")}]}


def run_tests(seconds: float, select: Sequence[str] = ("-m", "gpu")) -> dict[str, Rows]:
    """Run the tests for a GPU in processes of their own, for so many seconds at most.

    Args:
        seconds: After these they are ended, and those that had not finished are not in the rows.
        select: Arguments of pytest that select tests.

    Raises:
        UserError: If there are no tests here, or none has ended in time.
    """
    if not (_ROOT / "tests").is_dir():
        raise UserError(f"{_ROOT / 'tests'}: the tests are part of a checkout, not of an installation")
    with tempfile.TemporaryDirectory() as folder:
        junit, log = Path(folder, "junit.xml"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "pytest", "-vv", *select, f"--junit-xml={junit}", f"--basetemp={folder}/t"]
        with log.open("w") as output, suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=_ROOT, stdout=output, timeout=max(seconds, 1.0), check=False)
        outcomes = _outcomes(junit) if junit.exists() else _outcomes_so_far(log)
    if not outcomes:
        raise UserError(f"no test has ended within {seconds:.0f} s")
    total = Counter(str(row["outcome"]) for row in outcomes)
    summary: Rows = [{"outcome": outcome, "tests": number} for outcome, number in total.items()]
    return {"Tests": summary, "Tests by name": outcomes}


def _outcomes(junit: Path) -> Rows:
    """Return what became of each test, from pytest's own report."""
    rows: Rows = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        trouble = next((child for child in case if child.tag in _NOT_PASSED), None)
        outcome, why = ("passed", "") if trouble is None else (trouble.tag, trouble.get("message", "")[:200])
        rows.append({"test": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome, "why": why})
    return rows


def _outcomes_so_far(log: Path) -> Rows:
    """Return what became of the tests that ended, from the lines that pytest prints of them."""
    rows: Rows = []
    for line in log.read_text().splitlines():
        if match := re.search(r"(PASSED|FAILED|ERROR|SKIPPED) +(tests/\S+::.*)", line):  # as workers' lines are printed
            rows.append({"test": match[2].strip(), "outcome": match[1].lower(), "why": ""})
    return rows
