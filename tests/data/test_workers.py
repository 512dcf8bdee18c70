import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_workers_end_with_a_process_that_is_killed(kind):
    """Also those of a fork server, Python's way from 3.14 on, which outlives it."""
    script = f"""
import multiprocessing, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loading import *
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    if {kind!r} == "training":
        loader = training_loader(pictures(), list(EpochKeys(np.arange(400), seed=0, epoch=0, batch_size=2, sizes=SIZES)), 2)
    else:
        loader = evaluation_loader(EvaluationPictures(open_data("fashion-mnist-mini").train, NANO), 2, 2)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        workers = [*map(int, process.stdout.readline().split())]
        assert len(workers) == 2
        assert all(map(alive, workers))
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # before the file is opened, or as it is read
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_that_comes_as_they_are_born(number):
    """A scheduler signals the whole process group, workers included that have not got to their handlers yet."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loading import *
from dynamixer.data.loading import batches
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), {int(number)}))
loader = training_loader(pictures(), list(EpochKeys(np.arange(40), seed=0, epoch=0, batch_size=10, sizes=SIZES)), 2)
print(sum(len(batch.labels) for batch in batches(loader)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "40", done.stderr
