"""What becomes of a loader's workers: at a signal, and when the process that they work for is gone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from dynamixer.data.decode import BadImage
from dynamixer.errors import RunError

GRACE = 30  # seconds that a worker outlives a SIGTERM: the main process may want its pictures for one more step
STOPPING = {signal.SIGTERM, signal.SIGINT}


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator over a loader; its workers get no SIGTERM or SIGINT before their first function has said what those mean.

    That function is `end_with_parent` or `worker_signals`: others would leave the signals held back.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def from_workers() -> Iterator[None]:
    """What a worker fails by is raised as in the main process: it comes back as its traceback, with the sentence at the end."""
    try:
        yield
    except (BadImage, RunError) as error:
        kind = type(error)
        raise kind(str(error).rstrip().split(f"{kind.__name__}: ")[-1]) from None


def end_with_parent(worker: int) -> None:
    """End this worker when the process that it works for is gone.

    torch 2.15 looks at its parent for that, which is the fork server (Python 3.14's default) and lives as long as its workers.
    """
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def worker_signals(worker: int) -> None:
    """Ctrl-C, and SIGTERM from a scheduler, reach the whole process group: the main process decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # then it ends, whatever became of the main process
    end_with_parent(worker)
