"""The engine against two bare loops over the same model and the same pictures: step by step in turn, medians.

    python benchmarks/engine.py [RECIPE] [KEY=VALUE]... [--steps 60]

The engine reads, augments, checks, counts and shows its progress. One bare loop only computes, on pictures that lie in memory
as finished tensors; the other takes them from a loader of its own over the same files with the same augmentation. Small pictures
that are kept after their first decoding (docs/training.md) have been read once before: what is timed is any epoch but the
first. A checkpoint (by default one in 200 steps) is timed apart. Writes benchmarks/results/engine.json.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dynamixer.device import resolve_device
from dynamixer.progress import Meter
from dynamixer.speed import use_kernel
from dynamixer.speed.bench import about
from dynamixer.training.config import TrainConfig
from dynamixer.training.engine import _Run
from dynamixer.training.resolve import resolve
from dynamixer.training.setup import Course, build_network, prepare_data
from dynamixer.training.stopping import Stopping
from dynamixer.training.world import World

WARM_UP = 5  # steps
RESULTS = Path(__file__).resolve().parent / "results/engine.json"


def made(config: TrainConfig, out: str) -> _Run:
    torch.manual_seed(config.seed)
    world, data = World(resolve_device(config.device)), prepare_data(config)
    network = build_network(config, data.train.classes)
    network.model.to(world.device)
    return _Run(config, Path(out), world, data, network, Stopping())


class Bare:
    """Forward, loss, backward, clip, step, on the batches of an iterator."""

    def __init__(self, engine: _Run, batches: Iterator[Any]):
        config, self.batches, self.engine = engine.config, batches, engine
        torch.manual_seed(config.seed)
        self.model = build_network(config, engine.data.train.classes).model.train()
        if any(getattr(part, "fused", False) for part in engine.model.modules()):
            use_kernel(self.model)  # the same model
        course = Course(config, engine.data, engine.network, engine.world)
        self.optimizer, self.scheduler = course.optimizer(self.model)

    def step(self, number: int) -> None:
        config = self.engine.config
        pictures, labels, _ = next(self.batches)
        self.scheduler.step_update(number)
        with self.engine.replica.autocast():
            logits = self.model(pictures)
        loss: Any = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        loss.backward()
        if config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()


def quartiles(steps: list[list[float]], bare: int) -> list[float]:
    """The engine's speed in percent of a bare loop's, of the same steps: lower quartile, median, upper quartile."""
    ratios = [100 * seconds[bare] / seconds[-1] for seconds in steps]
    return [round(q, 1) for q in statistics.quantiles(ratios, n=4)]


def table(runs: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| run | steps | of a bare loop on the same files | on tensors in memory | waiting for pictures | a checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        files, tensors = (
            f"{middle} % ({low}-{high})"
            for low, middle, high in (found[f"percent_of_bare_on_{on}"] for on in ("files", "tensors"))
        )
        cells = (files, tensors, f"{found['data_wait_percent']} %", f"{found['checkpoint_seconds']} s")
        lines.append(f"| {name.split()[0]} | {found['steps']} | {' | '.join(cells)} |")
    machines = {
        f"{m['processor']}, {m['cores']} cores with {m['vectors']}, torch {m['torch']}, commit {m['commit'][:7]}"
        for m in (found["about"] for found in runs.values())
    }
    return "\n".join([*lines, "", f"On {'; '.join(sorted(machines))}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["fashion_nano"])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    recipe, *words = options.words if "=" not in options.words[0] else ["fashion_nano", *options.words]
    config, _ = resolve(recipe, words=words)
    config = dataclasses.replace(config, epochs=100, track="none")
    with tempfile.TemporaryDirectory() as out:
        engine = made(config, f"{out}/run")
        kept = [batch for batch, _ in zip(engine.course.batches(0), range(options.steps), strict=False)]
        computing, reading = Bare(engine, itertools.cycle(kept)), Bare(engine, engine.course.batches(0))
        loader, meter = engine.course.batches(0), Meter("", 10**9, None)
        engine.replica.task.train()
        steps: list[list[float]] = []
        for number in range(options.steps):
            with contextlib.redirect_stderr(io.StringIO()):
                seconds = []
                for run in (computing.step, reading.step, partial(engine._step, loader=loader, meter=meter)):
                    began = time.perf_counter()
                    run(number)
                    seconds.append(time.perf_counter() - began)
                steps.append(seconds)
            if number == WARM_UP:
                engine.waited = engine.trained = 0.0
        began = time.perf_counter()
        engine._save()
        saving = time.perf_counter() - began
    steps = steps[WARM_UP:]
    ours = statistics.median(engine for *_, engine in steps)
    found = {
        "command": f"benchmarks/engine.py {' '.join(options.words)} --steps {options.steps}",
        "about": about(),
        "steps": len(steps),
        "percent_of_bare_on_tensors": quartiles(steps, 0),
        "percent_of_bare_on_files": quartiles(steps, 1),
        "engine_images_per_s": round(config.batch_size / ours, 1),
        "data_wait_percent": round(100 * engine.waited / engine.trained, 2),
        "checkpoint_seconds": round(saving, 3),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    results["runs"][" ".join(options.words)] = found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
