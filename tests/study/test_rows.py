"""The rows are what the issue and the paper say, and fit the models."""

import dataclasses

import pytest
import timm

import dynamixer
from dynamixer import RECIPES
from dynamixer.models.peers import PEERS as PEER_MODELS
from dynamixer.study import rows
from dynamixer.study.measure import parts_of
from dynamixer.study.rows import MAIN, PEERS, ROWS, TABLES, Run, config_of, protocol, runs
from dynamixer.training.recipes import ABLATIONS
from dynamixer.training.setup import build_network

# The paper's tables, as tests/training/test_recipes.py has their options: top-1 of the row and of what it is compared with.
PAPER = {
    ("static", 1): 81.5, ("static_plain", 1): 81.5, ("dense", 1): 81.4,
    ("segments_1", 2): 82.2, ("segments_2", 2): 82.4, ("dynamic", 2): 82.5, ("segments_8", 2): 82.7,
    ("reduced_1", 3): 82.4, ("reduced_4", 3): 82.6, ("reduced_8", 3): 82.7,
    ("no_row", 4): 79.4, ("no_column", 4): 79.2, ("no_channel", 4): 82.1, ("no_reweighting", 4): 81.9, ("shared", 4): 82.2,
}  # fmt: skip


def test_the_papers_figures_are_these():
    for (row, number), top1 in PAPER.items():
        assert TABLES[number].rows[row] == top1
    assert all(TABLES[number].rows["dynamic"] == 82.7 for number in (1, 3, 4, 5))


@pytest.mark.parametrize("row", ["static", "dense", "reduced_1", "reduced_4", "reduced_8", "no_row", "shared"])
def test_a_row_is_the_papers_ablation(row):
    assert ROWS[row].model == ABLATIONS[row]


def test_every_row_is_in_a_table_and_in_the_queue_with_its_seeds():
    assert {row for table in TABLES.values() for row in table.rows} == set(ROWS)
    every = runs()
    assert len(set(every)) == len(every)
    for row in ROWS:
        assert [run.seed for run in every if (run.dataset, run.row, run.share) == ("cifar10", row, 100)] == [
            *range(5 if row in MAIN else 3)
        ]
    assert {run for number in range(1, 7) for run in runs(number)} == set(every)
    shown = {run for run in every if {"sizes", "depth", "matrices", "corrupted"} & {*parts_of(run, corrupted=True)}}
    assert shown < {*runs(6)}


def test_the_queue_is_the_main_comparison_then_seed_by_seed():
    every = runs()
    assert {run.row for run in every[:20]} == set(MAIN)
    assert [run.seed for run in every[:20]] == sorted(run.seed for run in every[:20])
    assert [run.seed for run in every[20:]] == sorted(run.seed for run in every[20:])
    assert {run.row for run in every[20:] if run.seed == 0} >= set(ROWS) - set(MAIN)


def test_less_data_takes_the_same_steps():
    whole, part = (config_of(Run("cifar10", "static", 1, share), "x") for share in (100, 10))
    assert (part.limit_train, part.epochs * part.limit_train) == (4_500, whole.epochs * 45_000)
    assert part.warmup_epochs * part.limit_train == whole.warmup_epochs * 45_000
    assert (part.seed, part.model_args) == (1, {"generator": "static"})


def test_all_rows_have_one_recipe():
    for run in runs():
        config = config_of(run, "x")
        base = RECIPES[rows.DATASETS[run.dataset].recipe]()
        row = {"model", "model_args", "freeze", "seed", "data", "track"}
        part = {"limit_train", "epochs", "warmup_epochs"} if run.share < 100 else set()
        differing = {name for name, value in config.to_dict().items() if value != base.to_dict()[name]}
        assert differing <= row | part, run


def test_the_protocol_is_of_what_changes_the_result():
    run = Run("cifar10", "static", 0)
    config = config_of(run, "here")
    assert protocol(run, config) == protocol(run, dataclasses.replace(config, data="there", workers=2, device="cpu"))
    for change in ({"lr": 0.1}, {"hflip": 0.0}, {"model_args": {}}, {"seed": 1}, {"freeze": "*"}):
        assert protocol(run, config) != protocol(run, dataclasses.replace(config, **change))


def test_what_the_rows_are_trained_with_is_still_this():
    """A change of it makes every result void: then the study has to be run again."""
    assert [protocol(run, config_of(run, "")) for run in (Run("cifar10", "dynamic", 0), Run("imagenette", "static", 2))] == [
        "89d4477d3b2a", "300e5f917086",
    ]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_can_be_built(row, monkeypatch):
    monkeypatch.setattr(dynamixer.DynaMixer, "init_weights", lambda model: None)
    network = build_network(config_of(Run("cifar10", row, 0), ""), "abcdefghij")
    frozen = {name for name, p in network.model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == row.startswith("frozen")
    assert all(".generate." in name for name in frozen)


def test_peers_have_the_parameters_of_nano_and_its_pictures():
    assert {ROWS[row].changes["model"] for row in PEERS} == set(PEER_MODELS)
    nano = build_network(config_of(Run("cifar10", "dynamic", 0), ""), "abcdefghij")
    own = dynamixer.count(nano.model, 32)
    for row in PEERS:
        network = build_network(config_of(Run("cifar10", row, 0), ""), "abcdefghij")
        found = dynamixer.count(network.model, network.preprocessing.size)
        assert found.parameters == pytest.approx(own.parameters, rel=0.1), row
        assert found.multiply_adds == pytest.approx(own.multiply_adds, rel=0.25), row
        assert network.preprocessing == nano.preprocessing


def test_peers_are_no_models_of_ours():
    assert not set(PEER_MODELS) & set(timm.list_models(module="dynamixer"))
    assert set(PEER_MODELS) <= set(timm.list_models())
