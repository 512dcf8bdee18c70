"""What the weights that ship are worth on other data: fine-tuning dynamixer_tiny against training it anew, for the same time.

    python benchmarks/transfer.py --data cifar10

The folder has train.parquet and test.parquet. A small data set is made of it, a folder of pictures for each class: `EACH`
training pictures of a class, drawn by seed. Both runs have the same pictures, size, batch and number of epochs, so the same
number of steps of the same work; each has its recipe's learning rate. The test pictures, the first 200 of each class, are the
same for all seeds. Writes benchmarks/results/transfer.json and the table in docs/training.md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

import dynamixer
from dynamixer.data import open_data
from dynamixer.data.base import Source
from dynamixer.training.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/transfer.json", ROOT / "docs/training.md"
EACH, TESTED, SEEDS = 60, 200, (0, 1, 2)
COMMON = ["size=64", "epochs=12", "batch_size=32", "warmup_epochs=1", "holdout=0", "kernel=auto", "track=none"]
WAYS = {
    "fine-tuned": ("finetune", ["weights=dynamixer_tiny"]),
    "from scratch": ("imagenette_tiny", []),
}


def write_folder(source: Source, folder: Path, chosen: dict[int, list[int]]) -> Path:
    """Pictures as files, a folder for each class."""
    for label, indices in chosen.items():
        place = folder / source.classes[label]
        place.mkdir(parents=True)
        for index in indices:
            (place / f"{index:05}.png").write_bytes(source.encoded(index) or b"")
    return folder


def by_class(source: Source) -> dict[int, list[int]]:
    labels = np.asarray(source.labels)
    return {label: np.flatnonzero(labels == label).tolist() for label in range(len(source.classes))}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| | top-1 of test pictures, mean and standard deviation | seconds of training |", "|---|---|---|"]
    for way, r in results.items():
        accuracy = f"{statistics.mean(r['top1']):.1f} ± {statistics.stdev(r['top1']):.1f} %"
        lines.append(f"| {way} | {accuracy} | {statistics.mean(r['seconds']):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    asked = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {way: {"top1": [], "seconds": []} for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = open_data(str(asked.data))
        assert data.train is not None
        assert data.test is not None
        test = write_folder(data.test, root / "test", {k: v[:TESTED] for k, v in by_class(data.test).items()})
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            chosen = {k: rng.choice(v, EACH, replace=False).tolist() for k, v in by_class(data.train).items()}
            small = write_folder(data.train, root / f"small-{seed}", chosen)
            for way, (recipe, words) in WAYS.items():
                config = resolve(recipe, words=[f"data={small}", *COMMON, f"seed={seed}", *words])[0]
                run = dynamixer.train(config, root / f"{way}-{seed}")
                rows = (Path(run.run) / "timing.csv").read_text().splitlines()
                column = rows[0].split(",").index("seconds")
                results[way]["seconds"].append(round(sum(float(row.split(",")[column]) for row in rows[1:]), 1))
                found = dynamixer.evaluate(Path(run.run) / "last.safetensors", test)
                results[way]["top1"].append(round(found["top1"], 2))
                print(way, seed, results[way])
    kept = {
        "command": "python benchmarks/transfer.py --data cifar10",
        "pictures_of_a_class": EACH,
        "seeds": SEEDS,
        "keys": {way: [recipe, *COMMON, *words] for way, (recipe, words) in WAYS.items()},
        "results": results,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "dynamixer": dynamixer.__version__,
    }
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    mark = re.compile("(<!-- transfer.json -->\n).*?\n?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(mark.sub(rf"\g<1>{table(results)}\n\2", PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
