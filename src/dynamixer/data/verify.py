"""Every picture of a data set read and decoded once, and what is wrong or worth knowing written down."""

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dynamixer.data.decode import FORMATS, SUFFIXES, BadImage, decode, orientation
from dynamixer.data.sources import FolderSource, Source, files_in, open_data
from dynamixer.data.workers import end_with_parent
from dynamixer.errors import RunError, UserError
from dynamixer.files import whole_file
from dynamixer.progress import progress

ERRORS = {
    "unreadable": "the bytes cannot be read, or are not there",
    "empty": "zero bytes",
    "not-a-picture": "no picture of a known format",
    "truncated": "the header is in order, and what follows is cut short or damaged",
    "absurd-size": "more bytes or pixels than are accepted, or a side many times the other",
    "in-two-splits": "the same bytes in an earlier split: what is measured on it means little",
}
NOTES = {
    "duplicate": "the same bytes earlier in the split",
    "wrong-suffix": "the name ends as another format does",
    "cmyk": "four inks, converted to RGB",
    "16-bit": "more than 8 bits a channel, scaled to 8",
    "palette": "colours from a table, converted to RGB",
    "animated": "several frames, of which the first is taken",
    "exif-rotated": "stored turned or mirrored, and put upright",
    "not-used": "a file in a class folder that is no picture by its name",
}
ENDINGS = {
    "JPEG": {".jpg", ".jpeg"},
    "MPO": {".jpg", ".jpeg"},  # a JPEG with further pictures after the first
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm"},
}
BATCH, EXAMPLES = 32, 3


@dataclass
class Report:
    """What was found: how many pictures there are, how often each finding, the first names of each, the manifest."""

    pictures: int = 0
    errors: int = 0
    notes: int = 0
    findings: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    manifest: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "manifest": str(self.manifest)}

    def to_text(self) -> str:
        """A table for people."""
        lines = [f"{self.pictures:,} pictures: {self.errors:,} errors, {self.notes:,} notes"]
        for severity, known in (("error", ERRORS), ("note", NOTES)):
            for name in (n for n in known if n in self.findings):
                more = ", ..." if self.findings[name] > len(self.examples[name]) else ""
                lines.append(f"{severity:6}{name:14}{self.findings[name]:>9,}  {known[name]}")
                lines.append(f"{'':31}{', '.join(self.examples[name])}{more}")
        return "\n".join([*lines, f"manifest: {self.manifest}"])


def verify(data: str | Path, *, out: str | Path | None = None, workers: int = 0) -> Report:
    """Read and decode every picture of every split, and write a manifest with a line of JSON for each.

    A line has the split, name, class, SHA-256 of the encoded bytes (of the pixels where the source holds pixels), bytes,
    format, mode, width, height (as stored) and findings, each with name, severity and, where there is more to say, detail.

    Args:
        data: what `open_data` takes, or a folder in which pictures lie loose.
        out: the manifest; `<data name>-manifest.jsonl` in the current folder by default.
        workers: processes that read and decode; the result does not depend on them.

    Raises:
        UserError: the data cannot be opened.
        RunError: the manifest cannot be written, or a worker died.
    """
    splits = _splits(data)
    path = Path(out) if out is not None else Path(f"{_data_name(data)}-manifest.jsonl")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the manifest a file name.")
    report, repeats = Report(manifest=path), _Repeats(splits)
    for source in splits.values():
        for file in source.unused if isinstance(source, FolderSource) else ():
            _count(report, "not-used", str(file))
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for record in _records(splits, workers):
            repeats.note(record)
            report.pictures += 1
            for found in record["findings"]:
                _count(report, found["name"], record["name"])
            del record["index"]
            lines.write(json.dumps(record) + "\n")
    return report


def check(source: Source, index: int) -> dict[str, Any]:
    """What the manifest says of one picture, apart from its repetitions. Nothing that is wrong with it is raised."""
    label = int(source.labels[index])
    record: dict[str, Any] = {
        "name": source.title(index),
        "class": source.classes[label] if label >= 0 else None,
        **dict.fromkeys(("sha256", "bytes", "format", "mode", "width", "height")),
        "findings": [],
    }
    try:
        encoded = source.encoded(index)
        if encoded is None:
            picture = source.picture(index)
            record |= {"sha256": hashlib.sha256(picture.tobytes()).hexdigest(), "mode": picture.mode}
            record |= {"width": picture.width, "height": picture.height}
            return record
        record |= {"sha256": hashlib.sha256(encoded).hexdigest(), "bytes": len(encoded)}
        header, notes = _header(encoded, PurePath(record["name"]).suffix.lower())
        record |= header
        record["findings"] = [_finding(name) for name in notes]
        decode(encoded, name=record["name"])
    except BadImage as error:
        record["findings"].insert(0, _finding(error.kind, str(error)))
    except RunError as error:  # a disk that cannot be read, which is what is looked for here
        record["findings"].insert(0, _finding("unreadable", str(error)))
    return record


def _finding(name: str, detail: str | None = None) -> dict[str, str]:
    found = {"name": name, "severity": "error" if name in ERRORS else "note"}
    return found if detail is None else {**found, "detail": detail}


def _count(report: Report, finding: str, name: str) -> None:
    report.findings[finding] = report.findings.get(finding, 0) + 1
    if finding in ERRORS:
        report.errors += 1
    else:
        report.notes += 1
    examples = report.examples.setdefault(finding, [])
    if len(examples) < EXAMPLES:
        examples.append(name)


def _header(encoded: bytes, suffix: str) -> tuple[dict[str, Any], list[str]]:
    """Format, mode and size from the header, and the notes on them; nothing where it cannot be read: `decode` says why."""
    facts: dict[str, Any] = {}
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
                mode, kind = picture.mode, str(picture.format)
                facts = {"format": kind, "mode": mode, "width": picture.width, "height": picture.height}
                raw = str([tile.args for tile in picture.tile])  # 16-bit colour has the mode RGB, and RGB;16B here
                seen = {
                    "wrong-suffix": suffix in SUFFIXES and suffix not in ENDINGS.get(kind, {f".{kind.lower()}"}),
                    "cmyk": mode == "CMYK",
                    "16-bit": mode.startswith(("I", "F")) or ";16" in raw,
                    "palette": mode in ("P", "PA"),
                }
                notes = [name for name, found in seen.items() if found]
                if orientation(picture) != 1:
                    notes.append("exif-rotated")
                if getattr(picture, "is_animated", False):
                    notes.append("animated")
    except MemoryError:
        raise
    except Exception:  # Pillow raises anything on bad bytes; decoding tells what it means
        pass
    return facts, notes


class _Repeats:
    """Which bytes came before: in this split a note, in an earlier one an error."""

    def __init__(self, splits: Mapping[str, Source]):
        self.splits = splits
        self.first: dict[bytes, tuple[str, int]] = {}
        self.split, self.here = "", dict[bytes, int]()

    def note(self, record: dict[str, Any]) -> None:
        """Add to the record's findings that it is a repetition, if it is one."""
        if record["split"] != self.split:
            self.split, self.here = record["split"], {}
        if record["sha256"] is None or record["bytes"] == 0:
            return
        key = bytes.fromhex(record["sha256"])
        if key in self.here:
            record["findings"].append(_finding("duplicate", self._detail(self.split, self.here[key], record)))
        split, index = self.first.setdefault(key, (self.split, record["index"]))
        if split != self.split:
            record["findings"].insert(0, _finding("in-two-splits", self._detail(split, index, record)))
        self.here.setdefault(key, record["index"])

    def _detail(self, split: str, index: int, record: dict[str, Any]) -> str:
        source = self.splits[split]
        label = int(source.labels[index])
        other = label >= 0 and source.classes[label] != record["class"]
        kind = f", where its class is {source.classes[label]}" if other else ""
        return f"the same bytes as {source.title(index)} ({split}){kind}"


class _Checks(Dataset[dict[str, Any]]):
    """The records of one split by number."""

    def __init__(self, split: str, source: Source):
        self.split, self.source = split, source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"split": self.split, "index": index, **check(self.source, index)}


def _records(splits: Mapping[str, Source], workers: int) -> Iterator[dict[str, Any]]:
    """The records of every picture in their order."""
    for split, source in splits.items():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")  # the user has said how many
                loader = DataLoader(
                    _Checks(split, source),
                    batch_size=BATCH,
                    num_workers=workers,
                    collate_fn=list,
                    worker_init_fn=end_with_parent,
                )
                batches = iter(loader)  # the workers are forked before the bar has its thread
            with progress(f"verify {split}", len(source)) as meter:
                for batch in batches:
                    yield from batch
                    meter.advance(len(batch))
        except RuntimeError as error:
            raise RunError(f"a process that reads {source.name} ended early: {str(error).splitlines()[0]}") from None


def _splits(data: str | Path) -> dict[str, Source]:
    root = Path(data)
    inside = [p for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []
    if inside and not any(p.is_dir() or p.suffix.lower() in (".parquet", ".tar") for p in inside):
        pictures, others = files_in(root)
        if pictures:
            return {"all": _Loose(root, pictures, others)}
    opened = open_data(data)
    split, source = opened.for_evaluation()
    return {"all": source} if split == "all" else opened.named()


class _Loose(FolderSource):
    """Pictures without classes: there to be verified only."""

    def __init__(self, root: Path, pictures: list[Path], others: list[Path]):
        self.root, self.name, self.paths, self.unused = root, str(root), pictures, others
        self.classes, self.labels = (), np.full(len(pictures), -1, dtype=np.int64)


def _data_name(data: str | Path) -> str:
    path = Path(data)
    name = path.resolve().name if path.is_dir() else path.stem if path.is_file() else str(data)
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "data"
