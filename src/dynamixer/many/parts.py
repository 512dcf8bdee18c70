"""The output in parts: each written whole by a rename, joined at the end by another. What is not renamed never happened.

Beside OUT lies, while it is being made, the folder OUT.parts with job.json (what is being computed), a Parquet file for each part
that is done, and a lock. A part is a fixed slice of the input, so that whatever happens between its parts changes none of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dynamixer.errors import RunError, UserError
from dynamixer.files import reason, whole_file, write_text
from dynamixer.lock import locked, unlock
from dynamixer.logs import log

PART = 512  # pictures, rounded to whole batches: what a kill can cost
ROWS = 16_384  # in a row group of the output
PATIENCE = 5  # seconds to wait for the lock: workers of a process that was killed hold it until they have noticed
KEY = b"dynamixer.predict"
WORDS = {
    "model": "another model",
    "input": "other pictures (names, sizes or times of change)",
    "pictures": "another number of pictures",
    "top": "another --top",
    "embeddings": "another --embeddings",
    "batch_size": "another --batch-size",
    "size": "another --size",
    "part": "another version of dynamixer",
    "format": "another version of dynamixer",
}


@dataclass(frozen=True)
class Job:
    """What determines every byte of the output on one machine."""

    model: str  # hash of the checkpoint
    input: str  # hash of the pictures' names, sizes and times
    pictures: int
    top: int
    embeddings: bool
    batch_size: int
    size: int | tuple[int, int] | None  # of pictures in pixels, if not the one trained at
    part: int  # pictures in a part, whole batches
    format: int = 1

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.pictures // self.part)

    def slices(self, part: int) -> list[range]:
        """The batches of a part, as numbers of pictures."""
        end = min(self.pictures, (part + 1) * self.part)
        return [
            range(start, min(start + self.batch_size, end)) for start in range(part * self.part, end, self.batch_size)
        ]

    def differences(self, other: dict[str, Any]) -> str:
        """In words, what in `other` is not as here; "" if nothing."""
        ours: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # as `other` was read: no tuples
        found = {key: words for key, words in WORDS.items() if other.get(key) != ours[key]}
        if "batch_size" in found:
            found.pop("part", None)  # which follows from it
        return ", ".join(dict.fromkeys(found.values()))


class Parts:
    """The folder of parts of one output file."""

    def __init__(self, out: Path, job: Job):
        self.out, self.job = out, job
        self.folder = out.with_name(f"{out.name}.parts")
        self.bad = out.with_suffix(".bad.jsonl")

    def finished(self) -> bool:
        """Whether the output is there, whole.

        Raises:
            UserError: something is there that is not the output of this job.
        """
        if not self.out.exists():
            return False
        try:
            written = json.loads(pq.read_schema(self.out).metadata[KEY])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.out} exists and was not written by this command: give --out another name."
            ) from None
        if differences := self.job.differences(written):
            raise UserError(f"{self.out} was made with {differences}: delete it or give --out another name.")
        return True

    @contextmanager
    def opened(self, machine: dict[str, Any]) -> Iterator[None]:
        """Hold the folder, made if it is not there, for this process alone.

        Args:
            machine: what else the last digits depend on; a change of it since the beginning is logged.

        Raises:
            UserError: it belongs to another job, or to a process that is still at work.
            RunError: it cannot be made.
        """
        about = self.folder / "job.json"
        lock = self._lock()
        try:
            if about.exists():
                self._same(about, machine)
            elif self.done():
                raise UserError(f"{self.folder} holds parts of an unknown job: delete it or give --out another name.")
            else:
                write_text(about, json.dumps({"job": asdict(self.job), "machine": machine}, indent=2) + "\n")
            try:
                yield
            except BaseException:
                if not self.done():  # nothing is lost, and another try is free to differ
                    self.clear()
                raise
        finally:
            unlock(lock)

    def _lock(self) -> int:
        """The lock file, held. One that its holder removed while we waited for it, with the folder, is made anew."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise RunError(f"{self.folder} could not be made: {reason(error)}.") from None
            if not locked(lock, PATIENCE):
                unlock(lock)
                raise UserError(f"another process is at work on {self.out}: wait for it, or stop it.")
            if os.fstat(lock).st_nlink:
                return lock
            unlock(lock)

    def _same(self, about: Path, machine: dict[str, Any]) -> None:
        try:
            begun = json.loads(about.read_text(encoding="utf-8"))
            differences = self.job.differences(begun["job"])
            changed = [f"{key} {begun['machine'].get(key)}, now {now}" for key, now in machine.items()
                       if begun["machine"].get(key) != now]  # fmt: skip
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{about} is damaged: delete {self.folder} and start again.") from None
        if differences:
            raise UserError(
                f"{self.out} was begun with {differences}: finish it as it was begun, delete {self.folder}, "
                "or give --out another name."
            )
        if changed:
            log(f"begun with {'; '.join(changed)}: last digits of the rest may differ from those of an undisturbed run")

    def path(self, part: int) -> Path:
        """Where a part lies."""
        return self.folder / f"part-{part:07}.parquet"

    def done(self) -> set[int]:
        """The parts that are there."""
        return {int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.parquet")}

    def write(self, part: int, rows: pa.Table) -> None:
        """Write a part, whole or not at all."""
        with whole_file(self.path(part)) as temporary:
            pq.write_table(rows, temporary)

    def join(self) -> tuple[int, int]:
        """Write the bad pictures and then the output, whose rename is the end; the parts stay.

        Returns:
            How many pictures have a row, and how many were bad.
        """
        rows = bad = 0
        paths = [self.path(part) for part in range(self.job.parts)]
        schema = _without_reason(pq.read_schema(paths[0])).with_metadata({KEY: json.dumps(asdict(self.job)).encode()})
        with (
            whole_file(self.folder / "joined.parquet") as joined,
            whole_file(self.folder / "joined.jsonl") as bad_joined,
            pq.ParquetWriter(joined, schema) as writer,
            bad_joined.open("w", encoding="utf-8") as lines,
        ):
            waiting: list[pa.Table] = []
            for path in paths:
                part = pq.read_table(path)
                is_bad = pc.is_valid(part["reason"])
                for one in part.filter(is_bad).select(["index", "picture", "reason"]).to_pylist():
                    lines.write(json.dumps(one, ensure_ascii=False) + "\n")
                good = part.filter(pc.invert(is_bad)).drop_columns(["reason"])
                rows, bad = rows + len(good), bad + len(part) - len(good)
                waiting.append(good.replace_schema_metadata(schema.metadata))
                if sum(map(len, waiting)) >= ROWS or path is paths[-1]:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=2 * ROWS)
                    waiting = []
        os.replace(self.folder / "joined.jsonl", self.bad)
        os.replace(self.folder / "joined.parquet", self.out)
        return rows, bad

    def forget(self) -> None:
        """Remove what was computed, and go on holding the folder."""
        for path in self.folder.glob("part-*.parquet"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder, but nothing in it that is not ours."""
        with contextlib.suppress(FileNotFoundError):
            ours = ("part-*.parquet", ".part-*", "joined.*", ".joined.*", "job.json", ".job.json.*", "lock")
            for path in [path for pattern in ours for path in self.folder.glob(pattern)]:
                path.unlink(missing_ok=True)
            try:
                self.folder.rmdir()
            except OSError as error:
                if self.folder.exists():
                    log(f"{self.folder} stays: {reason(error)}")


def table(columns: Mapping[str, Sequence[Any]], *, top: int, width: int) -> pa.Table:
    """Rows of a part; `width` is that of the embeddings, 0 for none."""
    fields: dict[str, pa.DataType] = {
        "index": pa.int64(),
        "picture": pa.string(),
        "label": pa.string(),
        "probability": pa.float32(),
        "top_labels": pa.list_(pa.string(), top),
        "top_probabilities": pa.list_(pa.float32(), top),
        **({"embedding": pa.list_(pa.float32(), width)} if width else {}),
        "reason": pa.string(),
    }
    return pa.table(
        {key: pa.array(columns[key], kind) for key, kind in fields.items()}, schema=pa.schema(fields.items())
    )


def _without_reason(schema: pa.Schema) -> pa.Schema:
    return schema.remove(schema.get_field_index("reason"))
