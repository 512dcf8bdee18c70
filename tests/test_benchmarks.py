"""Results that documents speak of have what makes them one: figures, versions, the command."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def test_the_demo_keeps_its_promise():
    demo = json.loads((RESULTS / "demo.json").read_text())
    assert demo["test_top1"] >= 86
    assert demo["train_seconds"] < 300
    assert {"command", "cores", "machine", "torch", "dynamixer"} <= set(demo)


def test_the_any_size_results_are_whole():
    results = json.loads((RESULTS / "any_size.json").read_text())
    assert {"torch", "dynamixer", "machine", "seeds"} <= set(results["about"])
    for ways in results["top1"].values():
        assert set(ways) == {"windows", "resampled", "resizing back to 64"}
        for by_size in ways.values():
            assert set(by_size) == {"48", "64", "80", "96", "128"}
        assert len({by_size["64"] for by_size in ways.values()}) == 1  # at the native size there is only one way
