"""Pictures without labels, many of them: files, folders, patterns, Parquet files and tar shards, in one fixed order."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynamixer.data.base import Pictures
from dynamixer.data.decode import SUFFIXES, BadImage, check_bytes, raise_for_machine, read_file
from dynamixer.data.sources import files_in, image_columns, named
from dynamixer.data.tar import COMPRESSED_ENDINGS, TarPictures, every_picture
from dynamixer.errors import RunError, UserError
from dynamixer.files import in_utf8
from dynamixer.logs import log

SHARDS = (".parquet", ".tar")


class Files(Pictures):
    """A file for each picture. The paths are one string: of a million of them a list would take three times the memory."""

    def __init__(self, paths: Sequence[Path]):
        encoded = [os.fsencode(path) for path in paths]
        self.paths = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def encoded(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            BadImage: unreadable or too large.
            RunError: it was there, and is no longer.
        """
        path = self._path(index)
        if not os.path.lexists(path):
            raise RunError(f"{self.title(index)} was there and is gone: start again.")
        return read_file(path, name=self.title(index))

    def title(self, index: int) -> str:
        """The file's path."""
        return in_utf8(str(self._path(index)))

    def _path(self, index: int) -> Path:
        return Path(os.fsdecode(self.paths[self.ends[index] : self.ends[index + 1]]))


class ParquetRows(Pictures):
    """The rows of a Parquet file with a column of encoded pictures; of its row groups one is in memory at a time."""

    def __init__(self, path: Path):
        self.path = path
        try:
            state = path.stat()
            self.stamp = state.st_size, state.st_mtime_ns
            with pq.ParquetFile(path) as file:
                columns = image_columns(file.schema_arrow)
                groups = range(file.metadata.num_row_groups)
                self.ends = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in groups)])
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise UserError(f"{in_utf8(str(path))} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        if not columns:
            raise UserError(
                f"{path} has no column of encoded pictures (bytes, or a struct with bytes, as Hugging Face writes it)."
            )
        self.column = columns[0]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def encoded(self, index: int) -> bytes:
        """The bytes in a row."""
        group = int(np.searchsorted(self.ends, index, side="right")) - 1
        try:
            value = _row_group(self.path, self.stamp, group, self.column)[index - int(self.ends[group])]
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except (pa.ArrowException, OSError) as error:
            raise_for_machine(error, self.title(index))
            raise BadImage(f"{self.title(index)} cannot be read: {str(error).splitlines()[0]}") from None
        encoded: bytes | None = (value["bytes"] if isinstance(value, pa.StructScalar) else value).as_py()
        if encoded is None:
            raise BadImage(f"{self.title(index)} has no bytes: only pictures embedded in the file are read.")
        check_bytes(len(encoded), self.title(index))
        return encoded

    def title(self, index: int) -> str:
        """The file and the row, counted from 0."""
        return in_utf8(f"{self.path} row {index}")


@lru_cache(maxsize=1)
def _row_group(path: Path, stamp: tuple[int, int], group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


class Joined(Pictures):
    """Several lots of pictures, one after the other."""

    def __init__(self, lots: Sequence[Pictures]):
        self.lots = lots
        self.ends = np.cumsum([0, *map(len, lots)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def encoded(self, index: int) -> bytes | None:
        """What the lot has."""
        lot, inside = self._place(index)
        return lot.encoded(inside)

    def title(self, index: int) -> str:
        """What the lot calls it."""
        lot, inside = self._place(index)
        return lot.title(inside)

    def _place(self, index: int) -> tuple[Pictures, int]:
        lot = int(np.searchsorted(self.ends, index, side="right")) - 1
        return self.lots[lot], index - int(self.ends[lot])


def digest_of_files(files: Iterable[Path]) -> str:
    """A hash of files' names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
        with contextlib.suppress(OSError):  # a link that leads nowhere is a bad picture, found where it is read
            state = file.stat()
            digest.update(f"{state.st_size} {state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def open_pictures(paths: Iterable[str | Path], *, out: Path | None = None) -> tuple[Pictures, list[Path]]:
    """All pictures that paths mean, each once, in an order that depends on the names alone; and the files.

    Args:
        paths: pictures, Parquet files, tar files, patterns such as "shards/*.tar", and folders. Of a folder all pictures in
            it and in the folders within are taken or, where there are none, all Parquet and tar files.
        out: what is written of them, which is left out with its parts where it lies among them.

    Returns:
        The pictures, files sorted by the bytes of their paths; and those files.

    Raises:
        UserError: nothing is there, or a file is none of these.
    """
    files = sorted({file for path in named(paths) for file in _files(path) if not _is_of(file, out)}, key=os.fsencode)
    if not files:
        raise UserError("no pictures were given: name files, folders or patterns.")
    lots: list[Pictures] = []
    for kind, group in groupby(files, key=_kind):
        if kind == "pictures":
            lots.append(Files([*group]))
        elif kind == ".parquet":
            lots += [ParquetRows(file) for file in group]
        else:
            lots.append(TarPictures([every_picture(file) for file in group]))
    pictures = Joined(lots)
    if not len(pictures):
        raise UserError(f"{files[0]}{' and the others have' if len(files) > 1 else ' has'} no pictures.")
    return pictures, files


def _is_of(file: Path, out: Path | None) -> bool:
    """Whether a file is this output or one of its parts."""
    if out is None or file.suffix.lower() != ".parquet":
        return False
    place, ours = os.path.abspath(file), os.path.abspath(out)
    return place == ours or place.startswith(f"{ours}.parts{os.sep}")


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if file.name.lower().endswith(COMPRESSED_ENDINGS):
        return ".tar"  # it is refused with a sentence where it is opened
    return suffix if suffix in SHARDS else "pictures"


def _is_shard(file: Path) -> bool:
    """Whether it holds many pictures; a compressed one is refused with a sentence where it is opened."""
    return file.suffix.lower() in SHARDS or file.name.lower().endswith(COMPRESSED_ENDINGS)


def _say_left(others: Sequence[Path], name: str) -> None:
    if others:
        log(f"left out what is not a picture: {len(others)} in {name}, the first is {others[0]}")


def _files(path: str | Path) -> list[Path]:
    """The files that a path or pattern means."""
    name, path = str(path), Path(path)
    if path.is_dir():
        pictures, others = files_in(path)
        found = pictures or [file for file in others if _is_shard(file)]
        if not found:
            raise UserError(f"{path} has no pictures ({', '.join(sorted(SUFFIXES))}), Parquet or tar files.")
        _say_left([file for file in others if pictures or not _is_shard(file)], name)
        return found
    if not path.exists() and glob.has_magic(name):
        matching = [Path(file) for file in glob.glob(name, recursive=True)]
        known = [f for f in matching if f.is_file() and (f.suffix.lower() in SUFFIXES or _is_shard(f))]
        if not known:
            raise UserError(f"no picture, Parquet or tar file matches {name}.")
        _say_left(sorted({*matching} - {*known}), name)
        return known
    if not path.exists():
        raise UserError(f"there is no file or folder {name}.")
    return [path]
