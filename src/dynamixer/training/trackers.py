"""Where a run's figures go besides metrics.csv: TensorBoard, Weights & Biases, MLflow, Trackio."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from dynamixer.errors import UserError, did_you_mean, install
from dynamixer.logs import log

PROJECT = "dynamixer"
EXTRAS = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class _Tracker(Protocol):
    def epoch(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run folder, begun at the first epoch: what an earlier run wrote from there on is void."""

    def __init__(self, run: Path, config: Mapping[str, object], identity: str):
        self.folder, self.config = run / "tensorboard", config
        self.writer: Any = None

    def epoch(self, row: Mapping[str, float], step: int) -> None:
        if self.writer is None:
            module = importlib.import_module("torch.utils.tensorboard")
            self.writer = module.SummaryWriter(str(self.folder), purge_step=step)
            self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in self.config.items()), step)
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Wandb:
    def __init__(self, run: Path, config: Mapping[str, object], identity: str):
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=PROJECT, name=run.resolve().name, id=identity, resume="allow", config=dict(config)
        )

    def epoch(self, row: Mapping[str, float], step: int) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """A run is found again by a tag, for MLflow chooses its numbers itself."""

    def __init__(self, run: Path, config: Mapping[str, object], identity: str):
        self.mlflow = importlib.import_module("mlflow")
        experiment = self.mlflow.set_experiment(PROJECT).experiment_id
        tag = f"{PROJECT}.run"
        found = self.mlflow.search_runs(
            experiment_ids=[experiment],
            filter_string=f"tags.`{tag}` = '{identity}'",
            max_results=1,
            output_format="list",
        )
        if found:  # its parameters stand: MLflow refuses to change one
            self.mlflow.start_run(run_id=found[0].info.run_id)
        else:
            self.mlflow.start_run(run_name=run.resolve().name, tags={tag: identity})
            self.mlflow.log_params(dict(config))

    def epoch(self, row: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(row), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class _Trackio:
    """Trackio knows a run by its name alone, so that the name says which of several runs in folders of that name is meant."""

    def __init__(self, run: Path, config: Mapping[str, object], identity: str):
        self.trackio = importlib.import_module("trackio")
        name = f"{run.resolve().name}-{identity[:6]}"
        self.trackio.init(project=PROJECT, name=name, resume="allow", config=dict(config))

    def epoch(self, row: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(row), step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, object], str], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class Trackers:
    """The trackers of a run. One that fails is warned of once and left out: it never stops the training."""

    def __init__(self, names: list[str], run: Path, config: Mapping[str, object], identity: str):
        self.open: dict[str, _Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self.open.update({name: TRACKERS[name](run, config, identity)}))  # type: ignore[misc]

    def epoch(self, row: Mapping[str, object], step: int) -> None:
        """Log the figures of an epoch; what is not a number, such as None, is left out."""
        figures = {
            key: float(value) for key, value in row.items() if not isinstance(value, bool) and isinstance(value, Real)
        }
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.epoch(figures, step))  # type: ignore[misc]

    def close(self) -> None:
        """Finish; a second time does nothing."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close)
        self.open.clear()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            # stdout is for results; W&B leaves it alone, and wraps whatever it finds there to keep a copy.
            with nullcontext() if name == "wandb" else redirect_stdout(sys.stderr):
                act()
        except Exception as error:  # whatever a service raises: the training matters more
            self.open.pop(name, None)
            said = " ".join(str(error).split())
            log(f"warning: {name} failed and is left out from here on: {type(error).__name__}: {said[:300]}")


def check_trackers(names: str) -> list[str]:
    """The trackers that a word such as "auto", "none" or "tensorboard,wandb" stands for.

    Raises:
        UserError: an unknown one, or one that is not installed.
    """
    if names == "none":
        return []
    if names == "auto":
        return ["tensorboard"] if _installed("tensorboard") else []
    words = list(dict.fromkeys(word.strip() for word in names.split(",")))
    for word in words:
        if word not in EXTRAS:
            known = [*EXTRAS, "auto", "none"] if len(words) == 1 else EXTRAS
            raise UserError(f"unknown tracker {word!r}: {did_you_mean(word, known)}")
        if not _installed(word):
            raise UserError(f"{word} is not installed: {install(EXTRAS[word])}")
    return words


def open_trackers(names: str, *, run: Path, config: Mapping[str, object], identity: str) -> Trackers:
    """Begin, or take up again, the logs of a run.

    Args:
        names: "auto" (TensorBoard where it is installed), "none", or some of TRACKERS with commas between.
        run: the run folder; its name is the run's name.
        config: what the run depends on.
        identity: of the run, which decides whether an earlier one is taken up again: a folder's name may come back.

    Raises:
        UserError: an unknown tracker, or one that is not installed.
    """
    return Trackers(check_trackers(names), run, config, identity)


def _installed(name: str) -> bool:
    """Whether a module can be imported; a folder of that name, such as W&B's ./wandb, is not it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
