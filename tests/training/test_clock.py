"""A run that is given minutes ends in them, its schedule finished, whatever the machine does meanwhile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import differences, logged, train_here

from resdet.errors import UserError
from resdet.training import loop
from resdet.training.clock import OPEN_END, Clock, Schedule, check_minutes, schedule_position, schedule_progress
from resdet.training.optim import lr_factor

EVALUATION_S = 20.0


def simulate(
    step_s: Callable[[float], float], *, minutes: float = 10, eval_every: int | None = None, start_s: float = 30.0
) -> tuple[float, list[float]]:
    """Run a schedule whose steps take ``step_s(elapsed)`` seconds; return the seconds of the run and each progress."""
    schedule: Schedule = {}
    clock = Clock(minutes, eval_every, schedule)
    clock.expect_evaluation(EVALUATION_S)
    elapsed, step, num_steps, progress = start_s, 0, clock.resumed_steps(0), list[float]()
    while step < num_steps:
        progress.append(schedule_progress(step, schedule) if step else 0.0)
        elapsed += step_s(elapsed)
        step += 1
        num_steps = clock.after_step(step, elapsed)
        if eval_every and step % eval_every == 0 and step < num_steps and clock.allows_evaluation:
            elapsed += EVALUATION_S
            clock.after_evaluation(EVALUATION_S, elapsed=elapsed)
    return elapsed + EVALUATION_S, progress


@pytest.mark.parametrize(
    "step_s",
    [
        lambda _: 1.0,
        lambda _: 0.013,
        lambda _: 7.0,
        lambda elapsed: 1.0 if elapsed < 200 else 3.0,  # another job arrives
        lambda elapsed: 3.0 if elapsed < 200 else 1.0,  # and leaves
        lambda elapsed: 1.0 + 0.9 * math.sin(elapsed),  # images of all sizes
        lambda elapsed: 20.0 if elapsed < 31 else 0.5,  # the first step sets everything up
    ],
)
@pytest.mark.parametrize("eval_every", [None, 25])
def test_the_time_is_used_and_kept_and_the_schedule_finished(
    step_s: Callable[[float], float], eval_every: int | None
) -> None:
    seconds, progress = simulate(step_s, eval_every=eval_every)
    longest = max(step_s(at) for at in (50.0, 300.0, 590.0))
    rest = longest + (EVALUATION_S if eval_every else 0)  # an evaluation is not begun that does not fit
    assert 600 - 2 * rest <= seconds <= 600 * 1.01 + longest
    assert progress == sorted(progress)
    assert progress[-1] > 1 - 3 * max(longest, step_s(31.0)) / 550
    factors = [
        lr_factor(0, position=p, num_steps=1, warmup_steps=0, warmup_factor=0, schedule="cosine") for p in progress
    ]
    assert factors[0] == 1
    assert factors[-1] < 0.01
    assert max(a - b for a, b in itertools.pairwise(factors)) < 0.15  # no jump


def test_a_clock_that_never_looks_again_would_fail_the_same_check() -> None:
    """The twin: a number of steps decided from the first ones alone is far beyond the time of a machine that slows."""
    first = int((600 - 30 - EVALUATION_S) / 1.0)
    assert 30 + 200 + (first - 200) * 3.0 + EVALUATION_S > 600 * 1.05


def test_a_resumed_clock_decides_as_the_uninterrupted_one() -> None:
    schedule: Schedule = {}
    clock = Clock(10, None, schedule)
    clock.expect_evaluation(EVALUATION_S)
    decided = [clock.after_step(step, 30.0 + step) for step in range(1, 41)]
    kept = dict(schedule)
    resumed = Clock(10, None, kept)
    assert resumed.resumed_steps(40) == decided[-1]
    assert {name: kept[name] for name in schedule} == schedule
    assert schedule_position(40, kept) == schedule_position(40, schedule)
    # The new process has taken 5 s until its first step, which took 2: both count, though not as a step of 7 s.
    assert resumed.after_step(41, 7.0) == decided[-1] - 6
    assert kept["step_s"] == 1.0


def test_other_minutes_move_the_schedule_to_where_it_would_stand() -> None:
    schedule: Schedule = {}
    clock = Clock(10, None, schedule)
    clock.expect_evaluation(EVALUATION_S)
    step, num_steps, elapsed = 0, OPEN_END, 0.0
    while step < num_steps:
        step, elapsed = step + 1, elapsed + 1.0
        num_steps = clock.after_step(step, elapsed)
    assert schedule_progress(step, schedule) == 1
    longer = Clock(20, None, schedule)
    assert longer.resumed_steps(step) > 2 * step
    assert schedule_progress(step, schedule) == pytest.approx(580 / 1180, abs=0.01)


def test_a_finished_run_stays_finished() -> None:
    schedule: Schedule = {}
    clock = Clock(1, None, schedule)
    clock.expect_evaluation(5.0)
    step, num_steps = 0, OPEN_END
    while step < num_steps:
        step += 1
        num_steps = clock.after_step(step, float(step))
    assert Clock(1, None, schedule).resumed_steps(step) == step


def test_too_few_minutes_are_refused() -> None:
    with pytest.raises(UserError, match=r"minutes: 0.5 do not suffice: .* needs about 0.8; give more"):
        check_minutes(0.5, evaluation_s=20.0, elapsed=30.0)
    check_minutes(1.0, evaluation_s=20.0, elapsed=30.0)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step take a second by the clock, and nothing else take any time."""
    after_step = Clock.after_step

    def fake(clock: Any, step: int, _: float) -> int:
        clock.ticks = getattr(clock, "ticks", 0) + 1
        return after_step(clock, step, float(clock.ticks))

    monkeypatch.setattr(Clock, "after_step", fake)
    monkeypatch.setattr(loop, "seconds_since", lambda *_: 0.0)
    monkeypatch.setattr("resdet.training.detection.evaluation_seconds", lambda *_: 0.0)


class StopHereError(Exception):
    """What a program raises to end a run."""


def test_a_run_by_the_clock_resumes_bit_for_bit(tmp_path: Path, ticking: None) -> None:
    minutes = ("train.steps=null", "minutes=0.1", "seed=3")  # 6 steps of a second
    whole = train_here(tmp_path / "whole", *minutes)
    assert whole.steps == 6

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise StopHereError

    with pytest.raises(StopHereError):
        train_here(tmp_path / "parts", *minutes, on_log=stop)
    assert train_here(tmp_path / "parts", *minutes, "resume=auto").steps == 6
    different = differences(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    assert {name for name in different if not name.startswith(".training.schedule")} == set()
    assert logged(tmp_path / "whole", "lr") == logged(tmp_path / "parts", "lr")
    # The twin: other decisions of the clock leave another model.
    other = train_here(tmp_path / "other", *minutes[:1], "minutes=0.12", *minutes[2:])
    assert other.steps == 7
    assert logged(tmp_path / "whole", "lr") != logged(tmp_path / "other", "lr")[:6]


def test_a_run_ends_by_its_steps_where_there_is_time(tmp_path: Path, ticking: None) -> None:
    """The schedule is finished then too, and more steps let it go on."""
    result = train_here(tmp_path, "train.steps=4", "minutes=0.1")
    assert result.steps == 4
    rates = logged(tmp_path, "lr")
    assert rates[-1] < rates[-2]
    assert train_here(tmp_path, "train.steps=20", "minutes=0.1", "resume=auto").steps == 6
    assert train_here(tmp_path / "epochs", "train.steps=null", "train.epochs=0.5", "minutes=0.1").steps == 3


def test_most_steps_are_known_before_one_is_timed() -> None:
    schedule: Schedule = {}
    clock = Clock(10, None, schedule, most_steps=5)
    assert clock.resumed_steps(0) == 5
    assert clock.after_step(1, 1.0) == 5
    assert schedule_progress(5, schedule) == 1.0
    assert Clock(10, None, {}, most_steps=5).after_step(1, 400.0) == 1, "the time still ends it"


def test_more_minutes_let_a_finished_run_go_on(tmp_path: Path, ticking: None) -> None:
    assert train_here(tmp_path, "train.steps=null", "minutes=0.05").steps == 3
    result = train_here(tmp_path, "train.steps=null", "minutes=0.1", "resume=auto")
    assert result.steps == 6
    rates = logged(tmp_path, "lr")
    assert rates[3] > rates[2]
    assert rates[-1] < rates[3]
