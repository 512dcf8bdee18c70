"""What goes wrong, in two kinds: a user's mistake (exit code 2) and a run that failed (exit code 1)."""

import difflib
from collections.abc import Iterable
from importlib.metadata import requires
from typing import Any


class UserError(ValueError):
    """A mistake in what was asked for. Its message is one sentence that says what to do."""


class RunError(RuntimeError):
    """The request was sound and could not be carried out: a full disk, a loss that is not finite.

    `found` is the result, where all that failed was to write a picture of it.
    """

    found: Any = None


def did_you_mean(name: str, known: Iterable[str], listed_by: str = "dynamixer models") -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them when they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if len(known) <= 40 else f"`{listed_by}` lists what there is"


def install(extra: str) -> str:
    """The command that installs what an extra of this package needs."""
    needed = [
        line.partition(";")[0].strip() for line in requires("dynamixer") or () if line.endswith(f"extra == '{extra}'")
    ]
    return f"pip install {' '.join(repr(one) for one in needed)}"


def first_line(error: Exception) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
