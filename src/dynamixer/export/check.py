"""Does a written file say what the model says, on real pictures? Letters: B images."""

from collections.abc import Iterator, Sequence
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
from dynamixer.export.formats import Runner
from dynamixer.progress import progress


@dataclass(frozen=True)
class Agreement:
    """How a file's answers compare with the model's."""

    pictures: int
    same_top1: int
    max_difference: float  # of logits
    sizes: tuple[tuple[int, int], ...]  # (height, width) that were tried

    @property
    def share(self) -> float:
        """Pictures of which both name the same class first, in percent."""
        return 100 * self.same_top1 / self.pictures


def real_pictures(data: Sequence[str | Path] | None, count: int) -> tuple[Pictures, list[int]]:
    """Pictures to compare on and the numbers of up to `count` of them, evenly spread; those that ship if none are given.

    Raises:
        UserError: nothing is there.
    """
    pictures: Pictures = open_pictures(data)[0] if data else open_data(EMBEDDED).for_evaluation("test")[1]
    return pictures, np.unique(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(int)).tolist()


def tensors(
    pictures: Pictures, numbers: Sequence[int], preprocessing: Preprocessing, batches: Sequence[int]
) -> Iterator[np.ndarray]:
    """The pictures as [B, 3, height, width] float32, B as `batches` say, the last of which repeats.

    Raises:
        UserError: a picture cannot be read.
    """
    transform = preprocessing.transform()
    start, sizes = 0, list(batches)
    while start < len(numbers):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        try:
            chunk = [transform(pictures.picture(number)) for number in numbers[start : start + size]]
        except BadImage as error:
            raise UserError(f"the pictures to compare on have to be good ones: {error}") from None
        yield torch.stack(chunk).numpy()
        start += size


def compare(
    model: nn.Module,
    run: Runner,
    pictures: Pictures,
    numbers: Sequence[int],
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
        pictures: where pictures come from.
        numbers: which of them.
        preprocessing: of the model.
        batches: batch sizes to try, of which the last repeats.
        sizes: picture sizes to try, (height, width).
        whole: the one batch size that the file takes; a short batch is filled up with zeros.
    """
    same, largest, total = 0, 0.0, 0
    plan = [
        (size, list(numbers) if i == 0 else list(numbers[:: max(1, len(numbers) // 16)]))
        for i, size in enumerate(sizes)
    ]
    with progress("comparing", sum(len(chosen) for _, chosen in plan)) as meter, torch.inference_mode():
        for size, chosen in plan:
            for batch in tensors(pictures, chosen, preprocessing.at(size), batches):
                expected = model(torch.from_numpy(batch)).numpy()
                fill = np.zeros((max(0, (whole or 0) - len(batch)), *batch.shape[1:]), np.float32)
                found = run(np.concatenate([batch, fill]))[: len(batch)]
                difference = np.abs(expected - found).max(initial=0.0)
                largest = max(largest, float("inf") if np.isnan(difference) else float(difference))
                same += int((expected.argmax(1) == found.argmax(1)).sum())
                total += len(batch)
                meter.advance(len(batch))
    return Agreement(total, same, largest, tuple(sizes))
