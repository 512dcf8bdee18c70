"""What the demo's recipe takes and reaches on this machine: trains fashion_nano, evaluates it on the test pictures.

    python benchmarks/demo.py

Writes benchmarks/results/demo.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

import dynamixer

RESULTS = Path(__file__).resolve().parent / "results/demo.json"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # there are no options: a wrong one trains nothing
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trained = dynamixer.train(dynamixer.RECIPES["fashion_nano"](), Path(folder) / "run")
        seconds = time.perf_counter() - start
        tested = dynamixer.evaluate(trained.run, "fashion-mnist-mini", split="test")
    results = {
        "command": "python benchmarks/demo.py",
        "train_seconds": round(seconds),
        "held_out_top1": round(trained.top1 or 0.0, 2),
        "test_top1": round(tested["top1"], 2),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "dynamixer": dynamixer.__version__,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
