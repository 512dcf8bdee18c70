"""What is compared: the rows, the runs that they take, in the order of the queue, and the tables (docs/evidence.md)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dynamixer.errors import UserError
from dynamixer.training.config import TrainConfig
from dynamixer.training.recipes import RECIPES

PAPER = 82.7  # DynaMixer-S on ImageNet-1K, top-1 in percent: the paper's figure for the first row of every table


@dataclass(frozen=True)
class Row:
    """A model that is compared: a change of the recipe."""

    label: str
    model: dict[str, Any] = field(default_factory=dict)  # options
    changes: dict[str, Any] = field(default_factory=dict)  # of other keys


def _mixing(label: str, plain: bool, **options: Any) -> Row:
    """With or without the softmax."""
    return Row(f"{label} without softmax" if plain else label, options | ({"softmax": False} if plain else {}))


def _peer(label: str, model: str) -> Row:
    return Row(label, changes={"model": model})


FROZEN = {"freeze": "*.generate.*"}
ROWS: dict[str, Row] = {
    "dynamic": _mixing("dynamic", False),
    "dynamic_plain": _mixing("dynamic", True),
    "static": _mixing("static", False, generator="static"),
    "static_plain": _mixing("static", True, generator="static"),
    "added": _mixing("dynamic + static", False, static=True),
    "added_plain": _mixing("dynamic + static", True, static=True),
    "dense": _mixing("dense", False, generator="dense"),
    "dense_plain": _mixing("dense", True, generator="dense"),
    "dense_added": _mixing("dense + static", False, generator="dense", static=True),
    "dense_added_plain": _mixing("dense + static", True, generator="dense", static=True),
    "frozen": Row("random generator", changes=FROZEN),
    "frozen_plain": Row("random generator without softmax", {"softmax": False}, FROZEN),
    "segments_1": Row("1 segment", {"segments": 1}),
    "segments_2": Row("2 segments", {"segments": [2, 4, 4]}),
    "segments_8": Row("8 segments", {"segments": [8, 16, 16]}),
    "reduced_1": Row("d = 1", {"reduced": 1}),
    "reduced_4": Row("d = 4", {"reduced": 4}),
    "reduced_8": Row("d = 8", {"reduced": 8}),
    "no_row": Row("without the row branch", {"row": False}),
    "no_column": Row("without the column branch", {"column": False}),
    "no_channel": Row("without the channel branch", {"channel": False}),
    "no_reweighting": Row("without reweighting", {"reweight": False}),
    "shared": Row("one operator for rows and columns", {"shared": True}),
    "mixer": _peer("MLP-Mixer", "peer_mixer"),
    "resmlp": _peer("ResMLP", "peer_resmlp"),
    "gmlp": _peer("gMLP", "peer_gmlp"),
    "convnext": _peer("ConvNeXt", "peer_convnext"),
    "vit": _peer("ViT", "peer_vit"),
}
BASE = "dynamic"
MAIN = ("dynamic", "dynamic_plain", "static", "static_plain")
PEERS = ("mixer", "resmlp", "gmlp", "convnext", "vit")
SCARCE = ("dynamic", "dynamic_plain", "static", "convnext")  # the rows that are trained with less data too
MAIN_SEEDS, SEEDS = 5, 3


@dataclass(frozen=True)
class Dataset:
    """Where rows are trained."""

    title: str
    recipe: str
    pictures: int  # to train on, without the held-out ones
    rate: float  # images/s of a dynamic row, one thread, two runs side by side: roughly, for the plan


DATASETS = {
    "cifar10": Dataset("CIFAR-10, 32 px, dynamixer_nano", "study_cifar10", 45_000, 220.0),
    "imagenette": Dataset("Imagenette, 112 px, dynamixer_tiny", "study_imagenette", 8_522, 55.0),
}


@dataclass(frozen=True, order=True)
class Run:
    """One training run; `share` is that of the training pictures, in percent."""

    dataset: str
    row: str
    seed: int
    share: int = 100

    def __str__(self) -> str:
        part = "" if self.share == 100 else f"-{self.share}pct"
        return f"{self.dataset}-{self.row}{part}-seed{self.seed}"


@dataclass(frozen=True)
class Table:
    """A table of the paper: its rows, with what the paper calls them here, and its top-1 in percent."""

    title: str
    rows: dict[str, float | None]
    labels: dict[str, str] = field(default_factory=dict)


def _with_base(**papers: float | None) -> dict[str, float | None]:
    return {BASE: PAPER, **papers}


TABLES = {
    1: Table(
        "How matrices are made",
        _with_base(
            dynamic_plain=None,
            static=81.5,
            static_plain=81.5,  # the paper has one static row, and does not say whether it had the softmax
            added=None,
            added_plain=None,
            dense=81.4,
            dense_plain=None,
            dense_added=None,
            dense_added_plain=None,
            frozen=None,
            frozen_plain=None,
        ),
    ),
    2: Table(
        "Segments in the first stage",
        {"segments_1": 82.2, "segments_2": 82.4, "dynamic": 82.5, "segments_8": 82.7},
        {"dynamic": "4 segments"},
    ),
    3: Table(
        "Reduced width",
        {"reduced_1": 82.4, "dynamic": PAPER, "reduced_4": 82.6, "reduced_8": 82.7},
        {"dynamic": "d = 2"},
    ),
    4: Table(
        "The block",
        _with_base(no_row=79.4, no_column=79.2, no_channel=82.1, no_reweighting=81.9, shared=82.2),
        {"dynamic": "whole"},
    ),
    5: Table(
        "Peers",
        _with_base(dynamic_plain=None, static_plain=81.5, mixer=76.4, resmlp=79.4, gmlp=79.6, convnext=82.1, vit=None),
        {
            "dynamic": "DynaMixer",
            "dynamic_plain": "DynaMixer without softmax",
            "static_plain": "static without softmax (ViP-like)",
        },
    ),
}
BEYOND = 6  # the number of the table that the paper does not have


def runs(table: int | None = None) -> list[Run]:
    """What has to be trained, in the order of the queue, for one table or for all."""
    main = [Run("cifar10", row, seed) for seed in range(MAIN_SEEDS) for row in MAIN]
    rest = [
        run
        for seed in range(SEEDS)
        for run in (
            *(Run("cifar10", row, seed) for row in ROWS if row not in MAIN),
            *(Run("imagenette", row, seed) for row in MAIN),
            *(Run("cifar10", row, seed, share) for share in (30, 10) for row in SCARCE),
        )
    ]
    return [run for run in main + rest if table is None or _belongs(run, table)]


def _belongs(run: Run, table: int) -> bool:
    if table == BEYOND:
        return run.share < 100 or run.row in (*TABLES[1].rows, *PEERS)
    return run.share == 100 and run.row in TABLES[table].rows and (run.dataset == "cifar10" or table == 1)


def config_of(run: Run, data: str, changes: dict[str, Any] | None = None) -> TrainConfig:
    """The configuration of a run.

    Args:
        run: which.
        data: where its training pictures are.
        changes: keys over the study's own, for all runs alike.

    Raises:
        UserError: an unknown key, or a value that cannot work.
    """
    row, dataset = ROWS[run.row], DATASETS[run.dataset]
    for key in ("data", "seed", "track"):
        if changes and key in changes:
            raise UserError(f"{key} cannot be set for all runs: the study sets it for each.")
    config = RECIPES[dataset.recipe]().with_values(changes or {})
    config = config.with_values(
        {"data": data, "seed": run.seed, "track": "none", **row.changes, "model_args": row.model}
    )
    if run.share == 100:
        return config
    longer = 100 / run.share  # about the same number of steps
    return dataclasses.replace(
        config,
        limit_train=round((config.limit_train or dataset.pictures) / longer),
        epochs=round(config.epochs * longer),
        warmup_epochs=round(config.warmup_epochs * longer, 2),
    )


def protocol(run: Run, config: TrainConfig) -> str:
    """A digest of all that the result of a run depends on and a configuration says, wherever the data lies.

    What is off (none, 0, false, empty) is not in it, so that it stays the same when the engine learns something new.
    """
    free = {"data"} | {item.name for item in dataclasses.fields(config) if item.metadata["free"]}
    values = {key: value for key, value in config.to_dict().items() if value and key not in free}
    return hashlib.sha256(json.dumps([str(run), values], sort_keys=True).encode()).hexdigest()[:12]


def pictures_of(every: Iterable[Run]) -> dict[str, tuple[int, int, set[int]]]:
    """Runs, training pictures over all epochs, and the numbers of epochs, by dataset; "DATASET, part" for less data."""
    found: dict[str, tuple[int, int, set[int]]] = {}
    for run in every:
        config = config_of(run, "")
        part = run.dataset if run.share == 100 else f"{run.dataset}, part"
        count, pictures, epochs = found.get(part, (0, 0, set()))
        seen = config.epochs * (config.limit_train or DATASETS[run.dataset].pictures)
        found[part] = (count + 1, pictures + seen, epochs | {config.epochs})
    return found
