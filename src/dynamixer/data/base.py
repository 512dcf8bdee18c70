"""What every source of labelled pictures is: map-style, a length, labels, and a picture for each number."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from dynamixer.data.decode import decode
from dynamixer.errors import UserError, did_you_mean
from dynamixer.logs import log

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target")
MOST_CLASSES = 10_000_000  # a label beyond is an identifier, not the number of a class


class Pictures(ABC):
    """Pictures by number: `len(pictures)`, `pictures.title(i)`, `pictures.picture(i)`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> bytes | None:
        """The bytes of the file of the picture with this number; None where the source holds pixels instead.

        Raises:
            BadImage: with the picture's title: unreadable, too large, or not there.
        """

    @abstractmethod
    def title(self, index: int) -> str:
        """What to call the picture with this number."""

    def picture(self, index: int, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The picture with this number, upright 8-bit RGB.

        Args:
            index: the number.
            at_least: the height and width that will do; a larger JPEG is decoded smaller, which costs less (see `decode`).

        Raises:
            BadImage: with the picture's title.
        """
        encoded = self.encoded(index)
        assert encoded is not None, "a source of pixels has a `picture` of its own"
        return decode(encoded, name=self.title(index), at_least=at_least)


class Source(Pictures):
    """Labelled pictures: those, and `source.classes` and `source.labels`."""

    def __init__(self, name: str, classes: Sequence[str], labels: Sequence[int] | np.ndarray):
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

    def renumber(self, classes: Sequence[str]) -> None:
        """Number the labels as `classes`, among which are all that there are, number them."""
        if self.classes != tuple(classes):
            number = {name: i for i, name in enumerate(classes)}
            self.labels = np.array([number[name] for name in self.classes], dtype=np.int64)[self.labels]
            self.classes = tuple(classes)

    def prepare(self) -> None:
        """Read what all workers can share, before they are started."""


@dataclass(frozen=True)
class Splits:
    """The parts of one data set; a source without named parts is all `train`."""

    train: Source | None = None
    val: Source | None = None
    test: Source | None = None

    @classmethod
    def of(cls, found: Mapping[str, Source], name: str) -> "Splits":
        """The splits of the data set `name`, numbered as the train split, or the one with the most classes, numbers them.

        Raises:
            UserError: another split has a class that this one does not have.
        """
        most = "train" if "train" in found else max(found, key=lambda split: len(found[split].classes))
        classes = found[most].classes
        for split, source in found.items():
            if alone := sorted({*source.classes} - {*classes}):
                missing = f"{alone[0]!r} is in {split} and not in {most}"
                raise UserError(f"the splits of {name} have different classes: {missing}.")
            if without := [one for one in classes if one not in source.classes]:
                log(f"{source.name} has no pictures of {len(without)} of {len(classes)} classes, such as {without[0]}")
            source.renumber(classes)
        return cls(**found)

    def named(self) -> dict[str, Source]:
        """The splits that there are."""
        every = {split: getattr(self, split) for split in SPLITS}
        return {split: source for split, source in every.items() if source is not None}

    def for_evaluation(self, split: str | None = None) -> tuple[str, Source]:
        """The named split, or the first that there is of test, val and train; data without splits is "all" of it."""
        if split is not None and split not in SPLITS:
            raise UserError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
        found = self.named()
        if split is None and list(found) == ["train"]:
            return "all", found["train"]
        for name in [split] if split else ["test", "val", "train"]:
            if name in found:
                return name, found[name]
        raise UserError(f"this data has no {split} split; it has {', '.join(found)}.")


def numbered_classes(top: int, name: str) -> list[str]:
    """Names for the classes 0 to `top` of data that has none."""
    if top >= MOST_CLASSES:
        raise UserError(f"{name} has labels up to {top}: number the classes from 0 on.")
    return [str(i) for i in range(top + 1)]


def read_labels(values: pa.ChunkedArray, names: Sequence[str] | None, name: str) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers and the names of the classes, from a column of whole numbers or words.

    Raises:
        UserError: a label is missing, or is neither.
    """
    if values.null_count:
        raise UserError(f"{name} has {values.null_count} pictures without a label.")
    if pa.types.is_integer(values.type):
        labels = values.to_numpy().astype(np.int64)
        return labels, list(names) if names else numbered_classes(int(labels.max(initial=-1)), name)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{name} has labels of type {values.type}: whole numbers or words are needed.")
    texts = values.to_pylist()
    words = sorted(set(texts))
    return np.searchsorted(words, texts), words
