"""How often the host waits for a GPU: what the pretend one counts is what a real one does."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from benchmarks.cuda_waits import counted_waits, measured_waits
from benchmarks.gpu_model import count
from benchmarks.inference import detection_runs
from benchmarks.pair import Variant
from benchmarks.training import make_step
from small_detectors import make_batch

from resdet.models.detector import Detector


@pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])
def test_measured_waits_are_those_counted(detector: Detector, cuda: torch.device, training: bool) -> None:
    batch = make_batch()
    counted = counted_waits(detector, "ours", batch, training=training)
    variant = Variant(copy.deepcopy(detector).to(cuda).train(training), "bf16", True, cuda)
    run = make_step(variant, [batch], cuda) if training else detection_runs({"ours": variant}, [batch])["ours"]
    run(0)
    measured = measured_waits(lambda: run(0))
    assert measured.total() == counted.total(), f"measured {dict(measured)}, counted {dict(counted)}"


@pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])
def test_waits_are_counted_the_same_each_time(detector: Detector, training: bool) -> None:
    one, other = (count(detector, "ours", make_batch(), training=training).waits for _ in range(2))
    assert one == other
    assert one.total() < 100


def test_steps_leave_nothing_in_memory(detector: Detector, cuda: torch.device) -> None:
    variant = Variant(copy.deepcopy(detector).to(cuda).train(), "bf16", True, cuda)
    step = make_step(variant, [make_batch()], cuda)
    step(0), step(0)

    def used() -> int:
        gc.collect()
        torch.cuda.synchronize(cuda)
        return torch.cuda.memory_allocated(cuda)

    before = used()
    for _ in range(5):
        step(0)
    assert used() <= before + 1_000_000
