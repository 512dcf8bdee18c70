"""What is said to the person at the terminal: on stderr, so that stdout stays for results."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


def log(message: str) -> None:
    """One line on stderr."""
    console.print(message, markup=False, emoji=False)


def is_live() -> bool:
    """Whether stderr is a terminal on which a bar can move."""
    return sys.stderr.isatty() and not console.quiet


@contextmanager
def quiet(enable: bool = True) -> Iterator[None]:
    """Say nothing meanwhile: one of several processes speaks for all."""
    before, console.quiet = console.quiet, console.quiet or enable
    try:
        yield
    finally:
        console.quiet = before
