"""Order and augmentation as functions of (seed, epoch, index) alone, whatever the number of workers."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynamixer.data.decode import BadImage
from dynamixer.data.preprocess import Augmentation, Preprocessing, collate
from dynamixer.data.sources import Source


class Key(NamedTuple):
    """Which picture, in which epoch, at which size in pixels: all that a training sample depends on besides the seed."""

    epoch: int
    picture: int
    size: tuple[int, int]


def holdout(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pictures to train on and of those held out: `share` of each class (at least one of two), by seed."""
    generator = np.random.default_rng([seed, 0x401D])
    held = [
        generator.permutation(members)[: max(round(share * len(members)), int(share > 0 and len(members) > 1))]
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    out = np.sort(np.concatenate(held)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels)), out), out


def epoch_keys(
    indices: np.ndarray, *, seed: int, epoch: int, batch_size: int, sizes: Sequence[tuple[int, int]]
) -> list[list[Key]]:
    """The batches of one training epoch: pictures shuffled, one size drawn for each batch, a last short batch dropped."""
    generator = np.random.default_rng([seed, epoch, 0x0BDE])
    order = generator.permutation(indices)
    count = max(1, len(order) // batch_size)
    drawn = generator.integers(len(sizes), size=count)
    return [
        [Key(epoch, int(i), sizes[drawn[b]]) for i in order[b * batch_size : (b + 1) * batch_size]]
        for b in range(count)
    ]


@contextmanager
def random_state(*entropy: int, numpy: bool = True) -> Iterator[None]:
    """Python's, torch's and (slow: 0.1 ms) NumPy's global random state seeded from numbers, and put back afterwards."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state() if numpy else None
    words = np.random.SeedSequence(entropy).generate_state(2)
    random.seed(int(words[0]))
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))  # not the accelerators': those cost more
    if numpy:
        np.random.seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)


class TrainingPictures(Dataset[tuple[Tensor, int]]):
    """Augmented pictures of a source by Key."""

    def __init__(self, source: Source, preprocessing: Preprocessing, augmentation: Augmentation, seed: int):
        self.source, self.preprocessing, self.augmentation, self.seed = source, preprocessing, augmentation, seed
        self.transforms = {preprocessing.size: augmentation.transform(preprocessing, preprocessing.size)}

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        if key.size not in self.transforms:
            self.transforms[key.size] = self.augmentation.transform(self.preprocessing, key.size)
        picture = self.source.picture(key.picture)
        # Of timm's transforms only the policies of auto_augment draw from NumPy.
        with random_state(self.seed, key.epoch, key.picture, numpy=self.augmentation.auto_augment is not None):
            return self.transforms[key.size](picture), int(self.source.labels[key.picture])


class EvaluationPictures(Dataset[tuple[Tensor, int]]):
    """The pictures of a source, or those with the given numbers, as evaluation reads them."""

    def __init__(self, source: Source, preprocessing: Preprocessing, indices: np.ndarray | None = None):
        self.source, self.transform = source, preprocessing.transform()
        self.indices = np.arange(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = int(self.indices[position])
        return self.transform(self.source.picture(index)), int(self.source.labels[index])


def batches(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and labels of each batch; a bad picture found by a worker is reported as in the main process."""
    try:
        for batch, labels in loader:
            yield batch, torch.as_tensor(labels)
    except BadImage as error:  # a worker's error comes back as its traceback, with the sentence at the end
        raise BadImage(str(error).rstrip().split("BadImage: ")[-1]) from None


def training_loader(
    pictures: TrainingPictures, batches: list[list[Key]], workers: int
) -> DataLoader[tuple[Tensor, int]]:
    """The batches in their order."""
    return DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=collate)


def evaluation_loader(pictures: EvaluationPictures, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """All pictures in their order."""
    return DataLoader(pictures, batch_size=batch_size, num_workers=workers, collate_fn=collate)
