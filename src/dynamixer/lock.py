"""One process at a time: the system's locks, which are gone when the process is."""

import contextlib
import fcntl
import os
import time

from dynamixer.files import reason
from dynamixer.logs import log


def locked(file: int, patience: float = 0.0) -> bool:
    """Lock an open file or folder for whoever opened it, until it is closed.

    Args:
        file: its descriptor.
        patience: seconds to wait for another that holds it.

    Returns:
        False if another holds it still. On a file system without locks it is True, and said.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        except OSError as error:
            log(f"nothing keeps a second process away from the same work: no lock can be had here ({reason(error)})")
            return True
        else:
            return True


def unlock(file: int) -> None:
    """Let go of a lock, in processes forked since too, and close its file."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
