"""docs/explain.md says what the code does."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import dynamixer.cli
from dynamixer.explain import AxisAverage, BlockMixing

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explain.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "explain.md", "exec"), names)
    assert names["flow"].shape == (8, 8, 16, 16)
    assert len(names["mixings"]) == 6


@pytest.mark.parametrize("line", re.findall(r"(?:^ {4}|`)dynamixer (explain [^`\n]*)", PAGE, re.MULTILINE))
def test_the_commands_of_the_page_exist(line):
    command, *words = shlex.split(line)
    options = {name for p in dynamixer.cli.cli.commands[command].params for name in p.opts}
    assert all(word in options for word in words if word.startswith("--"))


def test_the_table_is_its_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    results = json.loads((ROOT / "benchmarks/results/rollout.json").read_text())
    shown = PAGE.split("<!-- rollout.json -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == importlib.import_module("rollout").table(results["correlations"])
    assert {"torch", "dynamixer", "machine", "seeds"} <= set(results["about"])
    for name, row in results["correlations"].items():
        assert row["the rollout"] > row["transposed matrices"]
        told = row["the rollout"] - row["even weights in place of the matrices"]
        assert 0.045 <= told <= 0.115, name  # as the page says: 0.05 to 0.11


def test_every_field_is_explained():
    for field in dataclasses.fields(BlockMixing):
        assert f"`{field.name}`" in PAGE, field.name
    for field in dataclasses.fields(AxisAverage):
        assert f"`{field.name}`" in PAGE or f"row.{field.name}" in PAGE, field.name


def test_pictures_are_there_and_small():
    for target in re.findall(r"\]\((images/[^)]+)\)", PAGE):
        assert 1000 < (ROOT / "docs" / target).stat().st_size < 150_000, target
