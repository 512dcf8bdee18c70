"""What is left to do of the study: its runs, where their pictures are, and what of them is still missing."""

import csv
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamixer.data.loading import digest_of
from dynamixer.data.sources import open_data
from dynamixer.errors import UserError
from dynamixer.study.measure import check_corrupted, parts_of
from dynamixer.study.results import Results
from dynamixer.study.rows import Run, config_of, protocol, runs
from dynamixer.training.config import TrainConfig
from dynamixer.training.setup import prepare_data


@dataclass(frozen=True)
class Place:
    """Where pictures and run folders are."""

    work: Path
    train: dict[str, str]  # training pictures by dataset
    test: dict[str, str]
    corrupted: Path | None = None


@dataclass
class Job:
    """A run that is not done: trained first, unless only some measuring is left, then measured."""

    run: Run
    config: TrainConfig
    parts: list[str]
    folder: Path
    epoch: int  # pictures in one
    process: subprocess.Popen[bytes] | None = None
    training: bool = True
    done: int = 0  # epochs

    @property
    def weights(self) -> Path:
        """Of the last epoch."""
        return self.folder / "last.safetensors"

    @property
    def measured(self) -> Path:
        """What the measuring process found; it goes when the folder goes."""
        return self.folder / "measured.json"

    def beside(self, suffix: str) -> Path:
        """A file of the queue's about the run."""
        return self.folder.with_name(f"{self.folder.name}{suffix}")

    def epochs(self) -> list[dict[str, str]]:
        """What metrics.csv says so far."""
        return rows_of(self.folder / "metrics.csv")


def place_of(folders: dict[str, str | None], work: Path, corrupted: Path | None) -> Place:
    """Find training and test pictures of each dataset, and open both once.

    A folder's train.parquet is trained on, with pictures held out of it; its test.parquet, or else val.parquet, is the test. So
    are its folders train and val, of class folders, where there are no other test pictures.

    Raises:
        UserError: something is not there.
    """
    train, test = {}, {}
    for dataset, data in folders.items():
        if data is None:
            continue
        root = Path(data).resolve()
        train[dataset] = str(root / "train.parquet") if (root / "train.parquet").is_file() else _spelled(data)
        found = [root / name for name in ("test.parquet", "val.parquet") if (root / name).is_file()]
        test[dataset] = str(found[0]) if found else _spelled(data)
        split, _ = open_data(test[dataset]).for_evaluation()
        if (
            not found and split != "test"
        ):  # what is called val would be held out, and all pictures are the training ones
            train[dataset], test[dataset] = str(root / "train"), str(root / "val")
            if not (root / "train").is_dir() or not (root / "val").is_dir():
                raise UserError(
                    f"{data} has no test pictures: a folder with train.parquet and test.parquet, or with train and val, is "
                    "expected."
                )
            open_data(test[dataset])
    if corrupted is not None:
        check_corrupted(corrupted)
    return Place(work.resolve(), train, test, corrupted.resolve() if corrupted else None)


def _spelled(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data


def jobs_left(
    place: Place, results: Results, wanted: Sequence[Run], changes: dict[str, Any]
) -> tuple[list[Job], list[str]]:
    """What is left of these runs, in their order, and those whose weights are gone before all was measured.

    Args:
        place: where pictures and run folders are; runs on other datasets are left out.
        results: what is known already.
        wanted: the runs.
        changes: keys over the study's own, for all runs.

    Raises:
        UserError: the results are of another protocol, or a configuration cannot work.
    """
    results.check({run: protocol(run, config_of(run, "", changes)) for run in runs()})
    jobs, lost = [], []
    counted: dict[str, int] = {}
    for run in wanted:
        parts = [part for part in parts_of(run, corrupted=place.corrupted is not None) if not results.has(run, part)]
        if not parts or run.dataset not in place.train:
            continue
        config = config_of(run, place.train[run.dataset], changes)
        if run.dataset not in counted:
            data = prepare_data(replace(config, limit_train=None))
            results.check_data(run.dataset, data.fingerprint())
            _, test = open_data(place.test[run.dataset]).for_evaluation()
            results.check_data(f"{run.dataset}, test", digest_of((test, np.arange(len(test)))))
            if run.dataset == "cifar10" and place.corrupted is not None:
                results.check_data("cifar10, corrupted", _digest(place.corrupted))
            counted[run.dataset] = len(data.train_indices)
        epoch = min(config.limit_train or counted[run.dataset], counted[run.dataset])
        job = Job(run, config, parts, place.work / str(run), epoch, training="runs" in parts)
        if job.training or job.weights.is_file():
            jobs.append(job)
        else:
            lost.append(str(run))
    return jobs, lost


def _digest(folder: Path) -> str:
    """A hash of the Parquet files in a folder, names and bytes."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
