"""Does in milliseconds what dynamixer.study.child does in minutes: the same words, files, signals and exit codes."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

SECONDS = float(os.environ.get("FAKE_SECONDS", "0.05"))  # for an epoch
FAILING = os.environ.get("FAKE_FAILING", "nothing")


def write(path, rows):
    aside = path.with_suffix(".aside")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)


def train(config, out):
    run, epochs = Path(out), 3
    if FAILING in run.name:
        sys.exit(f"error: {run.name} cannot be trained")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    assert Path(config).is_file()
    seed = int(run.name[-1])
    done = len((run / "metrics.csv").read_text().splitlines()) - 1 if (run / "metrics.csv").exists() else 0
    for epoch in range(done, epochs):
        time.sleep(SECONDS)
        rows = [
            {
                "epoch": e + 1,
                "lr": 0.1,
                "train_loss": 1.5,
                "train_top1": 40,
                "val_top1": 50 + seed + e / 3,
                "val_loss": 1.25,
            }
            for e in range(epoch + 1)
        ]
        write(run / "timing.csv", [{"epoch": e + 1, "seconds": 36} for e in range(epoch + 1)])  # the first: see `done`
        write(run / "metrics.csv", rows)
    threads = int(os.environ["OMP_NUM_THREADS"])
    (run / "environment.json").write_text(json.dumps({"threads": threads, "torch": "2", "commit": None}))
    (run / "last.safetensors").touch()


def measure(task):
    told = json.loads(task)
    lines = {
        "runs": [{"parameters": 7, "test_top1": 60.5, "test_loss": 1.0}],
        "sizes": [{"size": 24, "top1": 50.0}],
        "depth": [{"block": 0, "axis": "row", "dynamic": 0.5, "change": 0.25, "entropy": 0.75}],
        "matrices": [{"block": 0, "line": 0, "segment": 0, "picture": "mean", "weights": "1"}],
        "corrupted": [{"kind": "fog", "severity": 1, "error": 40.0}],
    }
    Path(told["out"]).write_text(json.dumps({part: lines[part] for part in told["parts"]}))


parent, kind, *words = sys.argv[1:]
assert int(parent) == os.getppid()
if kind == "train":
    assert (words[0], words[2]) == ("--config", "--out")
    train(words[1], words[3])
else:
    measure(*words)
