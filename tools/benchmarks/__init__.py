"""Measure every figure that the documentation claims, one module for each kind of work.

A benchmark is a function of keyword arguments with defaults (int, float, bool, str or Path) that returns a
``Report``. It measures what it compares in turn; memory, and what a cache would change, in separate processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.annotations import benchmark_annotations
from benchmarks.evaluation import benchmark_evaluation
from benchmarks.gpu import benchmark_gpu
from benchmarks.gpu_model import benchmark_gpu_model
from benchmarks.inference import benchmark_inference
from benchmarks.loading import benchmark_loading
from benchmarks.memory import benchmark_memory
from benchmarks.recipes import benchmark_recipes
from benchmarks.report import Report
from benchmarks.roi_align import benchmark_roi_align
from benchmarks.training import benchmark_training
from resdet.errors import UserError

WORK: dict[str, Callable[..., Report]] = {
    "annotations": benchmark_annotations,
    "evaluation": benchmark_evaluation,
    "inference": benchmark_inference,
    "training": benchmark_training,
    "roi_align": benchmark_roi_align,
    "memory": benchmark_memory,
    "loading": benchmark_loading,
    "gpu_model": benchmark_gpu_model,
    "gpu": benchmark_gpu,
    "recipes": benchmark_recipes,
}
"""Every kind of work, by its name on the command line."""


def run_benchmark(arguments: Sequence[str]) -> Report:
    """Run the benchmark that ``work=NAME`` names, with its settings changed by further ``key=value``.

    Raises:
        UserError: If the work or a key is unknown or given twice, or a value is not of its type.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(f"settings are given as key=value, got {argument!r}")
        if key in given:
            raise UserError(f"{key} is given twice: {given[key]!r} and {value!r}")
        given[key] = value
    work = given.pop("work", None)
    if work not in WORK:
        raise UserError(f"work= must be one of {', '.join(WORK)}; got {'nothing' if work is None else repr(work)}")
    types = get_type_hints(WORK[work])
    known = list(inspect.signature(WORK[work]).parameters)
    for key in given:
        if key not in known:
            raise UserError(f"work={work} has no setting {key!r}; its settings are {', '.join(known)}")
    return WORK[work](**{key: _parse(key, value, types[key]) for key, value in given.items()})


def _parse(key: str, value: str, kind: type) -> Any:
    if kind in (str, Path):
        return kind(value)
    if kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{key} must be true or false, got {value!r}")
        return value == "true"
    assert kind in (int, float)
    try:
        return kind(value)
    except ValueError as error:
        raise UserError(f"{key} must be {'an integer' if kind is int else 'a number'}, got {value!r}") from error
