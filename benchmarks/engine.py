"""The engine against a bare loop over the same model and the same pictures, as tensors in memory: interleaved, medians.

    python benchmarks/engine.py [RECIPE] [KEY=VALUE]... [--rounds 5] [--steps 60]

A round is `--steps` steps of each. The engine decodes, augments, checks, counts, shows its progress and writes a checkpoint in
the middle of each round (its default is one in 200 steps); the bare loop only computes. Writes benchmarks/results/engine.json.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dynamixer
from dynamixer.device import resolve_device
from dynamixer.progress import Meter
from dynamixer.training.config import TrainConfig
from dynamixer.training.engine import _Run
from dynamixer.training.resolve import resolve
from dynamixer.training.setup import Course, build_network, prepare_data
from dynamixer.training.stopping import Stopping
from dynamixer.training.world import World

RESULTS = Path(__file__).resolve().parent / "results/engine.json"


def made(config: TrainConfig, out: str) -> _Run:
    torch.manual_seed(config.seed)
    world, data = World(resolve_device(config.device)), prepare_data(config)
    network = build_network(config, len(data.train.classes))
    network.model.to(world.device)
    return _Run(config, Path(out), world, data, network, Stopping())


class Bare:
    """Forward, loss, backward, clip, step."""

    def __init__(self, engine: _Run, batches: list[Any]):
        config, self.batches, self.engine = engine.config, batches, engine
        torch.manual_seed(config.seed)
        self.model = build_network(config, len(engine.data.train.classes)).model.train()
        course = Course(config, engine.data, engine.network, engine.world)
        self.optimizer, self.scheduler = course.optimizer(self.model)

    def run(self, first: int, steps: int) -> float:
        config, began = self.engine.config, time.perf_counter()
        for number in range(first, first + steps):
            pictures, labels, _ = self.batches[number % len(self.batches)]
            self.scheduler.step_update(number)
            with self.engine._autocast():
                logits = self.model(pictures)
            F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing).backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["fashion_nano"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    recipe, *words = options.words if "=" not in options.words[0] else ["fashion_nano", *options.words]
    config, _ = resolve(recipe, words=words)
    config = dataclasses.replace(config, epochs=100, track="none")
    with tempfile.TemporaryDirectory() as out:
        engine = made(config, f"{out}/run")
        bare = Bare(engine, [batch for batch, _ in zip(engine.course.batches(0), range(options.steps), strict=False)])
        loader, meter = engine.course.batches(0), Meter("", 1, None)
        engine.task.train()
        ratios, rates = [], []
        for number in range(-1, options.rounds):  # one round to warm up
            first = (number + 1) * options.steps
            seconds = bare.run(first, options.steps)
            engine.waited = engine.trained = 0.0
            began = time.perf_counter()
            for step in range(first, first + options.steps):
                engine._step(step, loader, meter)
                if step == first + options.steps // 2:
                    engine._save()
            ratio = seconds / (time.perf_counter() - began)
            print(f"round {number}: bare {seconds:.2f} s, engine at {100 * ratio:.1f} %, waiting for pictures {100 * engine.waited / engine.trained:.1f} %")
            if number >= 0:
                ratios.append(ratio)
                rates.append((config.batch_size * options.steps / seconds, 100 * engine.waited / engine.trained))
    about = {"torch": torch.__version__, "dynamixer": dynamixer.__version__, "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}  # fmt: skip
    found = {
        "command": f"benchmarks/engine.py {' '.join(options.words)} --rounds {options.rounds} --steps {options.steps}",
        "throughput_percent_of_bare": round(100 * statistics.median(ratios), 1),
        "spread_percent": [round(100 * min(ratios), 1), round(100 * max(ratios), 1)],
        "bare_images_per_s": round(statistics.median(rate for rate, _ in rates), 1),
        "data_wait_percent": round(statistics.median(wait for _, wait in rates), 2),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    results["about"] = about
    results["runs"][" ".join(options.words)] = found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
