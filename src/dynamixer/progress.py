"""A bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from dynamixer.logs import console, is_live, log

LINE_EVERY = 20.0  # seconds, where no bar can be shown


class Meter:
    """Counts pictures, or what else `unit` calls them, and shows what is known of them."""

    def __init__(self, title: str, total: int, bar: Progress | None, done: int = 0, unit: str = "images"):
        self.title, self.total, self.bar, self.unit = title, total, bar, unit
        self.first, self.done, self.start = done, done, time.perf_counter()
        self.last_line = self.start
        self.task = bar.add_task(title, total=total, completed=done, note="") if bar else None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(1e-9, time.perf_counter() - self.start)

    @property
    def rate(self) -> float:
        """How many of them a second so far."""
        return (self.done - self.first) / self.seconds

    def advance(self, count: int, **values: float) -> None:
        """Count so many more, and show figures such as loss=1.23."""
        self.done += count
        note = "  ".join(
            [
                *(f"{key} {value:.4g}" for key, value in values.items()),
                f"{self.rate:.{0 if self.rate >= 10 else 1}f} {self.unit}/s",
            ]
        )
        now = time.perf_counter()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=count, note=note)
        elif now - self.last_line > LINE_EVERY:
            self.last_line = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            log(f"{self.title}: {self.done}/{self.total}  {note}  {left:.0f} s left")


@contextmanager
def progress(title: str, total: int, done: int = 0, unit: str = "images") -> Iterator[Meter]:
    """Show how far a loop over `total` pictures (or what else `unit` says) is, of which `done` were behind it at the start."""
    if not is_live():
        yield Meter(title, total, None, done, unit)
        return
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield Meter(title, total, bar, done, unit)
