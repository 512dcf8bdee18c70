"""How much memory a call needs beyond what the process holds."""

import ctypes
import gc
import re
from pathlib import Path

from dynamixer.native import memory_given_back
from dynamixer.speed.clock import Call

PROCESS = Path("/proc/self")


def peak_mib(call: Call) -> float | None:
    """MiB by which the process is larger at most during a call than before it; None where Linux and glibc do not tell.

    A first call, which does not count, makes what is made once.
    """
    with memory_given_back():
        return _peak(call)


def _peak(call: Call) -> float | None:
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call would take what earlier ones have left
        before = _resident("VmRSS")
        (PROCESS / "clear_refs").write_text("5")  # the highest mark starts anew
    except (OSError, TypeError, AttributeError):
        return None
    call()
    return (_resident("VmHWM") - before) / 1024


def _resident(kind: str) -> int:
    """KiB."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
