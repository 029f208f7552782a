"""SIGTERM and SIGINT as requests to stop, which the training loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from typing_extensions import Self


class StopSignals:
    """Records SIGTERM and SIGINT while it is entered; a second SIGINT interrupts at once.

    Schedulers send SIGTERM some time before they kill (Slurm's ``--signal=TERM@120``, Kubernetes' grace period).
    Outside the main thread, where Python allows no handlers, it changes nothing.

    Attributes:
        received: Number of the last signal; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
