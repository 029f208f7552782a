"""SIGTERM and SIGINT as requests to stop, which the training loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from typing_extensions import Self


class StopSignals:
    """Records SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once.

    Schedulers send SIGTERM some time before they kill (Slurm's ``--signal=TERM@120``, Kubernetes' grace period).
    Outside the main thread, where Python allows no handlers, it changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the last signal; 0 for none

    def __enter__(self) -> Self:
        """Install the handlers."""
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
