"""SIGTERM and SIGINT: finish the step, write a checkpoint, leave."""

import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from dynamixer.logs import log

PATIENCE = 2.0  # seconds


class Stopping:
    """While it is entered, SIGTERM and SIGINT are kept in `asked`; a second Ctrl-C, seconds later, acts at once.

    A launcher forwards what the whole process group has already got: that second one is no new wish.
    """

    def __init__(self) -> None:
        self.asked, self.when = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() - self.when > PATIENCE:
            self._restore()
            raise KeyboardInterrupt
        self.asked, self.when = self.asked or number, self.when or time.monotonic()

    def stop(self, step: int) -> NoReturn:
        """Leave as the signal asks: KeyboardInterrupt for SIGINT, else exit code 143."""
        log(f"stopped after step {step}, with a checkpoint: the same command goes on from there.")
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
