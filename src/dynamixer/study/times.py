"""How long a training step of each row takes, in turn with the first row's."""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from dynamixer.logs import log
from dynamixer.models.count import count
from dynamixer.precision import bf16_products
from dynamixer.progress import progress
from dynamixer.speed.bench import autocast_of
from dynamixer.speed.clock import in_turn, ratio
from dynamixer.speed.kernel import kernel_if_any
from dynamixer.speed.step import TrainingStep
from dynamixer.study.results import Line
from dynamixer.study.rows import BASE, DATASETS, MAIN, ROWS, Run, config_of
from dynamixer.training.environment import environment
from dynamixer.training.setup import build_network

CLASSES = "0123456789"
ROUNDS = 9


def step_times(dataset: str, *, threads: int, rounds: int = ROUNDS, batch: int | None = None) -> list[Line]:
    """Parameters, multiply-adds and the seconds of a training step of every row that is trained on a dataset.

    Args:
        dataset: a key of `DATASETS`; of Imagenette only the main rows are trained.
        threads: as many as a run has.
        rounds: steps of each row, one of each in turn.
        batch: pictures in a step, if not the recipe's.

    Returns:
        Lines of times.csv: the median of a step, and quartiles of the ratio to the first row's step of the same round.
    """
    torch.set_num_threads(threads)
    steps: dict[str, Callable[[], None]] = {}
    sizes = {}
    for row in ROWS if dataset == "cifar10" else MAIN:
        config = config_of(Run(dataset, row, 0), "")
        batch = batch or config.batch_size
        network = build_network(config, CLASSES)
        sizes[row] = count(network.model, network.preprocessing.size)
        pictures = torch.randn(batch, 3, *network.preprocessing.size, generator=torch.Generator().manual_seed(0))
        products = partial(bf16_products, pictures.device, config.precision)
        steps[row] = TrainingStep(kernel_if_any(network.model), pictures, autocast_of(config.precision), products)
    log(f"{DATASETS[dataset].title}: {rounds} rounds of {len(steps)} rows, {batch} pictures a step")
    with progress("timing", (rounds + 1) * len(steps), unit="calls") as meter:
        taken = in_turn(steps, rounds=rounds, advance=lambda: meter.advance(1))
    about = environment(torch.device("cpu"), 1)
    lines = []
    for row, seconds in taken.items():
        low, middle, high = (round(value, 3) for value in ratio(seconds, taken[BASE]))
        lines.append(
            {
                "dataset": dataset,
                "row": row,
                **sizes[row]._asdict(),
                "milliseconds": round(1e3 * statistics.median(seconds), 1),
                "ratio": middle,
                "low": low,
                "high": high,
                "rounds": rounds,
                "batch": batch,
                **{key: about[key] or "" for key in ("cpu", "threads", "torch", "commit")},
            }
        )
    return lines
