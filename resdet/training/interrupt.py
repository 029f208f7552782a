"""SIGTERM and SIGINT: a wish to stop, which the training loop grants between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from typing_extensions import Self


class StopSignals:
    """While it is entered, SIGTERM and SIGINT only note that they came; a second SIGINT interrupts at once.

    Schedulers send SIGTERM some time before they kill (Slurm's ``--signal=TERM@120``, Kubernetes' grace period).
    Outside the main thread, where Python allows no handlers, signals do what they did.

    Attributes:
        received: Number of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Self:
        """Take over the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
