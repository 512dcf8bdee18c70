"""WebDataset shards, read map-style: opening a tar file notes where each picture lies, and only that is kept.

Members whose paths agree up to the first dot of the file name are one sample: a picture (`.jpg`, `.png`, ...) and its
label, `.cls` (a whole number or a word) or `.json` with "label". Other members are left aside, pickles among them:
nothing is unpickled or run.
"""

import json
import os
import re
import tarfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from dynamixer.data.base import Pictures, Source, numbered_classes
from dynamixer.data.decode import SUFFIXES, BadImage, check_bytes, raise_for_machine
from dynamixer.errors import UserError
from dynamixer.files import in_utf8
from dynamixer.logs import log

COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
CLASSES_FILE = "classes.txt"
LABEL_BYTES = 2**20  # a larger .cls or .json is no label


@dataclass(frozen=True)
class Shard:
    """Where the pictures of one tar file lie, and their labels as they are written."""

    path: Path
    stamp: tuple[int, int]
    names: list[bytes]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: list[str]


class TarPictures(Pictures):
    """Pictures in tar files, each read from its place. Of a million of them the index takes about 50 MB."""

    def __init__(self, shards: Sequence[Shard]):
        self.files = [(shard.path, shard.stamp) for shard in shards]
        self.shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.names) for shard in shards])
        self.offsets = np.concatenate([shard.offsets for shard in shards])
        self.sizes = np.concatenate([shard.sizes for shard in shards])
        names = [member for shard in shards for member in shard.names]
        self.names = b"".join(names)  # one string and the ends in it: a list of them would take three times the memory
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.offsets)

    def encoded(self, index: int) -> bytes:
        """The bytes of the member."""
        path, stamp = self.files[self.shard_of[index]]
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        check_bytes(size, self.title(index))
        try:
            found = _opened(path, stamp).read(offset, size)
        except OSError as error:
            raise_for_machine(error, self.title(index))
            raise BadImage(f"{self.title(index)} cannot be read: {error.strerror or error}.") from None
        if len(found) < size:
            raise BadImage(f"{self.title(index)} is cut short: {path} has become shorter.")
        return found

    def title(self, index: int) -> str:
        """The tar file and the member."""
        member = self.names[self.ends[index] : self.ends[index + 1]]
        return f"{in_utf8(str(self.files[self.shard_of[index]][0]))}: {member.decode(errors='replace')}"


class TarSource(TarPictures, Source):
    """Labelled pictures in tar files."""

    def __init__(self, name: str, shards: Sequence[Shard], classes: Sequence[str], labels: np.ndarray):
        TarPictures.__init__(self, shards)
        Source.__init__(self, name, classes, labels)


def every_picture(path: Path) -> Shard:
    """Where all pictures of a tar file lie, in its order, whatever else is in it and without labels.

    Raises:
        UserError: compressed, truncated or not a tar file.
    """
    with _sentences(path), path.open("rb") as file:
        state = os.fstat(file.fileno())
        pictures = [
            (member.name.encode(errors="surrogateescape"), member.offset_data, member.size)
            for member in _members(file, path)
            if PurePosixPath(member.name).suffix.lower() in SUFFIXES
            and not PurePosixPath(member.name).name.startswith(".")
        ]
    names, offsets, sizes = zip(*pictures, strict=True) if pictures else ((), (), ())
    stamp = state.st_size, state.st_mtime_ns
    return Shard(path, stamp, [*names], np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64), [])


def open_tars(files: Mapping[str, Sequence[Path]], name: str) -> dict[str, Source]:
    """A source for the tar files of each split. The splits share their classes.

    Labels that are numbers count the lines of a classes.txt beside the shards from 0, where there is one; words have to be
    among its lines. Without one, words are sorted: those of the train split, which the others have to keep to.

    Raises:
        UserError: a shard is compressed, truncated or not a tar file, or pictures have no labels.
    """
    count = sum(len(paths) for paths in files.values())
    if count >= 10:  # about 0.1 ms for each member
        log(f"{name}: reading where the pictures lie in {count} tar files")
    read = {split: [_read_shard(path) for path in paths] for split, paths in files.items()}
    written = {split: [label for shard in shards for label in shard.labels] for split, shards in read.items()}
    for split, labels in written.items():
        if not labels:
            raise UserError(f"{', '.join(str(p) for p in files[split][:3])} has no pictures.")
    every = {label for labels in written.values() for label in labels}
    classes = _classes_file(next(iter(files.values()))[0].parent / CLASSES_FILE)
    sources: dict[str, Source] = {}
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in every):
        classes = classes or numbered_classes(max(map(int, every)), name)
        numbers = {label: int(label) for label in every}
    else:
        classes = classes or sorted(set(written.get("train", every)))
        unknown = sorted(every - set(classes))
        if unknown:
            raise UserError(
                f"{name} has the label {unknown[0]!r}, which is none of the {len(classes)} classes of "
                f"{CLASSES_FILE} or of the train split."
            )
        numbers = {label: i for i, label in enumerate(classes)}
    for split, shards in read.items():
        title = name if len(files) == 1 else f"{name} {split}"
        numbered = np.fromiter((numbers[label] for label in written[split]), np.int64)
        sources[split] = TarSource(title, shards, classes, numbered)
    return sources


class _Sample:
    """What is known of one key so far."""

    def __init__(self) -> None:
        self.picture: tarfile.TarInfo | None = None
        self.cls: str | None = None
        self.json: str | None = None


def _read_shard(path: Path) -> Shard:
    samples: dict[tuple[str, str], _Sample] = {}
    with _sentences(path), path.open("rb") as file:
        state = os.fstat(file.fileno())
        for member in _members(file, path):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if stem:
                _note(samples.setdefault((folder, stem), _Sample()), f".{ending.lower()}", member, path, file)
    pictures = [(sample.picture, _label(sample)) for sample in samples.values() if sample.picture is not None]
    without = [picture.name for picture, label in pictures if label is None]
    if without:
        raise UserError(
            f'{path} has {len(without)} pictures without a label (.cls, or .json with "label"), first {without[0]}.'
        )
    if len(pictures) < len(samples):
        log(f"{path}: left out {len(samples) - len(pictures)} samples without a picture")
    members = [picture for picture, _ in pictures]
    return Shard(
        path,
        (state.st_size, state.st_mtime_ns),
        [member.name.encode(errors="surrogateescape") for member in members],
        np.array([member.offset_data for member in members], dtype=np.int64),
        np.array([member.size for member in members], dtype=np.int64),
        [label for _, label in pictures if label is not None],
    )


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """What a file that is no whole tar file raises, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not a whole tar file: {error}.") from None


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of files one after the other; an archive without its end is refused, which tarfile itself does not do."""
    _refuse_compressed(path, file.read(8))
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            if member.size < 0:  # it would lead back to where it stands
                raise UserError(f"{path} is damaged: {member.name} has a negative size.")
            archive.members.clear()  # type: ignore[attr-defined] # else every header is kept
            if member.isreg() and not member.issparse():
                yield member
        end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    if end != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is truncated or damaged at byte {archive.offset:,}: write or download it again.")


def _note(sample: _Sample, suffix: str, member: tarfile.TarInfo, path: Path, file: BinaryIO) -> None:
    if suffix in SUFFIXES:
        if sample.picture is not None:
            raise UserError(f"{path} has two pictures for one sample: {sample.picture.name} and {member.name}.")
        sample.picture = member
    elif suffix in (".cls", ".json"):
        if member.size > LABEL_BYTES:
            raise UserError(f"{path}: {member.name} has {member.size:,} bytes, too many for a label.")
        content = os.pread(file.fileno(), member.size, member.offset_data)
        try:
            text = content.decode()
            if suffix == ".cls":
                sample.cls = text.strip()
            else:
                sample.json = _json_label(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: {member.name} is not {'JSON' if suffix == '.json' else 'text'}.") from None


def _json_label(text: str) -> str | None:
    value = json.loads(text)
    label = value.get("label") if isinstance(value, dict) else None
    known = isinstance(label, int | str) and not isinstance(label, bool)
    return str(label).strip() if known else None


def _label(sample: _Sample) -> str | None:
    return sample.cls or sample.json or None


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed, and pictures cannot be found in it by their place: unpack it with {program}."
            )


def _classes_file(path: Path) -> list[str] | None:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}.") from None
    classes = [line for line in lines if line]
    if len(set(classes)) < len(classes):
        raise UserError(f"{path} names a class twice: give each a line of its own.")
    return classes or None


class _File:
    """An open file, read at any place by any process or thread, closed when nobody holds it any more."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def stamp(self) -> tuple[int, int]:
        """Its size and time of change: what tells whether it is still the one that was indexed."""
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from a place on, fewer where the file ends."""
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(self.descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


@lru_cache(maxsize=64)  # of a thousand shards not all are open at once
def _opened(path: Path, stamp: tuple[int, int]) -> _File:
    """A process's own handle, opened at the first picture; one from before a fork is safe too, as pread has no position."""
    file = _File(path)
    if file.stamp() != stamp:
        raise BadImage(f"{path} has changed since it was opened: start again.")
    return file
