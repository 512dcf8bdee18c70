"""The results of the study: small CSV files in one folder, a line for each finished run in runs.csv."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamixer.errors import RunError, UserError
from dynamixer.files import reason, write_text
from dynamixer.lock import locked
from dynamixer.study.rows import ROWS, Run

PATIENCE = 60.0  # seconds, for another process to have written its results
KEY = ("dataset", "row", "seed", "share")
COLUMNS = {
    "runs": (
        "protocol", "epochs", "parameters", "val_top1", "test_top1", "test_loss", "hours", "threads", "cpu", "torch", "commit",
    ),
    "epochs": ("epoch", "lr", "train_loss", "train_top1", "val_top1", "val_loss"),
    "sizes": ("size", "top1"),
    "depth": ("block", "axis", "dynamic", "change", "entropy"),
    "matrices": ("block", "line", "segment", "picture", "weights"),
    "corrupted": ("kind", "severity", "error"),
}  # fmt: skip
TIMES = (
    "dataset", "row", "parameters", "multiply_adds", "milliseconds", "ratio", "low", "high", "rounds", "batch", "threads",
    "cpu", "torch", "commit",
)  # fmt: skip
WORDS = {"dataset", "row", "protocol", "cpu", "torch", "commit", "axis", "kind", "picture", "weights"}

Line = dict[str, Any]


class Results:
    """What is known of finished runs. Every file is replaced whole, and several processes may add to it.

    Args:
        folder: where the files are; it need not exist yet.

    Raises:
        UserError: a file is not one of the study's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read()

    def _read(self) -> None:
        folder = self.folder
        self.lines = {name: _read(folder / f"{name}.csv", KEY + columns) for name, columns in COLUMNS.items()}
        self.times = _read(folder / "times.csv", TIMES)

    def check(self, protocols: Mapping[Run, str]) -> None:
        """Refuse lines of another protocol.

        Raises:
            UserError: how many there are, and what to do.
        """
        other = [line for line in self.lines["runs"] if protocols.get(_run(line)) != line["protocol"]]
        if other:
            raise UserError(
                f"{self.folder} holds {len(other)} results of another protocol, such as {_run(other[0])}: give the "
                "KEY=VALUE words that they were made with, or another --results."
            )

    def has(self, run: Run, part: str) -> bool:
        """Whether a part (a name of COLUMNS) of a run is there."""
        return any(_run(line) == run for line in self.lines[part])

    def add(self, run: Run, found: Mapping[str, Iterable[Line]]) -> None:
        """Take in the parts of a run, in place of what was there of them; the line in runs.csv comes last."""
        with self._anew():
            for name in sorted(found, key=lambda name: name == "runs"):
                key = dict(zip(KEY, (run.dataset, run.row, run.seed, run.share), strict=True))
                new = [key | {column: line[column] for column in COLUMNS[name]} for line in found[name]]
                kept = [line for line in self.lines[name] if _run(line) != run]
                self.lines[name] = sorted(kept + new, key=_run)
                _write(self.folder / f"{name}.csv", KEY + COLUMNS[name], self.lines[name])

    def check_data(self, dataset: str, fingerprint: str) -> None:
        """Note of which pictures these results are, the first time, and refuse others later.

        Raises:
            UserError: they are of others.
        """
        path = self.folder / "data.json"
        with self._anew():
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if known.setdefault(dataset, fingerprint) != fingerprint:
                raise UserError(
                    f"{self.folder} holds results of other pictures of {dataset}, or of the same in another order or under other "
                    "names: give another --results."
                )
            write_text(path, json.dumps(known, indent=1) + "\n")

    def add_times(self, lines: Iterable[Line]) -> None:
        """Take in step times, in place of those of the same datasets."""
        new = list(lines)
        named = {line["dataset"] for line in new}
        with self._anew():
            self.times = [line for line in self.times if line["dataset"] not in named] + new
            _write(self.folder / "times.csv", TIMES, self.times)

    @contextmanager
    def _anew(self) -> Iterator[None]:
        """Hold the folder for this process alone, and know what others have added to it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"{self.folder} could not be made: {reason(error)}.") from None
        try:
            if not locked(held, PATIENCE):
                raise RunError(f"{self.folder} is held by another process, which does not let go of it.")
            self._read()
            yield
        finally:
            os.close(held)

    def of(self, part: str, dataset: str, row: str, share: int = 100) -> list[Line]:
        """The lines of a part for all seeds of a row, by finished runs only."""
        finished = {_run(line) for line in self.lines["runs"]}
        wanted = (dataset, row, share)
        lines = self.lines[part]
        return [v for v in lines if (v["dataset"], v["row"], v["share"]) == wanted and _run(v) in finished]

    def tops(self, dataset: str, row: str, share: int = 100) -> dict[int, float]:
        """Accuracy on the test pictures in percent, by seed."""
        return {line["seed"]: line["test_top1"] for line in self.of("runs", dataset, row, share)}

    def time(self, dataset: str, row: str) -> Line | None:
        """The step time of a row."""
        return next((v for v in self.times if (v["dataset"], v["row"]) == (dataset, row)), None)


def _run(line: Line) -> Run:
    return Run(line["dataset"], line["row"], line["seed"], line["share"])


def _read(path: Path, columns: tuple[str, ...]) -> list[Line]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines = [_typed(line) for line in reader]
            if tuple(reader.fieldnames or ()) != columns or any(line["row"] not in ROWS for line in lines):
                raise ValueError(f"the columns {','.join(columns)} and known rows are expected")
            return lines
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a table of the study's results: {error}.") from None


def _typed(line: dict[str, str]) -> Line:
    return {key: value if key in WORDS else _number(value) for key, value in line.items()}


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _write(path: Path, columns: tuple[str, ...], lines: list[Line]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
