"""The page: what the repository's says is what its results give, and what made-up results give says the right thing."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from dynamixer import UserError
from dynamixer.explain import mixing_matrices
from dynamixer.study import beyond
from dynamixer.study.figures import drawn
from dynamixer.study.measure import KINDS, SEVERITIES, SIZES, parts_of
from dynamixer.study.pages import blocks, contrasts, further, lines_of, ranking, sentence, short, write_page
from dynamixer.study.results import Results
from dynamixer.study.rows import MAIN, ROWS, Run, config_of, protocol, runs
from dynamixer.study.statistics import paired
from dynamixer.study.words import NOTHING

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/evidence.md"


def parts(page):
    return dict(re.findall(r"<!-- study: (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))


def test_the_page_is_its_results():
    results = Results(ROOT / "benchmarks/results/study")
    results.check({run: protocol(run, config_of(run, "")) for run in runs()})
    text, pictures = blocks(results)
    assert parts(PAGE.read_text(encoding="utf-8")) == text
    for name, picture in pictures.items():
        assert drawn(ROOT / "docs/images" / name) == picture.digest, f"{name}: dynamixer reproduce --pages docs"
    assert {path.name for path in (ROOT / "docs/images").glob("evidence-*")} == set(pictures)


def test_what_the_readme_says_is_what_the_results_say():
    told = " ".join(
        (ROOT / "README.md").read_text(encoding="utf-8").partition("## Evidence")[2].partition("##")[0].split()
    )
    results = Results(ROOT / "benchmarks/results/study")

    def gain(row, over, dataset="cifar10"):
        return paired(results.tops(dataset, row), results.tops(dataset, over))

    for dataset, words in (("cifar10", "two epochs of CIFAR-10"), ("imagenette", "four of Imagenette")):
        assert words in told
        assert config_of(Run(dataset, "dynamic", 0), "").epochs == {"two": 2, "four": 4}[words.split()[0]]
        dynamic, plain = gain("dynamic", "static", dataset), gain("dynamic_plain", "static_plain", dataset)
        assert "dynamic matrices beat static ones, with the softmax and without" in told
        assert dynamic.sign == plain.sign == 1
        assert "dropping the softmax gains points too (whether more than being dynamic is not settled)" in told
        assert gain("dynamic_plain", "dynamic", dataset).sign == 1
        gains = [
            {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}
            for a, b in (
                (results.tops(dataset, row), results.tops(dataset, over))
                for row, over in (("dynamic_plain", "dynamic"), ("dynamic", "static"))
            )
        ]
        assert paired(*gains).sign == 0
        assert "static matrices without it beat dynamic ones with it" in told
        assert gain("static_plain", "dynamic", dataset).sign == 1
    assert "on CIFAR-10 MLP-Mixer is ahead of the published form" in told
    assert gain("mixer", "dynamic").sign == 1
    gmlp = gain("gmlp", "dynamic")
    assert ("(gMLP too, one seed)" in told) == (gmlp.seeds == 1)
    assert gmlp.mean > 0
    assert "a reduced width of 4 or 8 is ahead of the 2 that nano has" in told
    assert gain("reduced_4", "dynamic").sign == gain("reduced_8", "dynamic").sign == 1


def made_up(folder, tops, wanted):
    """Results in which a row's accuracy is by its name, or 60, and seeds differ a little."""
    results = Results(folder)
    for run in wanted:
        top = tops.get(run.row, 60.0) + 0.1 * run.seed + (0.03 * (run.seed % 2) if run.row != "dynamic" else 0)
        line = {
            "protocol": protocol(run, config_of(run, "")), "epochs": 3, "parameters": 916_490, "val_top1": top,
            "test_top1": round(top, 2), "test_loss": 1,
            "hours": 0.2, "threads": 1, "cpu": "c", "torch": "2", "commit": "",
        }  # fmt: skip
        found = {
            "runs": [line],
            "epochs": [
                {"epoch": e, "lr": 1, "train_loss": 1, "train_top1": 1, "val_top1": top - 5 / e, "val_loss": 1}
                for e in (1, 5)
            ],
            "sizes": [{"size": size, "top1": top - 5} for size in SIZES],
            "depth": [
                {"block": b, "axis": axis, "dynamic": 0.25 * b, "change": 0.5, "entropy": 0.75}
                for b in (0, 1)
                for axis in ("row", "column")
            ],
            "matrices": [
                {"block": 3, "line": 7, "segment": s, "picture": picture, "weights": "0.25 0.75 1 -0.5"}
                for picture in ("mean", "picture 0")
                for s in (0, 1)
            ],
            "corrupted": [{"kind": kind, "severity": s, "error": 30.0 + 5 * s} for kind in KINDS for s in SEVERITIES],
        }
        results.add(run, {part: found[part] for part in (*parts_of(run, corrupted=True), "epochs")})
    return Results(folder)


def test_nothing_run_is_said(tmp_path):
    text, pictures = blocks(Results(tmp_path))
    assert not pictures
    assert all("Not yet run." in text[str(number)] for number in range(1, 7))
    assert text["state"] == "0 of 128 runs are done; what is missing says so."


def test_a_stop_leaves_tables_that_say_what_is_there(tmp_path):
    results = made_up(tmp_path, {"static": 58.0}, runs()[:22])
    text, pictures = blocks(results)
    assert "; runs done: 22 of 44." in text["1"]
    table = text["1"].replace(NOTHING, "?")
    assert "| dense | ? | not timed | not run | ? | ? | -1.3 | ? |" in table
    assert "| dynamic + static | 916,490 | not timed | 60.00 (1) | +0.00 | ? | ? | ? |" in table
    assert "6 rows not yet run." in text["1"]
    assert text["2"].startswith("CIFAR-10, 32 px, dynamixer_nano; runs done: 5 of 14.")
    assert text["2"].endswith("Nothing to compare yet.")
    assert "Less data\n\nNot yet run." in text["6"]
    assert set(pictures) == {
        *(f"evidence-{number}.png" for number in (1, 5)),
        *(f"evidence-6-{name}.png" for name in ("sizes", "corrupted", "depth")),
    }  # fmt: skip


def test_a_table_says_what_follows_and_whether_the_paper_agrees(tmp_path):
    results = made_up(tmp_path, {"no_row": 55.0, "no_column": 62.0, "no_channel": 60.01}, runs(4))
    by_row = {line.row: line for line in lines_of(4, "cifar10", results)}
    assert by_row["no_row"].verdict == "agrees"
    assert by_row["no_column"].verdict == "disagrees"
    assert by_row["no_channel"].verdict == "not settled"
    assert by_row["dynamic"].verdict == NOTHING
    assert by_row["no_row"].paper == pytest.approx(-3.3)
    text = sentence([*by_row.values()])
    assert text == (
        "Better than whole: without the column branch (+2.01); worse than whole: without the row branch (-4.99). "
        "Against what is published: agrees (without the row branch); disagrees (without the column branch); "
        "not settled (without the channel branch, without reweighting, one operator for rows and columns)."
    )


def test_peers_are_ranked_once_one_was_run_over_the_seeds_that_all_have(tmp_path):
    assert not ranking(made_up(tmp_path / "none", {}, runs(1)))
    tops = {"vit": 50.0, "mixer": 60.05, "static_plain": 61.0}
    results = made_up(tmp_path, tops, [run for run in runs(5) if run.seed == 0 or run.row in MAIN])
    told = ranking(results)
    assert "over the one seed that all have: " in told
    found = [
        told.index(label)
        for label in ("static without softmax", "MLP-Mixer 60.05,", "DynaMixer 60.00,", "ConvNeXt", "ViT")
    ]
    assert found == sorted(found)  # by all its seeds DynaMixer would be ahead of MLP-Mixer
    assert told.endswith("ViT 50.00.")


@pytest.mark.parametrize("row", ["dynamic_plain", "static_plain", "dense_plain"])
def test_untrained_matrices_without_the_softmax_have_the_entropy_that_the_page_says(row):
    torch.manual_seed(0)
    model = timm.create_model("dynamixer_nano", **ROWS[row].model).eval()
    mixings = mixing_matrices(model, torch.randn(4, 3, 32, 32))
    found = [float(mixing.entropy(axis).mean()) for mixing in mixings for axis in ("row", "column")]
    assert sum(found) / len(found) == pytest.approx(0.9, abs=0.03)


def test_further_differences_are_not_corrected_and_weigh_the_softmax(tmp_path):
    results = made_up(tmp_path, {"static": 58.0, "static_plain": 60.0, "dynamic_plain": 64.0, "frozen": 57.0}, runs(1))
    told = further("cifar10", results)
    assert "- dynamic matrices with the softmax against static ones without: -0.01 [" in told
    assert (
        "- a random generator against static matrices, with the softmax: -1.00 [-1.00, -1.00] points over 3 seeds"
        in told
    )
    assert "- what being dynamic gains with the softmax, less what it gains without: -2.01 [" in told
    assert "- what dropping the softmax gains, less what being dynamic gains with it: +2.02 [" in told
    assert not further("cifar10", Results(tmp_path / "none"))


def test_the_main_comparisons_are_corrected(tmp_path):
    results = made_up(tmp_path, {"static": 58.0, "static_plain": 60.0, "dynamic_plain": 63.0}, runs(1))
    assert "| dynamic against static matrices, with the softmax | +1.99 [" in short(results)
    assert ", 5 seeds | +1.99 [" in short(results)
    assert short(results).splitlines()[-2].endswith(f"3 seeds | {NOTHING} |")
    assert short(results).splitlines()[-1].endswith(" | +1.2 |")
    first, second, third = contrasts("cifar10", results).splitlines()[2:]
    assert first.startswith("- dynamic against static matrices, with the softmax: +1.99 [")
    assert first.endswith("p < 0.001, settled; the paper has +1.2, this agrees")
    assert second.endswith("over 5 seeds: p < 0.001, settled")
    assert third.startswith("- without against with the softmax, dynamic matrices: +3.01 [")


def test_what_the_correction_does_not_bear_out_is_not_settled(tmp_path):
    some = [run for run in runs(1) if run.seed < 3 and run.row in ("dynamic", "static")]
    results = made_up(tmp_path, {"static": 59.5}, some)
    for line in results.lines["runs"]:
        line["test_top1"] += (0.15, -0.18, 0.0)[line["seed"]] * (line["row"] == "static")
    assert paired(results.tops("cifar10", "dynamic"), results.tops("cifar10", "static")).sign == 1
    first, second, third = contrasts("cifar10", results).splitlines()[2:]
    assert "points over 3 of 5 seeds: p 0.0" in first
    assert first.endswith("not settled; the paper has +1.2, this leaves it open")
    assert all(line.endswith("not yet run") for line in (second, third))


def test_a_published_difference_of_nothing_is_not_judged(tmp_path):
    lines = lines_of(3, "cifar10", made_up(tmp_path, {"reduced_1": 70.0, "reduced_8": 70.0}, runs(3)))
    found = {line.row: (line.paper, line.difference.sign, line.verdict) for line in lines if line.row != "dynamic"}
    assert (found["reduced_1"], found["reduced_8"]) == ((-0.3, 1, NOTHING), (0.0, 1, NOTHING))


def test_beyond_the_paper(tmp_path):
    text, pictures = beyond.block(made_up(tmp_path, {"static": 58.0}, runs(6) + runs(1)))
    assert "| row | seeds | epoch 1 | epoch 5 |" in text
    assert "| dynamic less static | 3 | +1.99 [" in text
    assert "| dynamic | 39.90 ± 0.10 (3) | 45.00 ± 0.00 (3) |" in text
    assert "| dynamic | 3 | 0.00 | 0.25 | 0.12 | 0.50 | 0.75 |" in text
    assert "| dynamic | 60.20 ± 0.16 (5) | 60.10 ± 0.10 (3) | 60.10 ± 0.10 (3) |" in text
    assert "| dynamic | 55.10 ± 0.10 (3) | 55.10 ± 0.10 (3) | 60.10 ± 0.10 (3) | 55.10" in text
    assert len(pictures) == 8
    assert pictures["evidence-6-matrices.png"].caption.startswith("Matrices of row 7 of the grid in block 3")
    assert "negative are 25 % (dynamic) and 25 % (dynamic without softmax) and" in text


def test_pictures_are_written_once_and_again_when_they_change(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(PAGE, docs)
    results = made_up(tmp_path / "results", {}, [*runs(2)[:6], Run("cifar10", "static", 0)])
    written = write_page(docs, results)
    assert {path.name for path in written} >= {"evidence.md", "evidence-2.png", "evidence-6-sizes.png"}
    for path in written[1:]:
        with Image.open(path) as picture:
            assert picture.size[0] > 600
            assert len(picture.convert("L").getcolors()) > 20  # something is drawn
    assert [path.name for path in write_page(docs, results)] == ["evidence.md"]
    assert "evidence-2.png" in (docs / "evidence.md").read_text()
    more = made_up(tmp_path / "results", {"dynamic": 70.0}, runs(2)[:2])
    assert "evidence-2.png" in {path.name for path in write_page(docs, more)}


def test_results_of_another_protocol_are_not_told_by_this_page(tmp_path):
    results = made_up(tmp_path, {}, runs(2)[:2])
    results.lines["runs"][0]["protocol"] = "another"
    with pytest.raises(UserError, match="holds 1 results of another protocol"):
        write_page(tmp_path, results)


def test_a_page_without_a_place_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*evidence.md: --pages takes the folder of the page"):
        write_page(tmp_path, Results(tmp_path))
    (tmp_path / "evidence.md").write_text(
        "".join(f"<!-- study: {mark} -->\n<!-- end -->\n" for mark in ("state", "plan"))
    )
    with pytest.raises(UserError, match="has no place for the study's part 1"):
        write_page(tmp_path, Results(tmp_path))


def test_differences_of_rows_chosen_by_seed_0_keep_their_sign_on_the_other_seeds():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "on seeds 1 and 2 alone all five differences have the same sign" in page
    results = Results(ROOT / "benchmarks/results/study")
    base = results.tops("cifar10", "dynamic")
    for row in ("segments_8", "reduced_4", "reduced_8", "mixer", "frozen_plain"):
        over = {seed: top - base[seed] for seed, top in results.tops("cifar10", row).items()}
        assert {0, 1, 2} <= over.keys()
        assert len({value > 0 for value in over.values()}) == 1, (row, over)
