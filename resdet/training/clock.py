"""Let a run end within the minutes it is given, its schedule finished, on a machine that is faster or slower by then.

After each step the number of steps that the remaining time allows is decided anew, from the seconds of the latest steps
and of an evaluation. How far the schedule has come, its progress, is not the share of these steps but a sum: each step
adds an equal part of what is left. So the rate never jumps, and has fallen to its end when the time is up.

What is decided is kept in ``RunState.schedule``, and so in the checkpoints: a resumed run goes on from the same
numbers.
"""

from __future__ import annotations

import math

from resdet.errors import UserError

STEPS, PROGRESS, AT_STEP = "num_steps", "progress", "at_step"
_LIMIT, _SECONDS, _STEP_S, _TIMED, _EVALUATION_S = "limit", "seconds", "step_s", "timed", "evaluation_s"

OPEN_END = 10**9
"""Number of steps of a run of which no step has been timed yet."""

_WINDOW = 16  # steps over which their time is averaged

Schedule = dict[str, float]


def schedule_position(step: int, schedule: Schedule) -> tuple[float, int] | None:
    """Return how many steps of the schedule a step corresponds to, and of how many; None without a clock."""
    if AT_STEP not in schedule:
        return None
    num_steps = int(schedule[STEPS])
    return schedule_progress(step, schedule) * num_steps, num_steps


def schedule_progress(step: int, schedule: Schedule) -> float:
    """Return how much of the schedule is over after ``step`` steps, in [0, 1]."""
    begun, at, num_steps = schedule[PROGRESS], schedule[AT_STEP], schedule[STEPS]
    return 1.0 if step >= num_steps else begun + (1 - begun) * (step - at) / (num_steps - at)


def knows_evaluation(schedule: Schedule) -> bool:
    """Return whether the time of an evaluation is known, from this call or an earlier one."""
    return _EVALUATION_S in schedule


class Clock:
    """The time of a run: of this call and of those before it that it resumes.

    Args:
        minutes: Time for the whole run, evaluations included.
        eval_every: Steps between evaluations; None evaluates only at the end.
        schedule: ``RunState.schedule``, in which all that is decided is kept.
        most_steps: Steps after which the run ends though there is time.
    """

    def __init__(
        self, minutes: float, eval_every: int | None, schedule: Schedule, *, most_steps: int = OPEN_END
    ) -> None:
        self.schedule = schedule
        self._most_steps = most_steps
        self._limit, self._eval_every = 60 * minutes, eval_every
        self._before = schedule.get(_SECONDS, 0.0)  # of earlier calls
        self._left = math.inf  # seconds, without the evaluation at the end
        self._last: float | None = None  # when the last step ended, or an evaluation after it
        if schedule.setdefault(_LIMIT, self._limit) != self._limit:
            # Resumed with other minutes: the schedule stands where it would, had they been given from the beginning.
            schedule[_LIMIT] = self._limit
            share = self._before / max(self._limit - schedule.get(_EVALUATION_S, 0.0), 1e-6)
            schedule[PROGRESS], schedule[STEPS] = min(share, 1.0), OPEN_END

    @property
    def allows_evaluation(self) -> bool:
        """Whether there is time for an evaluation now, for a step after it, and for the evaluation at the end."""
        return self._left >= self.schedule.get(_EVALUATION_S, 0.0) + self.schedule.get(_STEP_S, 0.0)

    def expect_evaluation(self, seconds: float) -> None:
        """Set the time that an evaluation takes, estimated or measured; checkpoint and report are part of it."""
        self.schedule[_EVALUATION_S] = seconds

    def resumed_steps(self, step: int) -> int:
        """Return the number of steps of the run before the first step of this call, ``step`` of which are done."""
        return self._decided(step) if _STEP_S in self.schedule else self._most_steps

    def after_evaluation(self, seconds: float, *, elapsed: float) -> None:
        """Take over the measured time of an evaluation, and count the next step from its end."""
        self.expect_evaluation(seconds)
        self._last = elapsed

    def after_step(self, step: int, elapsed: float) -> int:
        """Return the number of steps of the run, when ``step`` are done and this call has taken ``elapsed`` seconds.

        With several processes ``elapsed`` must be the same in all of them.
        """
        schedule = self.schedule
        if self._last is None or _STEP_S not in schedule:
            # The first step of a process sets up workers and kernels; its time counts only until there is another.
            schedule.setdefault(_STEP_S, elapsed - (self._last or 0.0))
        else:
            timed = schedule.get(_TIMED, 0) + 1
            weight = 1 / min(timed, _WINDOW)
            schedule[_STEP_S] += weight * (elapsed - self._last - schedule[_STEP_S])
            schedule[_TIMED] = timed
        self._last = elapsed
        schedule[_SECONDS] = self._before + elapsed
        return self._decided(step)

    def _decided(self, step: int) -> int:
        schedule = self.schedule
        evaluation_s = schedule.get(_EVALUATION_S, 0.0)
        self._left = left = self._limit - schedule[_SECONDS] - evaluation_s  # the last thing of a run is one
        per_step = schedule[_STEP_S] + (evaluation_s / self._eval_every if self._eval_every else 0.0)
        steps_left = max(min(math.floor(left / max(per_step, 1e-6)), self._most_steps - step), 0)
        progress = schedule_progress(step, schedule) if AT_STEP in schedule else 0.0
        schedule[PROGRESS], schedule[AT_STEP], schedule[STEPS] = progress, step, step + steps_left
        return step + steps_left


def check_minutes(minutes: float, evaluation_s: float, elapsed: float) -> None:
    """Raise a UserError if reading the data and one evaluation take the whole time already."""
    needed = (elapsed + evaluation_s) / 60
    if needed >= minutes:
        raise UserError(
            f"minutes: {minutes:g} do not suffice: until the first step and for one evaluation this run needs about "
            f"{needed:.1f}; give more, or a smaller model.min_size or train.eval_images"
        )
