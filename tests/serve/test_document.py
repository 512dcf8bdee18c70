"""docs/serve.md says what the code does."""

import re
import shlex
from pathlib import Path

import numpy as np
import timm
import torch

import dynamixer.cli
from dynamixer.serve import Settings
from dynamixer.serve.mixing import layouts
from dynamixer.serve.openapi import REFUSALS, document
from dynamixer.serve.samples import AVERAGED
from dynamixer.serve.sending import PIECE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "tests/serve/test_promises.py").read_text(encoding="utf-8")


def between(start):
    return PAGE.split(f"<!-- {start} -->\n")[1].split("\n<!-- end -->")[0].splitlines()[2:]


def test_its_tables_are_the_codes():
    paths = document(Settings(), 10)["paths"]
    rows = [f"| `{method.upper()} {path}` | {d['summary']} |" for path, by in paths.items() for method, d in by.items()]
    assert between("paths") == rows
    assert between("refusals") == [f"| {status} | {when} |" for status, when in REFUSALS.items()]


def test_its_numbers_are_the_defaults():
    settings = Settings()
    assert f"at most {settings.max_bytes // 2**20} MiB and {settings.max_pixels // 10**6} million pixels" in PAGE
    assert f"{settings.limits.side:,} a side" in PAGE
    assert f"share {settings.body_memory // 2**20} MiB" in PAGE
    assert f"A body has {settings.body_seconds:g} seconds to arrive, an answer {settings.answer_seconds:g}." in PAGE
    assert f"for {settings.body_seconds:g} seconds send nothing" in PAGE
    assert settings.answer_memory == settings.body_memory  # "as much"
    assert f"(over {PIECE // 2**10} KiB)" in PAGE
    assert f"({AVERAGED} at most)" in PAGE


def test_the_sizes_of_the_decision_are_counted():
    page = (ROOT / "docs/adr/0009-serve.md").read_text(encoding="utf-8")
    for name, shown in (("nano", "nano"), ("s", "S")):
        model = timm.create_model(f"dynamixer_{name}", device="meta")
        blank = torch.zeros(1, 3, *model.img_size, device="meta")
        megabytes = 2 * 4 / 3 * sum(layout.weights for layout in layouts(model, blank)) / 1e6
        assert f"{megabytes:.1f} MB for {shown}" in page


def test_its_commands_and_tests_exist():
    known = {name for p in dynamixer.cli.cli.commands["serve"].params for name in p.opts}
    words = [
        word for line in re.findall(r"^ {4}dynamixer serve (.*)$", PAGE, re.MULTILINE) for word in shlex.split(line)
    ]
    assert words
    for word in [w for w in words if w.startswith("--")] + re.findall(r"`(--[a-z-]+)", PAGE):
        assert word in known, word
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in PROMISES, name


def test_its_python_runs(here, monkeypatch, capsys):
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "urllib" in b)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block.replace("http://127.0.0.1:8000/", here[0]), "docs/serve.md", "exec"), names)
    assert abs(names["row"].sum(-1) - 1).max() < 1e-5
    assert np.asarray(names["row"]).shape == (8, 2, 8, 8)
    assert capsys.readouterr().out.startswith("(8, 2, 8, 8) [")
