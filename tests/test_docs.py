"""What the documents say is what the code does."""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import timm
import yaml

import dynamixer
import dynamixer.cli
from dynamixer.explain.report import explain
from dynamixer.export.int8 import IN_FP32
from dynamixer.export.run import INT8_SHARE
from dynamixer.many.parts import PART
from dynamixer.models.shipped import DEFAULT
from dynamixer.models.variants import VARIANTS
from dynamixer.serve.settings import Settings
from dynamixer.training.folder import FIGURES
from dynamixer.training.recipes import ABLATIONS
from dynamixer.training.resolve import resolve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs/models.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def between(text, start):
    return text.split(f"<!-- {start} -->\n")[1].split("\n<!-- end -->")[0]


def test_the_table_of_models_is_what_the_code_counts():
    rows = [line.strip("| ").split(" | ") for line in between(README, "models").splitlines()[2:]]
    counts = {name: dynamixer.count(timm.create_model(name, device="meta")) for name in VARIANTS}
    expected = []
    for name, (parameters, multiply_adds) in sorted(counts.items(), key=lambda item: item[1]):
        v = VARIANTS[name]
        expected.append([name, f"{parameters:,}", f"{multiply_adds:,}", f"{v.img_size} px", str(v.num_classes)])
    assert rows == expected
    assert between(MODELS, "models") == between(README, "models")


def test_every_option_of_the_models_is_in_the_table():
    told = {
        name for row in between(MODELS, "options").splitlines()[2:] for name in re.findall("`(.*?)`", row.split("|")[1])
    }
    of_timm = {"img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype"}
    assert told == set(inspect.signature(dynamixer.DynaMixer).parameters) - of_timm


def test_the_table_of_ablations_is_what_the_recipes_build(monkeypatch):
    monkeypatch.setattr(dynamixer.DynaMixer, "init_weights", lambda model: None)  # slow without memory, and not counted
    rows = [line.strip("| ").split(" | ") for line in between(MODELS, "ablations").splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`ablate:{name}`" for name in ABLATIONS]
    for name, change, parameters, _ in rows:
        config = resolve(name.strip("`"))[0]
        model = timm.create_model(config.model, device="meta", **config.model_args)
        assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters
        ((key, value),) = ABLATIONS[name.strip("`").removeprefix("ablate:")].items()
        shown = f'"{value}"' if isinstance(value, str) else value
        assert (f"of {value} channels" if key == "width" else f"`{key}={shown}`") in change


@pytest.mark.parametrize("page", ["README.md", "docs/start.md", "docs/models.md", "docs/any-size.md"])
def test_the_python_of_the_pages_runs(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), {})


COMMAND = re.compile(r"^ {4,}(?:[A-Z_]+=\S+ )?(?:torchrun .* -m |\.venv/bin/)?dynamixer (.*)$", re.MULTILINE)
LINES = [line for page in PAGES for line in COMMAND.findall(page.read_text(encoding="utf-8")) if "RECIPE" not in line]


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_the_commands_of_the_pages_exist(line):
    command, *words = shlex.split(line, comments=True)
    known = dynamixer.cli.cli.commands[command]
    if isinstance(known, click.Group):
        known, words = known.commands[words[0]], words[1:]
    options = {name for p in known.params for name in p.opts}
    assert all(word in options for word in words if word.startswith("--"))
    if command == "train":
        name = "".join(w for w in words[:1] if "=" not in w and not w.startswith("--"))
        resolve(name, words=[w for w in words if "=" in w])


def benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_the_engines_table_is_its_results(monkeypatch):
    runs = json.loads((ROOT / "benchmarks/results/engine.json").read_text())["runs"]
    assert between(TRAINING, "engine.json") == benchmark("engine", monkeypatch).table(runs)


def test_every_recipe_and_file_of_a_run_is_in_the_page():
    assert all(f"`{name}`" in TRAINING for name in dynamixer.RECIPES)
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "timing.csv",
        "report.html",
        *(f"{n}.png" for n in FIGURES),
    ):
        assert f"`{name}`" in TRAINING


def test_the_any_size_table_is_its_results(monkeypatch):
    any_size = benchmark("any_size", monkeypatch)
    results = json.loads((ROOT / "benchmarks/results/any_size.json").read_text())["top1"]
    page = (ROOT / "docs/adr/0003-any-size.md").read_text(encoding="utf-8")
    assert between(page, "any_size.json") == any_size.table(results)


def test_the_int8_table_is_its_results_and_keeps_the_promise(monkeypatch):
    rows = json.loads((ROOT / "benchmarks/results/int8.json").read_text())["rows"]
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    assert between(page, "int8.json") == benchmark("int8", monkeypatch).table(rows)
    assert [row["in_fp32"] for row in rows] == [*IN_FP32]
    assert all(row["share"] >= INT8_SHARE and row["model_accuracy"] - row["file_accuracy"] <= 0.5 for row in rows)


def test_the_transfer_table_is_its_results_and_fine_tuning_wins(monkeypatch):
    results = json.loads((ROOT / "benchmarks/results/transfer.json").read_text())["results"]
    assert between(TRAINING, "transfer.json") == benchmark("transfer", monkeypatch).table(results)
    tuned, scratch = (results[way]["top1"] for way in ("fine-tuned", "from scratch"))
    assert all(one > other for one, other in zip(tuned, scratch, strict=True))


def test_the_imagenet_tables_are_the_results_and_the_arithmetic(monkeypatch):
    runs = json.loads((ROOT / "benchmarks/results/imagenet.json").read_text())["runs"]
    imagenet = benchmark("imagenet", monkeypatch)
    assert between(TRAINING, "imagenet.json") == imagenet.table(runs)
    assert between(TRAINING, "imagenet.cost") == imagenet.cost()
    assert all(run["steps"] == 20 and 0 < run["resumed_after_epochs"] < imagenet.EPOCHS for run in runs.values())


def test_the_table_of_weights_is_what_ships(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    assert between(MODELS, "weights") == between(README, "weights") == importlib.import_module("ship").table()


def test_the_page_about_explaining_shows_the_weights_that_ship(tmp_path):
    told = between((ROOT / "docs/explain.md").read_text(encoding="utf-8"), "explain").splitlines()
    found = explain(ROOT / "docs/images/palace.jpg", DEFAULT, token=(5, 8), blocks=(0, 3), out=tmp_path / "out")
    guesses = re.findall(r"([\w ]+) ([\d.]+) %", told[1].partition(":")[2])
    assert [label.strip() for label, _ in guesses] == [guess.label for guess in found.top]
    assert [float(percent) for _, percent in guesses] == pytest.approx(
        [100 * g.probability for g in found.top], abs=0.5
    )
    assert f"The model says {found.top[0].label}," in (ROOT / "docs/explain.md").read_text(encoding="utf-8")
    rows = [line.split() for line in told if re.match(r" +\d+ +\d+x\d+ ", line)]
    assert [(int(row[0]), row[1]) for row in rows] == [(block["block"], block["grid"]) for block in found.blocks]
    keys = ("entropy_row", "entropy_column", "weight_column", "weight_row", "weight_channel")
    for place, key in enumerate(keys, 2):
        assert [float(row[place]) for row in rows] == pytest.approx([block[key] for block in found.blocks], abs=0.02)

    ranks = re.search(r"gradient ([\d.]+), ([\d.]+) with even weights", "\n".join(told)).groups()
    expected = [found.receptive[f"{kind}_correlation"] for kind in ("rank", "even")]
    assert [float(rank) for rank in ranks] == pytest.approx(expected, abs=0.02)
    dynamic = [
        (round(100 * float(row[place])), axis, row[0]) for row in rows for place, axis in ((7, "row"), (8, "column"))
    ]
    (least, axis, block), (most, *_) = min(dynamic), max(dynamic)
    for page in ("explain", "operator"):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        assert f"between {least} and {most} percent" in text
        assert f"least in the {axis}s of block {block}." in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\")([^)#\"]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_figures_in_the_text_are_the_codes():
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    for page, words in (
        ("start", f"top-1 {demo['test_top1']:.2f} %"),
        ("start", "about four minutes"),
        ("predict", f"at most {PART} pictures (or one batch)"),
        ("serve", f"At most {Settings.connections} connections"),
    ):
        assert words in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    assert 210 <= demo["train_seconds"] < 270


def test_every_public_name_has_its_meaning_written():
    for name in dynamixer.__all__:
        thing = getattr(dynamixer, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(value) and not member.startswith("_"):
                    assert value.__doc__, f"{name}.{member}"


def test_the_citation_is_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2201.12083"


def test_the_tables_of_speed_are_the_results(monkeypatch):
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert {mark: between(page, mark) for mark in ("speed", "parts", "goals")} == benchmark(
        "speed", monkeypatch
    ).parts()


def test_the_sentences_about_speed_say_what_its_tables_do():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:5] for line in between(page, "goals").splitlines()[2:]]
    aim, s, nano = ([float((re.findall(r"[\d.]+", row[place]) or [0])[0]) for row in rows] for place in range(3))
    inference, training = json.loads((ROOT / "benchmarks/results/parts-s.json").read_text())["profiles"]

    def part(profile, name):
        return next(one for one in profile["parts"] if one["operation"].removeprefix("dynamixer::") == name)

    def share(profile, *names):
        return 100 * sum(part(profile, name)["share"] for name in names)

    def rate(profile, name):
        return part(profile, name)["gflop_per_s"] / profile["bound_gflop_per_s"]

    said = {
        "about two fifths of the memory for the backward pass": [(s[15], 0.35, 0.45), (nano[15], 0.35, 0.45)],
        "S it is a third quicker than bf16": [(s[7], 1.28, 1.38)],
        "at nano it gains nothing": [(nano[7], 0.9, 1.03)],
        "1.8x would be three quarters of the bound": [(1.8 / s[10], 0.7, 0.8)],
        "it would be 1.6 to 1.7x": [(s[9] * s[13] / s[12], 1.6, 1.7)],
        "at three quarters of the rate that products reach alone": [(rate(training, "tail_grads"), 0.7, 0.8)],
        "gradients takes a tenth": [(share(training, "mix", "mix_grads"), 9, 12)],
        "another tenth is outside the kernels": [(share(training, "pack", "everything else"), 9, 12)],
        "at more than four fifths of the rate": [(rate(inference, "tail"), 0.8, 1)],
        "a quarter of the time is outside it": [(100 - share(inference, "tail"), 22, 28)],
        "the timed one would just come to the 85 %": [(s[2] * s[4] / s[3], 83, 87)],
        "where products are less than half of the time": [(nano[3], 0, 50)],
        "leaves a hundredth of the time for the softmax": [(100 * (s[18] - aim[17]), 0.5, 1.5)],
        "at nano it is by itself more than is aimed at": [(aim[17] - nano[18], 0, 1)],
    }
    for sentence, figures in said.items():
        assert sentence in " ".join(page.split())
        assert all(least <= figure <= most for figure, least, most in figures), (sentence, figures)


def test_the_table_of_compiled_layouts_is_its_results(monkeypatch):
    found = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())
    page = (ROOT / "docs/adr/0007-speed.md").read_text(encoding="utf-8")
    assert between(page, "compiled") == benchmark("compiled", monkeypatch).part(found)


def test_the_table_of_precisions_is_its_results_and_keeps_the_promises(monkeypatch):
    found = json.loads((ROOT / "benchmarks/results/precision.json").read_text())
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert between(page, "precision") == benchmark("precision", monkeypatch).part(found)
    model, _, bf16, int8 = found["rows"]
    assert bf16["agreement"] >= 99.5
    assert model["accuracy"] - int8["accuracy"] <= 0.5
