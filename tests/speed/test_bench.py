"""What `bench` compares and refuses; its figures themselves are no matter of tests."""

import json

import pytest
import torch

from dynamixer.cli import main
from dynamixer.errors import UserError
from dynamixer.models import count
from dynamixer.speed import bench as module
from dynamixer.speed.bench import Plan, TrainingStep, bench, example_model
from dynamixer.speed.ceiling import shapes
from dynamixer.speed.clock import in_turn, ratio
from dynamixer.speed.plain import plain
from dynamixer.speed.report import roofline, scale_table, table
from helpers import error, relative_entropy

QUICK = {"batch": 2, "rounds": 1, "fast": False}


@pytest.fixture(scope="module")
def found():
    return bench(["dynamixer_nano", "resnet18"], Plan(**QUICK, size=32, peers=True))


def test_the_plain_way_is_the_same_model():
    model = example_model("dynamixer_nano")
    pictures, matrices = torch.randn(3, 3, 32, 32), []
    mixer = model.stages[1].blocks[0].mixer
    mixer.register_forward_pre_hook(lambda _, inputs: matrices.append(mixer.row.matrices_for(inputs[0])))
    with torch.no_grad():
        expected = model(pictures)
        assert relative_entropy(matrices[0]) < 0.7
        assert error(plain(model)(pictures), expected) < 1e-4


def test_the_plain_way_is_for_the_papers_block_only():
    for options in ({"softmax": False}, {"generator": "static"}, {"channel": False}, {"reweight": False}):
        with pytest.raises(UserError, match="the paper's block"):
            plain(example_model("dynamixer_nano", **options))


def test_the_plain_way_is_for_whole_patches():
    with pytest.raises(UserError, match="multiples of 4 pixels, not \\(33, 33\\)"):
        plain(example_model("dynamixer_nano", 33))


def test_every_variant_is_timed_against_the_first(found):
    ours, other = found["models"]
    assert list(ours["inference"]) == ["plain", "eager", "kernel"]
    assert list(ours["training"]) == ["plain", "eager", "kernel", "static", "no softmax"]
    assert (other["baseline"], list(other["inference"])) == ("eager", ["eager"])
    assert ours["inference"]["plain"]["times_baseline"] == 1.0
    assert ours["training"]["kernel"]["kept_mib"] < 0.9 * ours["training"]["plain"]["kept_mib"]
    assert 0 < ours["training"]["kernel"]["peak_mib"] < 0.9 * ours["training"]["plain"]["peak_mib"]
    assert {"peak_mib"} < ours["inference"]["kernel"].keys() & ours["latency"]["eager"].keys()
    assert 0 < ours["training_ceiling"]["images_per_s"] < ours["ceiling"]["images_per_s"]
    assert ours["multiply_adds"] == count(example_model("dynamixer_nano")).multiply_adds


def test_a_model_that_the_plain_way_cannot_be_is_timed_against_itself(capsys):
    found = bench(["dynamixer_nano_plus"], Plan(batch=1, rounds=1, size=16, train=False, fast=False))["models"][0]
    assert found["inference"]["eager"]["times_baseline"] == 1
    assert "kernel" in found["inference"]
    assert "without plain, the plain way is written for the paper's block" in capsys.readouterr().err


def test_a_place_for_the_figures_is_looked_at_first(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "cannot be written: --out names a file" in capsys.readouterr().err


def test_the_ceiling_counts_the_products_of_the_model():
    model = example_model("dynamixer_nano")
    products = shapes(model, torch.randn(2, 3, 32, 32))
    assert products[2 * 256, 64, 192] == 2  # fc1 of the first stage's two layers
    assert products[2 * 256, 3 * 2 * 2, 64] == 1  # the stem
    linear = sum(m * k * n * count for (m, k, n), count in products.items())
    assert products[2 * 256, 64, 64] == 2 * 4  # row, column, channel and the block's, in two layers
    assert products[2 * 16 * 4, 32, 256] == 2 * 2  # the generators
    assert 0.9 < linear / (2 * count(model).multiply_adds) < 1  # the rest mixes


@pytest.mark.parametrize("name", ["dynamixer_nano", "resnet18"])
def test_the_ceiling_of_a_step_counts_the_products_of_both_passes(name):
    model = example_model(name, 32)

    def work(products):
        return sum(m * k * n * count for (m, k, n), count in products.items())

    pictures = torch.randn(2, 3, 32, 32)
    forward, both = shapes(model, pictures), shapes(model, pictures, backward=True)
    first = next(iter(forward))  # the pictures of the first layer need no gradient
    assert work(both) == 3 * work(forward) - work({first: 1})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_give_the_models_answers_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(module, "use_kernel", lambda model: example_model("dynamixer_nano", softmax=False))
    measured = bench(["dynamixer_nano"], Plan(**QUICK))["models"][0]
    assert list(measured["inference"]) == list(measured["training"]) == ["plain", "eager"]
    assert "its logits differ by" in measured["refused"]["kernel"]
    assert "kernel is not timed" in capsys.readouterr().err


def test_int8_is_not_timed_either_if_its_answers_are_another_models(monkeypatch):
    def ways(model, *_):
        return {"fast, int8": torch.inference_mode()(lambda pictures: -model(pictures))}

    monkeypatch.setattr(module, "_ways", ways)
    measured = bench(["dynamixer_nano"], Plan(**QUICK | {"fast": True, "train": False}))["models"][0]
    assert list(measured["refused"]) == ["fast, int8"]


def test_variants_take_turns_and_the_first_round_does_not_count():
    order = []
    taken = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {key: len(seconds) for key, seconds in taken.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == (2.5, 3.0, 3.5)


def test_a_training_step_changes_the_weights():
    step = TrainingStep(example_model("dynamixer_nano"), torch.randn(2, 3, 32, 32), module.autocast_of("fp32"))
    before = [p.clone() for p in step.model.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_the_table_names_all_that_was_measured(found, tmp_path):
    text = table(found)
    for word in ("dynamixer_nano", "resnet18", "kernel", "no softmax", "matrix products alone", "MiB"):
        assert word in text
    roofline(found, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"
    row = {"model": "m", "size": 32, "batch": 2, "images_per_s": 5.0, "multiply_adds": 10**9}
    assert "| m | 32 | 2 | 5.00 | 2.00 | 10 |" in scale_table({"rows": [row]})


def test_on_the_command_line_there_is_one_object_and_a_file(capsys, tmp_path):
    words = ["bench", "dynamixer_nano", "--batch", "2", "--rounds", "1", "--no-fast", "--no-train", "--json"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(tmp_path / "found.json")])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "found.json").read_text())
    with pytest.raises(SystemExit) as end:
        main(["bench", "no_such_model"])
    assert end.value.code == 2


def test_without_a_fast_way_the_rest_is_timed(monkeypatch):
    def refuse(*_, **__):
        raise UserError("there is none here.")

    monkeypatch.setattr(module, "optimize", refuse)
    measured = bench(["dynamixer_nano"], Plan(**QUICK | {"fast": True}, train=False))["models"][0]
    assert list(measured["inference"]) == ["plain", "eager", "kernel"]
    assert measured["refused"] == {"fast": "there is none here."}
    assert measured["start"] == {}


def test_what_a_model_cannot_do_is_a_sentence():
    with pytest.raises(UserError, match="vit_tiny_patch16_224 does not take pictures of 336x336"):
        module.scale(["vit_tiny_patch16_224"], Plan(batch=1))
    with pytest.raises(UserError, match=r"cannot be trained with 1 pictures of 32x32 px: .*\(--no-train\)"):
        bench(["test_resnet"], Plan(size=32, batch=1, fast=False))
