"""Does a written file say what the model says, on real pictures? Letters: B images."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynamixer.data.base import Pictures
from dynamixer.data.decode import BadImage
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import EMBEDDED, open_data
from dynamixer.data.unlabelled import open_pictures
from dynamixer.errors import UserError
from dynamixer.evaluate import match_classes
from dynamixer.export.formats import Runner
from dynamixer.logs import log
from dynamixer.models.checkpoint import Checkpoint
from dynamixer.progress import progress


@dataclass(frozen=True)
class Agreement:
    """How a file's answers compare with the model's."""

    pictures: int
    same_top1: int
    max_difference: float  # of logits
    sizes: tuple[tuple[int, int], ...]  # (height, width) that were tried
    model_accuracy: float | None = None  # percent; None where the pictures' classes are not known
    file_accuracy: float | None = None

    @property
    def share(self) -> float:
        """Pictures of which both name the same class first, in percent."""
        return 100 * self.same_top1 / self.pictures

    def __str__(self) -> str:
        said = f"the same top-1 for {self.share:.4g} %, largest difference {self.max_difference:.2g}"
        if self.model_accuracy is None:
            return said
        return f"{said}, accuracy {self.model_accuracy:.1f} -> {self.file_accuracy:.1f} %"


@dataclass(frozen=True)
class Lot:
    """Some of a source's pictures, with their classes by the model's numbers where those are known."""

    pictures: Pictures
    numbers: Sequence[int]
    labels: np.ndarray | None = None  # of `numbers`


def real_pictures(data: Sequence[str | Path] | None, count: int) -> Lot:
    """Up to `count` pictures to compare on, evenly spread; some that ship if no data is given.

    Raises:
        UserError: nothing is there.
    """
    pictures: Pictures = open_pictures(data)[0] if data else open_data(EMBEDDED).for_evaluation("test")[1]
    return Lot(pictures, _spread(pictures, count))


def apart(data: Sequence[str | Path], checkpoint: Checkpoint, *, compared: int, calibrated: int) -> tuple[Lot, Lot]:
    """Pictures to calibrate on and others to compare on; the same ones only where there are too few.

    Of one labelled data set with the model's classes, as `dynamixer eval` takes it, the first are of the training split, if
    it has one, and the others of the split that it evaluates on, with their classes. Other data is one lot of pictures.

    Raises:
        UserError: nothing is there.
    """
    lot, others = _labelled(data, checkpoint, compared)
    if others is not None and others is not lot.pictures:
        return Lot(others, _spread(others, calibrated)), lot
    every = _spread(lot.pictures, compared + calibrated)
    left = sorted({*every} - {*lot.numbers})
    if len(left) < calibrated // 2:
        log(f"there are only {len(lot.pictures):,} pictures: it is calibrated and compared on the same ones")
        left = every
    return Lot(lot.pictures, [left[i] for i in _spread(left, calibrated)]), lot


def _labelled(data: Sequence[str | Path], checkpoint: Checkpoint, compared: int) -> tuple[Lot, Pictures | None]:
    """Pictures to compare on, with their classes where they are the model's; and the training split of their data set."""
    try:
        if len(data) > 1:
            raise UserError("several --data are taken for pictures without classes.")
        splits = open_data(data[0])
        source = splits.for_evaluation()[1]
    except UserError as error:
        log(f"accuracy is not measured: {error}")
        return real_pictures(data, compared), None
    numbers = _spread(source, compared)
    try:
        labels = match_classes(source, checkpoint).labels[numbers]
    except UserError as error:
        log(f"accuracy is not measured: {error}")
        return Lot(source, numbers), splits.train
    return Lot(source, numbers, labels), splits.train


def _spread(lot: Sized, count: int) -> list[int]:
    return np.unique(np.linspace(0, len(lot) - 1, min(count, len(lot))).astype(int)).tolist()


def tensors(lot: Lot, preprocessing: Preprocessing, batches: Sequence[int]) -> Iterator[np.ndarray]:
    """The pictures as [B, 3, height, width] float32, B as `batches` say, the last of which repeats.

    Raises:
        UserError: a picture cannot be read.
    """
    transform = preprocessing.transform()
    start, sizes = 0, list(batches)
    while start < len(lot.numbers):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        try:
            chunk = [transform(lot.pictures.picture(number)) for number in lot.numbers[start : start + size]]
        except BadImage as error:
            raise UserError(f"the pictures to compare on have to be good ones: {error}") from None
        yield torch.stack(chunk).numpy()
        start += size


def compare(
    model: nn.Module,
    run: Runner,
    lot: Lot,
    preprocessing: Preprocessing,
    *,
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    whole: int | None = None,
) -> Agreement:
    """Run both on the pictures at each size; at the first on all, at further ones on up to 16.

    Args:
        model: the model, on the CPU.
        run: the written file.
        lot: the pictures.
        preprocessing: of the model.
        batches: batch sizes to try, of which the last repeats.
        sizes: picture sizes to try, (height, width).
        whole: the one batch size that the file takes; a short batch is filled up with zeros.
    """
    largest, step = 0.0, max(1, len(lot.numbers) // 16)
    few = Lot(lot.pictures, lot.numbers[::step], None if lot.labels is None else lot.labels[::step])
    plan = [(size, few if i else lot) for i, size in enumerate(sizes)]
    expected, found, labels = [], [], []
    with progress("comparing", sum(len(some.numbers) for _, some in plan)) as meter, torch.inference_mode():
        for size, some in plan:
            labels.append(some.labels)
            for batch in tensors(some, preprocessing.at(size), batches):
                logits = model(torch.from_numpy(batch)).numpy()
                fill = np.zeros((max(0, (whole or 0) - len(batch)), *batch.shape[1:]), np.float32)
                answer = run(np.concatenate([batch, fill]))[: len(batch)]
                difference = np.abs(logits - answer).max(initial=0.0)
                largest = max(largest, float("inf") if np.isnan(difference) else float(difference))
                expected.append(logits.argmax(1))
                found.append(answer.argmax(1))
                meter.advance(len(batch))
    ours, theirs = np.concatenate(expected), np.concatenate(found)
    right: list[float] = []
    if lot.labels is not None:
        true = np.concatenate([some for some in labels if some is not None])
        right = [100 * float((top == true).mean()) for top in (ours, theirs)]
    return Agreement(len(ours), int((ours == theirs).sum()), largest, tuple(sizes), *right)
