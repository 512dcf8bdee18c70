"""How far the rollout of the mixing carries: its rank correlation with the gradient, which has all of the network in it.

    python benchmarks/rollout.py --data imagenette128/val.parquet --run "photographs, tiny as it ships=dynamixer_tiny"
    python benchmarks/rollout.py --data imagenette128/val.parquet --run "photographs at 64 px, nano=RUN" --size 64
    python benchmarks/rollout.py --data fashion-mnist-mini --run "Fashion-MNIST, nano, no softmax=RUN"

Merges into benchmarks/results/rollout.json and writes the table in docs/explain.md. Each entry is a mean over 32 evenly
spread pictures and four tokens of each. The nano for photographs is trained by `dynamixer train
--data imagenette128/train.parquet size=64 sizes=[48,64,80,96] model=dynamixer_nano model.patch_size=8 model.enlarge=true
epochs=24 batch_size=64 lr=2e-3 warmup_epochs=2 crop=rrc scale=0.35 holdout=0`, the other one by `dynamixer train fashion_nano`.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dynamixer
from dynamixer.data import open_data
from dynamixer.explain import Explanation, look, rollout
from dynamixer.explain.receptive import gradient_of, rank_correlation, with_even_weights
from dynamixer.models.dynamixer import DynaMixer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/rollout.json"
PAGE = ROOT / "docs/explain.md"
PICTURES = 32


def _changed(seen: Explanation, change: Callable[[Tensor], Tensor]) -> Explanation:
    blocks = [
        replace(b, row=None if b.row is None else change(b.row), column=None if b.column is None else change(b.column))
        for b in seen.blocks
    ]
    return replace(seen, blocks=tuple(blocks))


WAYS: dict[str, Callable[[Explanation], Explanation]] = {
    "the rollout": lambda seen: seen,
    "even weights in place of the matrices": with_even_weights,
    "transposed matrices": lambda seen: _changed(seen, lambda matrices: matrices.mT),
}


def correlations(run: str, data: str, size: int | None) -> dict[str, float]:
    checkpoint = dynamixer.load(run)
    model = checkpoint.model
    assert isinstance(model, DynaMixer)
    preprocessing = checkpoint.preprocessing.at(size) if size else checkpoint.preprocessing
    _, source = open_data(data).for_evaluation()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(0, len(source), -(-len(source) // PICTURES)):
        x = preprocessing(source.picture(i))[None]
        seen = look(model, x)
        height, width = seen.blocks[-1].grid
        for token in ((0, 0), (height // 2, width // 2), (1, width - 1), (height - 1, 1)):
            gradient = gradient_of(model, x, token, block=len(seen.blocks) - 1)
            for way, change in WAYS.items():
                found[way].append(rank_correlation(rollout(change(seen), token), gradient))
    return {way: round(sum(values) / len(values), 3) for way, values in found.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| model | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    lines += [f"| {name} | " + " | ".join(f"{row[way]:.2f}" for way in WAYS) + " |" for name, row in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", action="append", required=True, metavar="TITLE=RUN")
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text())["correlations"] if RESULTS.exists() else {}
    about = {"torch": torch.__version__, "dynamixer": dynamixer.__version__, "machine": platform.machine(), "seeds": 1}
    for item in options.run:
        title, run = item.split("=", 1)
        results[title] = correlations(run, options.data, options.size)
    RESULTS.write_text(json.dumps({"about": about, "correlations": results}, indent=2) + "\n", encoding="utf-8")
    start, rest = PAGE.read_text(encoding="utf-8").split("<!-- rollout.json -->\n")
    end = rest.split("\n<!-- end -->", 1)[1]
    PAGE.write_text(f"{start}<!-- rollout.json -->\n{table(results)}\n<!-- end -->{end}", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
