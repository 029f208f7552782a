"""SIGTERM, SIGHUP and SIGINT as requests to stop, which the training loop honours where nothing is half done."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from typing_extensions import Self

from resdet.errors import Interrupted

ECHO_SECONDS = 5.0
GRACE_SECONDS = 10  # torchrun and Slurm kill 30 s after the first signal


class StopNow(KeyboardInterrupt):
    """Raised by a signal wherever the main thread is; no ``except Exception`` on the way takes it for an error."""


class StopSignals:
    """Records signals while it is entered; a second one ends the run at once, with ``Interrupted``.

    Schedulers send SIGTERM some time before they kill (Slurm's ``--signal=TERM@120``, Kubernetes' grace period), a
    terminal that closes sends SIGHUP; under ``nohup``, which ignores it, it stays ignored. Outside the main thread,
    where Python allows no handlers, nothing changes.

    With several processes a second signal counts only ``ECHO_SECONDS`` after the first: what a scheduler sends to all
    of them, torchrun passes on to its own once more.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.received = 0  # number of the last signal; 0 for none
        self._received_at = 0.0
        self._at_once = False
        self._is_alone = world_size == 1
        self._second: threading.Timer | None = None

    def __enter__(self) -> Self:
        """Install the handlers."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, StopNow):
            raise Interrupted(
                f"ended at once by {signal.Signals(self.received).name}: what was saved before is whole, and the same "
                "command with resume=auto continues from it",
                self.received,
            ) from None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise ``StopNow`` in the block as soon as a signal comes, or now if one has come before.

        Several processes stop together, between blocks: one that is still in the block ``GRACE_SECONDS`` later hangs.
        """
        self._at_once = True
        try:
            if self.received:
                self._stop()
            yield
        finally:
            self._at_once = False
            if self._second is not None:
                self._second.cancel()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_second = self.received != 0
        if is_second and not self._is_alone and time.monotonic() - self._received_at < ECHO_SECONDS:
            return
        self.received, self._received_at = number, time.monotonic()
        if is_second:
            raise StopNow
        if self._at_once:
            self._stop()

    def _stop(self) -> None:
        if self._is_alone:
            raise StopNow
        self._second = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), self.received))
        self._second.daemon = True
        self._second.start()
