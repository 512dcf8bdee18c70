"""A process of the queue's, which ends when the queue has ended, whatever ended it.

python -m dynamixer.study.child QUEUE train ... | measure TASK
"""

import os
import sys
import threading
import time

EVERY = 0.5  # seconds


def follow(parent: int) -> None:
    """End this process, as a kill would, once its parent is another one than `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Follow the queue and do what it asks."""
    parent, kind, *words = sys.argv[1:]
    follow(int(parent))
    if kind == "train":
        from dynamixer.cli import main as command  # noqa: PLC0415 - after the parent is watched

        command(["train", *words])
    from dynamixer.study.measure import main as measure  # noqa: PLC0415

    measure(*words)


if __name__ == "__main__":
    main()
