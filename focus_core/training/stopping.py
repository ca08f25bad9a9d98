"""Turn SIGINT and SIGTERM into a question that a loop asks after every step, so that it ends with a checkpoint.

A second signal interrupts at once. A SIGINT that the shell told us to ignore (a background job) stays ignored; SIGTERM
stops such a job. It must be entered in the main thread.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class StopOnSignal:
    """Asks for an end after the first signal: ``with StopOnSignal() as stop: train(..., stop=stop)``."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether a signal came."""
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if number == signal.SIGTERM or before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
