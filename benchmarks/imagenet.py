"""A dry run of the ImageNet recipes: 20 steps of S, M and L on synthetic pictures of 224 px, two processes, stopped and resumed.

    python benchmarks/imagenet.py [--cost]

Every key is the recipe's but those of `CHANGES`, which make it small. Checked are the learning rate of each epoch and the last
step of the averaged weights against both written anew here, finite losses, that the averaged weights are kept, and that the run
goes on after SIGTERM where it was.
Writes benchmarks/results/imagenet.json and the tables in docs/training.md; with --cost only what the whole training would take.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import dynamixer

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/imagenet.json", ROOT / "docs/training.md"
NAMES = ("imagenet_s", "imagenet_m", "imagenet_l")
PICTURES, FLOPS, DOLLARS = 1_281_167, 100e12, 2  # of ImageNet-1K; of one GPU a second and an hour, assumed
CLASSES, EPOCHS, WARMUP, COOLDOWN, PER_EPOCH, BATCH = 1000, 5, 1, 1, 4, 8
CHANGES = {
    "epochs": EPOCHS, "warmup_epochs": WARMUP, "cooldown_epochs": COOLDOWN, "batch_size": BATCH, "accumulate": 2,
    "limit_train": BATCH * PER_EPOCH,
    "holdout": 0.008, "precision": "fp32", "workers": 0, "checkpoint_every": 1, "track": "none",
}  # fmt: skip


def synthetic(folder: Path) -> Path:
    """A thousand classes with one smooth random picture each."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        path = folder / f"{label:04}" / "a.jpg"
        path.parent.mkdir(parents=True)
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(path)
    return folder


def scheduled(recipe: dynamixer.TrainConfig, epoch: int) -> float:
    """The learning rate of the last step of an epoch, counted from 1: a ramp, a cosine, and its end."""
    assert recipe.warmup_lr is not None
    lr, done, warmup, all_of_it = recipe.lr, epoch * PER_EPOCH - 1, WARMUP * PER_EPOCH, (EPOCHS - COOLDOWN) * PER_EPOCH
    if done < warmup:
        return recipe.warmup_lr + done * (lr - recipe.warmup_lr) / warmup
    if done >= all_of_it:
        return recipe.min_lr
    return recipe.min_lr + (lr - recipe.min_lr) * (1 + math.cos(math.pi * done / all_of_it)) / 2


def check_average(run: Path, decay: float | None) -> None:
    """Compare the averaged weights of the last two steps with what the decay makes of them, and with the file that is kept."""
    assert decay is not None
    steps = sorted((run / "checkpoints").glob("step-*"))[-2:]
    before, last = (load_file(step / "tensors.safetensors") for step in steps)
    kept = load_file(run / "last.safetensors")
    moved = expected = 0.0
    for name in kept:
        old, new, trained = before[f"ema.{name}"], last[f"ema.{name}"], last[f"model.{name}"]
        assert new.equal(kept[name]), name
        step = (1 - decay) * (trained.double() - old)
        moved += float((new.double() - old - step).square().sum())
        expected += float(step.square().sum())
    assert 0 < moved < 0.1**2 * expected, (moved, expected)  # fp32 rounds steps as small as these


def dry_run(name: str, data: Path, run: Path) -> dict[str, object]:
    """Train, stop in the third epoch, go on; the figures of the run."""
    words = [f"{key}={value}" for key, value in CHANGES.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dynamixer", "train", name,
        "--data", str(data), "--out", str(run), *words,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    metrics = run / "metrics.csv"
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[1]
    assert metrics.exists(), said
    before = metrics.read_text()
    assert len(before.splitlines()) < EPOCHS + 1, said
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics.read_text().startswith(before)
    rows = list(csv.DictReader(metrics.open()))
    rates = [float(row["lr"]) for row in rows]
    expected = [scheduled(dynamixer.RECIPES[name](), epoch) for epoch in range(1, EPOCHS + 1)]
    assert np.allclose(rates, expected, rtol=1e-6), (rates, expected)
    losses = [float(row["train_loss"]) for row in rows]
    assert all(map(math.isfinite, losses))
    check_average(run, dynamixer.RECIPES[name]().ema)
    speeds = [float(row["images_per_s"]) for row in csv.DictReader((run / "timing.csv").open())]
    return {
        "steps": len(rows) * PER_EPOCH, "resumed_after_epochs": len(before.splitlines()) - 1, "rates": rates,
        "first_loss": losses[0], "last_loss": losses[-1], "images_per_second": round(float(np.median(speeds)), 2),
    }  # fmt: skip


def table(runs: dict[str, dict[str, object]]) -> str:
    lines = [
        "| recipe | steps | resumed after epoch | loss, first and last epoch | images/s |",
        "|---|---|---|---|---|",
    ]
    for name, r in runs.items():
        losses = f"{r['first_loss']:.2f}, {r['last_loss']:.2f}"
        lines.append(
            f"| {name} | {r['steps']} | {r['resumed_after_epochs']} of {EPOCHS} | {losses} | {r['images_per_second']:.1f} |"
        )
    return "\n".join(lines)


def cost() -> str:
    """What the recipes take on eight GPUs, by arithmetic and two assumptions."""
    lines = ["| recipe | operations | hours of 8 GPUs | dollars |", "|---|---|---|---|"]
    for name in NAMES:
        recipe = dynamixer.RECIPES[name]()
        multiply_adds = dynamixer.count(timm.create_model(recipe.model, device="meta")).multiply_adds
        operations = 3 * 2 * multiply_adds * PICTURES * recipe.epochs
        hours = operations / (8 * FLOPS) / 3600
        lines.append(f"| {name} | {operations:.1e} | {hours:.1f} | {8 * hours * DOLLARS:,.0f} |")
    return "\n".join(lines)


def write(mark: str, text: str) -> None:
    """Put a table into the page."""
    between = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?\n?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(between.sub(rf"\g<1>{text}\n\2", PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="only what the whole training would take, by arithmetic")
    asked = parser.parse_args()
    write("imagenet.cost", cost())
    if asked.cost:
        return
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic(Path(folder) / "data")
        runs = {name: dry_run(name, data, Path(folder) / name) for name in NAMES}
    results = {
        "command": "python benchmarks/imagenet.py",
        "changes": CHANGES,
        "runs": runs,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "dynamixer": dynamixer.__version__,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write("imagenet.json", table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
