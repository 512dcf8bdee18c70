"""Labelled pictures by number, from class folders, Parquet files, torchvision's data sets, or the set that ships.

Every source is map-style: a length, labels, and a picture for each number.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dynamixer.data.decode import SUFFIXES, BadImage, decode
from dynamixer.data.torchvision_names import NAMES as TORCHVISION_NAMES
from dynamixer.data.torchvision_names import load as load_torchvision
from dynamixer.errors import UserError, did_you_mean
from dynamixer.logs import log

EMBEDDED = "fashion-mnist-mini"
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}


class Source(ABC):
    """Labelled pictures: `len(source)`, `source.labels`, `source.picture(i)`."""

    def __init__(self, name: str, classes: Sequence[str], labels: Sequence[int]):
        self.name, self.classes = name, tuple(classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        if not len(self.labels):
            raise UserError(f"{name} has no pictures.")
        if len(self.classes) < 2:
            raise UserError(f"{name} has one class only ({self.classes[0]}): telling apart needs two or more.")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise UserError(
                f"{name} has labels from {self.labels.min()} to {self.labels.max()}, and {len(self.classes)} classes."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """The picture with this number, upright 8-bit RGB. Raises BadImage with its name."""

    @abstractmethod
    def title(self, index: int) -> str:
        """What to call the picture with this number."""


@dataclass(frozen=True)
class Splits:
    """The parts of one data set; a source without named parts is all `train`."""

    train: Source | None = None
    val: Source | None = None
    test: Source | None = None

    def for_evaluation(self, split: str | None = None) -> tuple[str, Source]:
        """The named split, or the first that there is of test, val and train; data without splits is "all" of it."""
        if split is not None and split not in SPLITS:
            raise UserError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
        if split is None and self.train is not None and self.val is None and self.test is None:
            return "all", self.train
        for name in [split] if split else ["test", "val", "train"]:
            source: Source | None = getattr(self, name)
            if source is not None:
                return name, source
        raise UserError(f"this data has no {split} split; it has {', '.join(s for s in SPLITS if getattr(self, s))}.")


class FolderSource(Source):
    """A folder that has a folder of pictures for each class."""

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.paths: list[Path] = []
        labels: list[int] = []
        classes: list[str] = []
        others: list[Path] = []
        for folder in folders:
            files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
            others += [p for p in files if p.suffix.lower() not in SUFFIXES]
            if pictures:
                labels += [len(classes)] * len(pictures)
                classes.append(folder.name)
                self.paths += pictures
        if not self.paths:
            loose = any(p.suffix.lower() in SUFFIXES for p in root.iterdir())
            hint = " (the pictures lie loose; put each class into a folder of its own)" if loose else ""
            raise UserError(f"{root} has no class folders with pictures{hint}.")
        if others:
            log(f"left out {len(others)} files that are not pictures, the first is {others[0]}")
        super().__init__(str(root), classes, labels)

    def picture(self, index: int) -> Image.Image:
        """The file's picture."""
        return decode(self.paths[index])

    def title(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])


class ParquetSource(Source):
    """Parquet files in the Hugging Face image layout: an image column of encoded bytes and a column of labels."""

    def __init__(self, files: Sequence[Path], name: str | None = None):
        name = name or str(files[0] if len(files) == 1 else files[0].parent)
        try:
            schema = pq.read_schema(files[0])
            image, label, names = _columns(schema, name)
            table = pa.concat_tables([pq.read_table(file, columns=[image, label]) for file in files])
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        self.image = table.column(image)
        self.is_struct = pa.types.is_struct(self.image.type)
        values = table.column(label)
        if values.null_count:
            raise UserError(f"{name} has {values.null_count} pictures without a label.")
        if pa.types.is_integer(values.type):
            labels = values.to_numpy().astype(np.int64)
            names = names or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
        elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise UserError(f"{name} has labels of type {values.type}: whole numbers or words are needed.")
        else:
            texts = values.to_pylist()
            names = sorted(set(texts))
            labels = np.searchsorted(names, texts)
        super().__init__(name, names, labels)

    def picture(self, index: int) -> Image.Image:
        """The picture of a row."""
        value = self.image[index]
        encoded = value["bytes"].as_py() if self.is_struct else value.as_py()
        if encoded is None:
            raise BadImage(f"{self.title(index)} has no bytes: only pictures embedded in the file are read.")
        return decode(encoded, name=self.title(index))

    def title(self, index: int) -> str:
        """The file and the row, counted from 0."""
        return f"{self.name} row {index}"


class TorchvisionSource(Source):
    """One of torchvision's data sets, downloaded to the cache on first use."""

    def __init__(self, name: str, split: str):
        self.data, classes, labels = load_torchvision(name, split)
        super().__init__(f"{name} {split}", classes, labels)

    def picture(self, index: int) -> Image.Image:
        """The picture that torchvision gives."""
        picture: Image.Image = self.data[index][0]
        return picture.convert("RGB")

    def title(self, index: int) -> str:
        """The split and the number."""
        return f"{self.name} {index}"


def open_data(data: str | Path) -> Splits:
    """Open a data set by path or name.

    Args:
        data: a folder of class folders; a folder with train / val / test folders of such, or with train*.parquet,
            val*.parquet, test*.parquet files; a Parquet file; "fashion-mnist-mini", which ships; or a torchvision name such
            as CIFAR10, which is downloaded.

    Raises:
        UserError: nothing is there, or it holds no labelled pictures.
    """
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UserError(f"{path} is not a data set: give a folder of class folders, or a .parquet file.")
        return Splits(train=ParquetSource([path]))
    if path.is_dir():
        return _open_folder(path)
    name = str(data)
    if name == EMBEDDED:
        here = Path(__file__).parent / "fashion"
        return Splits(*(_embedded(here, split) for split in ("train", None, "test")))
    if name.lower() in TORCHVISION_NAMES:
        return Splits(train=TorchvisionSource(name, "train"), test=TorchvisionSource(name, "test"))
    known = [EMBEDDED, *TORCHVISION_NAMES.values()]
    raise UserError(f"no file or folder {name}, and no data set of that name; {did_you_mean(name, known)}")


def _embedded(folder: Path, split: str | None) -> Source | None:
    return ParquetSource([folder / f"{split}.parquet"], name=f"{EMBEDDED} {split}") if split else None


def _open_folder(root: Path) -> Splits:
    found: dict[str, Source] = {}
    for split, names in SPLITS.items():
        files = sorted(p for p in root.glob("*.parquet") if p.stem.split("-")[0].lower() in names)
        folders = [p for p in sorted(root.iterdir()) if p.name.lower() in names and p.is_dir()]
        folders = [p for p in folders if any(inner.is_dir() for inner in p.iterdir())]  # else a class of that name
        if files:
            found[split] = ParquetSource(files)
        elif folders:
            found[split] = FolderSource(folders[0])
    if not found:
        loose = sorted(root.glob("*.parquet"))
        return Splits(train=ParquetSource(loose) if loose else FolderSource(root))
    named = {source.classes for source in found.values()}
    if len(named) > 1:
        raise UserError(
            f"the splits of {root} have different classes: {' / '.join(str(len(n)) for n in named)} of them."
        )
    return Splits(**found)


def _columns(schema: pa.Schema, name: str) -> tuple[str, str, list[str] | None]:
    """The image column, the label column and the class names, from Hugging Face's metadata or from the types."""
    features: dict[str, Any] = {}
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata:
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # without it the types of the columns tell
            features = dict(json.loads(metadata)["info"]["features"])
    by_type = {field.name: field.type for field in schema}
    features = {k: f for k, f in features.items() if isinstance(f, dict) and k in by_type}
    images = [k for k, f in features.items() if f.get("_type") == "Image"] or list(by_type)
    images = [k for k in images if _holds_bytes(by_type[k])]
    labels = [k for k, f in features.items() if f.get("_type") == "ClassLabel"]
    labels = labels or [k for k in by_type if k in ("label", "labels", "class", "fine_label", "target")]
    if not images or not labels:
        raise UserError(
            f"{name} has columns {', '.join(by_type)}; an image column (struct of bytes and path) and a label column are needed."
        )
    names = features.get(labels[0], {}).get("names")
    return images[0], labels[0], [str(n) for n in names] if isinstance(names, list) and names else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
