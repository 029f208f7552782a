"""What is run on a lent GPU, tried on the CPU: every part gives its figures, and none takes the others' away."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, run_benchmark
from benchmarks.cuda_waits import measured_waits
from benchmarks.gpu import _outcomes_so_far, each_part, fine_tune, run_tests, seconds_of, speed_rows, times_in_turn
from cards import require_cuda

from resdet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["work=gpu", "min_size=64", "max_size=96", "batch_sizes=1", "repeats=1", "warmup=0", "device=cpu"]


@pytest.mark.slow
def test_parts_on_the_cpu(small_detector: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    report = run_benchmark([*SMALL, f"weights={small_detector}", "parts=speed,waits,profile", f"figures={figures}"])
    parts, inference, step, totals, lines, *profiles = report.tables.values()
    assert [(row["part"], row["outcome"]) for row in parts] == [(n, "done") for n in ("speed", "waits", "profile")]
    names = ["torchvision", "ours", "torchvision, channels last", "ours, channels last"]
    for rows in (inference, step):
        assert [row["what"] for row in rows] == names
        assert rows[0]["speed (torchvision = 1)"] == rows[2]["speed (torchvision, channels last = 1)"] == 1
    assert [row["of"] for row in totals][::2] == ["torchvision, inference", "ours, inference"]
    assert all(row["measured"] == "-" for row in totals)
    for row in totals:
        assert row["counted"] == sum(int(line["waits"]) for line in lines if line["of"] == row["of"])
    assert len(profiles) == 2
    assert all(0 < len(rows) <= 30 for rows in profiles)
    assert json.loads(figures.read_text())["tables"].keys() == report.tables.keys()


def test_a_part_that_fails_leaves_the_others_figures() -> None:
    def fails() -> dict[str, gpu.Rows]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    jobs = {"one": lambda: {"Figures": [{"a": 1}]}, "two": fails, "three": lambda: {"More": [{"b": 2}]}}
    *_, tables = each_part(jobs, time.perf_counter() + 60)
    assert list(tables) == ["Parts", "Figures", "More"]
    assert [row["outcome"] for row in tables["Parts"]] == ["done", "OutOfMemoryError: CUDA out of memory", "done"]
    *_, tables = each_part(jobs, time.perf_counter() - 1)
    assert list(tables) == ["Parts"]
    assert {row["outcome"] for row in tables["Parts"]} == {"left out: no time was left"}


def test_what_runs_out_of_memory_is_left_out_of_the_times() -> None:
    calls: list[str] = []

    def tight() -> None:
        calls.append("torchvision")
        raise torch.OutOfMemoryError("no memory\nand much more text")

    runs = {"torchvision": tight, "ours": lambda: calls.append("ours")}
    seconds, failed = times_in_turn(runs, torch.device("cpu"), repeats=2, warmup=1)
    assert calls == ["torchvision", "ours", "ours", "ours"]
    assert {name: len(times) for name, times in seconds.items()} == {"ours": 2}
    assert failed == {"torchvision": "no memory"}


def test_speeds_by_hand() -> None:
    rows = speed_rows({"torchvision": [3.0, 1.0, 2.0], "ours": [0.5]}, 8)
    assert [row["images/s"] for row in rows] == [4, 16]
    assert rows[1]["speed (torchvision = 1)"] == 4
    assert seconds_of(lambda: time.sleep(0.02), torch.device("cpu")) >= 0.02


@pytest.mark.slow
def test_tests_are_run_and_told_by_name() -> None:
    tables = run_tests(120, ["tests/gpu", "-m", "gpu", "-k", "test_roi_align or test_an_int8"])
    outcome = "passed" if torch.cuda.is_available() else "skipped"
    assert tables["Tests"] == [{"outcome": outcome, "tests": 2}]
    if outcome == "skipped":
        assert "needs a CUDA device" in str(tables["Tests by name"][0]["why"])
    with pytest.raises(UserError, match="no test has ended within 0 s"):
        run_tests(0.001)


def test_tests_that_ended_before_time_was_up_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "[gw0] [ 50%] PASSED tests/gpu/test_a.py::test_one[cuda] \n"
        "[gw1] [100%] FAILED tests/gpu/test_a.py::test_two \n"
        "tests/gpu/test_a.py::test_three[cuda] \n"
    )
    assert [(row["test"], row["outcome"]) for row in _outcomes_so_far(log)] == [
        ("tests/gpu/test_a.py::test_one[cuda]", "passed"),
        ("tests/gpu/test_a.py::test_two", "failed"),
    ]


@pytest.mark.slow
def test_a_fine_tune_on_bccd(assets: Path) -> None:
    small = [
        "model.arch=resnet18",
        "model.min_size=64",
        "model.max_size=96",
        "train.batch_size=2",
        "eval.reference=false",
    ]
    tables = fine_tune(assets / "bccd", "", 2, torch.device("cpu"), [*small, "loader.num_workers=0"])
    ((row,),) = tables.values()
    assert row["steps"] == 2
    assert 0 <= float(row["AP"]) <= float(row["AP50"]) <= 1
    assert float(row["images/s"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="measures a CUDA device, and torch finds none here"):
        run_benchmark(["work=gpu"])
    done = subprocess.run([ROOT / "tools" / "gpu_check.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: tools/gpu_check.sh" in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parts=speed,all", "parts must be of speed, waits, profile, fine_tune, tests"),
        ("device=auto", "device must be cuda or cpu, got 'auto'"),
        ("minutes=0", "minutes must be above 0"),
        ("batch_sizes=", "batch_sizes must be whole numbers from 1"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_benchmark(["work=gpu", setting])


@pytest.mark.gpu
def test_waits_of_a_gpu_are_found_by_line(request: pytest.FixtureRequest) -> None:
    require_cuda(request)
    value = torch.ones(3, device="cuda")

    def waits_twice() -> None:
        value.sum().item()
        value.nonzero()
        value.add_(1)

    found = measured_waits(waits_twice)
    assert found.total() == 2
    assert all("test_gpu.py" in line for line in found)
    assert measured_waits(lambda: value.mul_(2)).total() == 0
