"""Runs the study: child processes side by side, each on a run folder, stopped in time and gone on with later."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamixer.errors import RunError, UserError
from dynamixer.files import reason, write_text
from dynamixer.lock import locked
from dynamixer.logs import log
from dynamixer.progress import Meter, progress
from dynamixer.study.jobs import Job, Place, jobs_left, rows_of
from dynamixer.study.results import COLUMNS, Line, Results
from dynamixer.study.rows import Run, protocol
from dynamixer.training.config import values_of

PATIENCE = 60.0  # seconds for a child to write its checkpoint
POLL = 0.2  # seconds
CHILD = ("-m", "dynamixer.study.child")


@dataclass
class Outcome:
    """What a leg came to."""

    done: int  # in this leg
    left: int
    failed: list[str]
    hours_left: float | None  # of training on this machine, if any was done
    finished: int = 0  # runs that are in the results
    lost: list[str] = field(default_factory=list)  # runs whose weights are gone before all was measured
    without: list[str] = field(default_factory=list)  # options that were not given

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return vars(self)

    def text(self) -> str:
        """In words."""
        hours = f", about {self.hours_left:.1f} hours" if self.left and self.hours_left is not None else ""
        out = [f"{self.done} runs done now, {self.finished} in all, {self.left} left{hours}."]
        out += ["The same command goes on."] if self.left else []
        out += [f"Not measured, since the weights are gone: {', '.join(self.lost)}"] if self.lost else []
        out += [f"Without {' and '.join(self.without)}, what needs them is left out."] if self.without else []
        return "\n".join(out)


def study(
    place: Place, results: Path, wanted: Sequence[Run], *, minutes: float, side_by_side: int, words: Sequence[str] = ()
) -> Outcome:
    """Train and measure what is left of these runs for so many minutes; call again to go on.

    Args:
        place: pictures and run folders; see `place_of`.
        results: the folder of the tables of results.
        wanted: the runs, in their order.
        minutes: when to stop.
        side_by_side: runs at a time.
        words: key=value over the recipes' own, for all runs.

    Raises:
        UserError: another queue in the same folder, results of another protocol, keys that cannot work.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, with checkpoints written.
    """
    with held(place.work):
        known = Results(results)
        jobs, lost = jobs_left(place, known, wanted, values_of(words))
        outcome = Queue(place, known, jobs, side_by_side).go(minutes)
        outcome.finished, outcome.lost = len(known.lines["runs"]), lost
    given = {"--imagenette": "imagenette" in place.train, "--corrupted": place.corrupted is not None}
    outcome.without = [option for option, is_given in given.items() if not is_given]
    return outcome


class Queue:
    """Works through jobs, some at a time.

    Args:
        place: where everything is.
        results: where finished runs go.
        jobs: what there is to do, in order.
        side_by_side: how many at a time; each gets an equal share of the processor's threads.
    """

    def __init__(self, place: Place, results: Results, jobs: Sequence[Job], side_by_side: int):
        self.place, self.results, self.waiting, self.side_by_side = place, results, list(jobs), side_by_side
        self.running: list[Job] = []
        self.failed: list[str] = []
        self.threads = max(1, cores() // side_by_side)

    def go(self, minutes: float) -> Outcome:
        """Work until all is done or the time is over; what runs then is stopped with a checkpoint.

        Raises:
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, with checkpoints written.
        """
        end, count = time.monotonic() + 60 * minutes, len(self.waiting)
        total = sum(job.epoch * job.config.epochs for job in self.waiting if job.training)
        for job in self.waiting:
            job.done = len(job.epochs())
        behind = sum(job.epoch * job.done for job in self.waiting if job.training)
        with progress("study", total, done=behind) as meter:
            try:
                while (self.waiting or self.running) and time.monotonic() < end:
                    while self.waiting and len(self.running) < self.side_by_side:
                        self._start(self.waiting.pop(0))
                    time.sleep(POLL)
                    for job in list(self.running):
                        self._look(job, meter)
            finally:
                stopped = self._stop()
        left = len(self.waiting) + len(stopped)
        rate = meter.rate if meter.done > meter.first else 0.0
        hours = max(0, total - meter.done) / rate / 3600 if rate else None
        return Outcome(count - left - len(self.failed), left, self.failed, hours)

    def _start(self, job: Job) -> None:
        """Start the process that a job needs next."""
        if job.training:
            write_text(job.beside(".yaml"), job.config.to_yaml())
            words = ["train", "--config", str(job.beside(".yaml")), "--out", str(job.folder)]
        else:
            place = self.place
            told = {"weights": job.weights, "test": place.test[job.run.dataset], "corrupted": place.corrupted}
            told |= {"precision": job.config.precision, "out": job.measured}
            task = {key: value and str(value) for key, value in told.items()} | {"parts": job.parts}
            words = ["measure", json.dumps(task)]
        threads = str(self.threads)
        with job.beside(".log").open("ab") as output:
            job.process = subprocess.Popen(
                [sys.executable, *CHILD, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                start_new_session=True,  # Ctrl-C is the queue's: it stops them
            )
        if job not in self.running:
            log(
                f"{job.run}: {'training' if job.training else 'measuring'}"
                + (f", after epoch {job.done}" if job.done else "")
            )
            self.running.append(job)

    def _look(self, job: Job, meter: Meter) -> None:
        """Take note of what a job has done, and go on with what comes next of it."""
        assert job.process is not None, "it was started"
        code = job.process.poll()
        if job.training and (epochs := len(job.epochs())) > job.done:
            meter.advance(job.epoch * (epochs - job.done))
            job.done = epochs
        if code is None:
            return
        if code:
            self._fail(job, code)
        elif job.training:
            job.training = False
            self._start(job)
        else:
            self._record(job)
            self.running.remove(job)

    def _fail(self, job: Job, code: int) -> None:
        self.running.remove(job)
        lines = job.beside(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"]
        self.failed.append(str(job.run))
        log(f"{job.run} failed with exit code {code}: {lines[-1]} ({job.beside('.log')})")

    def _record(self, job: Job) -> None:
        """Write the results of a job, and let go of what is only for resuming."""
        measured: dict[str, list[Line]] = json.loads(job.measured.read_text(encoding="utf-8"))
        found = {part: measured[part] for part in job.parts}
        if "runs" in found:
            about = json.loads((job.folder / "environment.json").read_text(encoding="utf-8"))
            epochs = job.epochs()
            found["epochs"] = [{key: _short(row.get(key, "")) for key in COLUMNS["epochs"]} for row in epochs]
            seconds = sum(float(row["seconds"]) for row in rows_of(job.folder / "timing.csv"))
            found["runs"][0] |= {
                "protocol": protocol(job.run, job.config),
                "epochs": len(epochs),
                "val_top1": _short(epochs[-1].get("val_top1", "")),
                "hours": round(seconds / 3600, 4),
                **{key: _all_of(about, key) for key in ("cpu", "threads", "torch", "commit")},
            }
        self.results.add(job.run, found)
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        tops = self.results.tops(job.run.dataset, job.run.row, job.run.share)
        log(f"{job.run}: done, test {tops[job.run.seed]:.2f} %")

    def _stop(self) -> list[Job]:
        """Ask what runs to write a checkpoint and leave; those that had to be asked."""
        asked = [job for job in self.running if job.process is not None and job.process.poll() is None]
        for job in asked:
            assert job.process is not None, "it was started"
            job.process.terminate()
        end = time.monotonic() + PATIENCE
        for job in asked:
            assert job.process is not None, "it was started"
            try:
                job.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                log(f"{job.run} does not end: it is killed, and goes on from its last checkpoint")
                job.process.kill()
                job.process.wait()
        return list(self.running)


@contextlib.contextmanager
def held(work: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, for this process alone; the system lets go of it when the process is gone.

    Raises:
        UserError: another process holds it.
        RunError: it cannot be made.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunError(f"{work} could not be made: {reason(error)}.") from None
    try:
        if not locked(lock):
            raise UserError(f"another queue is at work in {work}: wait for it, or stop it.")
        yield
    finally:
        os.close(lock)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _all_of(about: dict[str, Any], key: str) -> str:
    """What a run folder's environment.json says of a key, over all its processes."""
    return " + ".join(dict.fromkeys(str(one.get(key) or "") for one in (*about.get("earlier", ()), about)))


def _short(number: str) -> str:
    """Of a figure in metrics.csv as much as says something."""
    return number if number.isdigit() or not number else f"{float(number):.5g}"
