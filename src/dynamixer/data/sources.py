"""Labelled pictures by number, from class folders, Parquet files, tar shards, data sets by name, or the set that ships."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dynamixer.data.base import LABEL_COLUMNS, SPLITS, Source, Splits, read_labels
from dynamixer.data.decode import SUFFIXES, BadImage, read_file
from dynamixer.data.hub import PREFIX, open_hub
from dynamixer.data.tar import COMPRESSED_ENDINGS, open_tars
from dynamixer.data.torchvision_names import NAMES as TORCHVISION_NAMES
from dynamixer.data.torchvision_names import load as load_torchvision
from dynamixer.errors import UserError, did_you_mean
from dynamixer.files import in_utf8
from dynamixer.logs import log

__all__ = ["EMBEDDED", "FolderSource", "ParquetSource", "Source", "Splits", "TorchvisionSource", "open_data"]

EMBEDDED = "fashion-mnist-mini"


class FolderSource(Source):
    """A folder that has a folder of pictures for each class."""

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.paths: list[Path] = []
        self.unused: list[Path] = []
        labels: list[int] = []
        classes: list[str] = []
        for folder in folders:
            pictures, others = files_in(folder)
            self.unused += others
            if pictures:
                labels += [len(classes)] * len(pictures)
                classes.append(folder.name)
                self.paths += pictures
            else:
                log(f"the folder {folder} has no pictures: it is not taken for a class")
        if not self.paths:
            loose = any(p.suffix.lower() in SUFFIXES for p in root.iterdir())
            hint = " (the pictures lie loose; put each class into a folder of its own)" if loose else ""
            raise UserError(f"{root} has no class folders with pictures{hint}.")
        if self.unused:
            log(f"left out what is not a picture: {len(self.unused)} in {root}, the first is {self.unused[0]}")
        if beside := [path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]:
            log(f"left out {len(beside)} pictures that lie in {root} itself, in no folder of a class")
        super().__init__(str(root), classes, labels)

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        return read_file(self.paths[index], name=self.title(index))

    def title(self, index: int) -> str:
        """The file's path."""
        return in_utf8(str(self.paths[index]))


class ParquetSource(Source):
    """Parquet files in the Hugging Face image layout: an image column of encoded bytes and a column of labels."""

    def __init__(self, files: Sequence[Path], name: str | None = None):
        name = name or str(files[0] if len(files) == 1 else files[0].parent)
        try:
            schema = pq.read_schema(files[0])
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise _not_parquet(name, error) from None
        self.files = files
        self.column, label, names = _columns(schema, name)
        labels, names = read_labels(_read_column(files, label, name), names, name)
        super().__init__(name, names, labels)

    @cached_property
    def image(self) -> pa.ChunkedArray:
        """The column of pictures, read whole into memory when the first one is wanted."""
        image = _read_column(self.files, self.column, self.name)
        if len(image) != len(self):
            raise UserError(f"{self.name} has changed since it was opened: start again.")
        return image

    def prepare(self) -> None:
        """Read the pictures, once for all workers."""
        _ = self.image

    def encoded(self, index: int) -> bytes:
        """The bytes in a row."""
        value = self.image[index]
        encoded: bytes | None = (value["bytes"] if isinstance(value, pa.StructScalar) else value).as_py()
        if encoded is None:
            raise BadImage(f"{self.title(index)} has no bytes: only pictures embedded in the file are read.")
        return encoded

    def title(self, index: int) -> str:
        """The file and the row, counted from 0."""
        return f"{self.name} row {index}"


class TorchvisionSource(Source):
    """One of torchvision's data sets, downloaded to the cache on first use."""

    def __init__(self, name: str, split: str):
        self.data, classes, labels = load_torchvision(name, split)
        super().__init__(f"{name} {split}", classes, labels)

    def encoded(self, index: int) -> None:
        """Nothing: torchvision holds pixels."""

    def picture(self, index: int, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The picture that torchvision gives, whole."""
        picture: Image.Image = self.data[index][0]
        return picture.convert("RGB")

    def title(self, index: int) -> str:
        """The split and the number."""
        return f"{self.name} {index}"


def named(paths: Iterable[str | Path]) -> Iterator[str | Path]:
    """The paths as they are; an empty word, which would mean the current folder, is refused.

    Raises:
        UserError: one is empty.
    """
    for path in paths:
        if not str(path):
            raise UserError("one of the paths is empty: name a picture or a folder, such as . for this one.")
        yield path


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures, by their endings, in a folder and the folders in it, and what else lies there; hidden files do not count."""
    pictures: list[Path] = []
    others: list[Path] = []
    for path in sorted(_inside(folder, ())):
        picture = path.suffix.lower() in SUFFIXES and path.is_file()  # and not a link that leads nowhere
        (pictures if picture else others).append(path)
    return pictures, others


def _inside(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """All that is no folder in a folder and the folders in it, linked ones too; a link back to one `above` is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _inside(path, (*above, real))
        else:
            yield path


def open_data(data: str | Path) -> Splits:
    """Open a data set by path or name.

    Args:
        data: a folder of class folders; a folder with train / val / test folders of such, or with train*, val* and test*
            files, either Parquet or tar (WebDataset shards); a Parquet or tar file, or a pattern for several such as
            "shards/train-*.tar"; "fashion-mnist-mini", which ships; a torchvision name such as CIFAR10, which is
            downloaded; or "hf:owner/name" or "hf:owner/name@config", a data set of Hugging Face.

    Raises:
        UserError: nothing is there, or it holds no labelled pictures.
        RunError: it could not be downloaded.
    """
    path, name = Path(data), str(data)
    if not name:
        raise UserError(
            "the name of the data is empty: give a folder, a file or a data set, such as . for this folder."
        )
    if "pipe:" in name or "://" in name:
        raise UserError(f"{name} is a command or an address, and data is read from files only: download it first.")
    if name.startswith(PREFIX):
        return open_hub(name)
    if path.is_file():
        return Splits(train=_open_files([path], name))
    if path.is_dir():
        return _open_folder(path)
    if glob.has_magic(name):
        files = sorted(Path(file) for file in glob.glob(name, recursive=True))
        if not files:
            raise UserError(f"no file matches {name}.")
        return Splits(train=_open_files(files, name))
    if name == EMBEDDED:
        here = Path(__file__).parent / "fashion"
        return Splits(*(_embedded(here, split) for split in ("train", None, "test")))
    if name.lower() in TORCHVISION_NAMES:
        return Splits(train=TorchvisionSource(name, "train"), test=TorchvisionSource(name, "test"))
    known = [EMBEDDED, *TORCHVISION_NAMES.values()]
    raise UserError(
        f"no file or folder {name}, and no data set of that name (those of Hugging Face begin with {PREFIX}); "
        f"{did_you_mean(name, known)}"
    )


def _embedded(folder: Path, split: str | None) -> Source | None:
    return ParquetSource([folder / f"{split}.parquet"], name=f"{EMBEDDED} {split}") if split else None


def _open_files(files: list[Path], name: str) -> Source:
    if all(file.suffix.lower() == ".parquet" for file in files):
        return ParquetSource(files, name)
    if all(file.name.lower().endswith((".tar", *COMPRESSED_ENDINGS)) for file in files):
        return open_tars({"train": files}, name)["train"]
    other = next((file for file in files if file.suffix.lower() not in (".parquet", ".tar")), None)
    if other is None:
        raise UserError(f"{name} means both .parquet files and .tar shards: name those of one kind.")
    raise UserError(f"{other} is not a data set: give a folder of class folders, .parquet files or .tar shards.")


def _open_folder(root: Path) -> Splits:
    found: dict[str, Source] = {}
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    parquet = sorted(root.glob("*.parquet"))
    tars = [] if folders else sorted(root.glob("*.tar"))  # beside folders lies the archive that they were unpacked from
    shards: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        files = [p for p in parquet if _first_word(p) in names]
        named = [p for p in folders if p.name.lower() in names]
        named = [p for p in named if any(inner.is_dir() for inner in p.iterdir())]  # else a class of that name
        if files:
            found[split] = ParquetSource(files)
        elif named:
            found[split] = FolderSource(named[0])
        elif archives := [p for p in tars if _first_word(p) in names]:
            shards[split] = archives
    if shards and not found:
        found = open_tars(shards, str(root))
    if found:
        read = {source.root for source in found.values() if isinstance(source, FolderSource)}
        if left := [p.name for p in folders if p not in read]:
            log(
                f"{root}: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''} left out beside {', '.join(found)}, being no "
                "folders of class folders with the name of a split, or a second one of a split"
            )
        return Splits.of(found, str(root))
    if parquet:
        return Splits(train=ParquetSource(parquet))
    return Splits(train=open_tars({"train": tars}, str(root))["train"] if tars else FolderSource(root))


def _first_word(path: Path) -> str:
    """The letters that a file name begins with: "train" of train-00001.tar."""
    return re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0]


def _columns(schema: pa.Schema, name: str) -> tuple[str, str, list[str] | None]:
    """The image column, the label column and the class names, from Hugging Face's metadata or from the types."""
    features = _features(schema)
    images = image_columns(schema)
    labels = [k for k, f in features.items() if f.get("_type") == "ClassLabel"]
    labels = labels or [k for k in schema.names if k in LABEL_COLUMNS]
    if not images or not labels:
        raise UserError(
            f"{name} has columns {', '.join(schema.names)}; an image column (struct of bytes and path) "
            "and a label column are needed."
        )
    for what, found in (("pictures", images), ("labels", labels)):
        if len(found) > 1:
            log(f"{name} has several columns of {what}: {found[0]} is taken, and {', '.join(found[1:])} left out")
    names = features.get(labels[0], {}).get("names")
    return images[0], labels[0], [str(n) for n in names] if isinstance(names, list) and names else None


def _read_column(files: Sequence[Path], column: str, name: str) -> pa.ChunkedArray:
    try:
        return pa.concat_tables([pq.read_table(file, columns=[column]) for file in files]).column(0)
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _not_parquet(name, error) from None


def _not_parquet(name: str, error: Exception) -> UserError:
    return UserError(f"{in_utf8(name)} cannot be read as Parquet: {str(error).splitlines()[0]}")


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that can hold encoded pictures: those that Hugging Face's metadata names, or all of such a type."""
    by_type = {field.name: field.type for field in schema}
    images = [k for k, f in _features(schema).items() if f.get("_type") == "Image"] or list(by_type)
    return [k for k in images if _holds_bytes(by_type[k])]


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata says of each column."""
    features: dict[str, Any] = {}
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata:
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # without it the types of the columns tell
            features = dict(json.loads(metadata)["info"]["features"])
    return {k: f for k, f in features.items() if isinstance(f, dict) and k in schema.names}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
