"""Order and augmentation as functions of (seed, epoch, index) alone, whatever the number of workers or processes."""

import hashlib
import json
import mmap
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynamixer.data.decode import BadImage
from dynamixer.data.preprocess import Augmentation, Preprocessing
from dynamixer.data.sources import Source
from dynamixer.data.workers import end_with_parent, from_workers, started, worker_signals
from dynamixer.progress import progress

KEEP_BYTES = 2**30  # pictures that take less than this as pixels are decoded once and kept


class Key(NamedTuple):
    """Which picture, in which epoch, at which size in pixels, which of its repeats: what a sample depends on besides the seed."""

    epoch: int
    picture: int
    size: tuple[int, int]
    copy: int = 0


class Batch(NamedTuple):
    """Pictures [B, 3, height, width], their labels [B], and a sentence for each picture that could not be read."""

    pictures: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()


def holdout(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pictures to train on and of those held out: `share` of each class (at least one of two), by seed."""
    generator = np.random.default_rng([seed, 0x401D])
    held = [
        generator.permutation(members)[: max(round(share * len(members)), int(share > 0 and len(members) > 1))]
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    out = np.sort(np.concatenate(held)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels)), out), out


def digest_of(*parts: tuple[Source | None, np.ndarray | None]) -> str:
    """Of classes, labels, names and which pictures of each source are meant; the first source has the classes."""
    first = parts[0][0]
    assert first is not None, "there are pictures"
    digest = hashlib.sha256(json.dumps(first.classes).encode())
    for source, indices in parts:
        if source is not None and indices is not None:
            some = np.linspace(0, len(source) - 1, min(len(source), 10_000)).astype(int)
            digest.update("\n".join(Path(source.title(int(i))).name for i in some).encode())
            digest.update(source.labels.tobytes() + np.asarray(indices, np.int64).tobytes())
    return digest.hexdigest()


def held_out_of(source: Source, trained: Mapping[str, Any]) -> np.ndarray | None:
    """Numbers of the pictures held out of a training, if it is these pictures that a model was `trained` on; else None."""
    split = trained.get("train_split")
    if not isinstance(split, dict) or split.get("digest") != digest_of((source, np.arange(len(source)))):
        return None
    share = split.get("holdout")
    return holdout(source.labels, share)[1] if isinstance(share, int | float) and 0 <= share < 1 else None


class EpochKeys(Sequence[list[Key]]):
    """The batches of one training epoch: pictures shuffled, one size drawn for each batch, a last short batch dropped.

    With `repeats` each picture comes that many times in a row, each time augmented differently, and an epoch has
    that many times fewer different pictures (repeated augmentation, Hoffer et al. 2020, arXiv 1901.09335).
    """

    def __init__(
        self,
        indices: np.ndarray,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        sizes: Sequence[tuple[int, int]],
        repeats: int = 1,
    ):
        generator = np.random.default_rng([seed, epoch, 0x0BDE])
        order = generator.permutation(indices)
        self.order = np.repeat(order, repeats)[: len(order)] if repeats > 1 else order
        self.epoch, self.batch_size, self.sizes, self.repeats = epoch, batch_size, sizes, repeats
        self.batches = max(1, len(order) // batch_size)
        self.drawn = generator.integers(len(sizes), size=self.batches)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        if not 0 <= number < self.batches:
            raise IndexError(number)
        start = number * self.batch_size
        size = self.sizes[self.drawn[number]]
        pictures = self.order[start : start + self.batch_size]
        return [Key(self.epoch, int(i), size, (start + j) % self.repeats) for j, i in enumerate(pictures)]


class RunKeys:
    """The slices of every step of a run from step `first` on: what a DataLoader iterates over.

    A step's batch is cut into `slices` equal parts; `mine` are those of this process, in their order.
    """

    def __init__(
        self, epoch_keys: Callable[[int], EpochKeys], *, steps: int, epochs: int, first: int, slices: int, mine: range
    ):
        self.epoch_keys, self.steps, self.epochs, self.first = epoch_keys, steps, epochs, first
        self.slices, self.mine = slices, mine

    def __len__(self) -> int:
        return (self.epochs * self.steps - self.first) * len(self.mine)

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self.first // self.steps, self.epochs):
            batches = self.epoch_keys(epoch)
            for number in range(max(0, self.first - epoch * self.steps), self.steps):
                keys = batches[number]
                length = max(1, len(keys) // self.slices)
                for part in self.mine:
                    yield keys[part * length : (part + 1) * length]


@contextmanager
def random_state(*entropy: int, numpy: bool = True, device: torch.device | None = None) -> Iterator[None]:
    """Python's, torch's and (slow: 0.1 ms) NumPy's global random state seeded from numbers, and put back afterwards.

    The generator of an accelerator named by `device` is seeded too, and not put back: that costs more than a step may.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state() if numpy else None
    words = np.random.SeedSequence(entropy).generate_state(2)
    random.seed(int(words[0]))
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(int(words[0]) << 32 | int(words[1]))
    if numpy:
        np.random.seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)


class TrainingPictures(Dataset[Batch]):
    """Augmented pictures of a source by lists of keys.

    Where a picture's augmentation starts with a resize to the one training size and goes on with crops and flips only, the
    resized pixels are kept and a whole batch is cropped, flipped and normalised at once; else timm's transforms
    work picture by picture. Which of the two is a function of the configuration and the number of pictures.

    Args:
        source: where pictures come from.
        preprocessing: normalisation and interpolation.
        augmentation: what is done to a picture.
        seed: of the augmentation.
        sizes: all sizes that keys can ask for.
        skip_bad: fill the place of a picture that cannot be read with others of its batch, in place of raising.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        *,
        sizes: Sequence[tuple[int, int]],
        skip_bad: bool = False,
    ):
        source.prepare()
        self.source, self.preprocessing, self.augmentation, self.seed = source, preprocessing, augmentation, seed
        self.skip_bad = skip_bad
        self.transforms = {size: augmentation.transform(preprocessing, size) for size in {*sizes}}
        height, width = sizes[0]
        small = len({*sizes}) == 1 and len(source) * height * width * 3 <= KEEP_BYTES
        self.kept = _Kept(len(source), sizes[0]) if small and augmentation.whole_batch else None

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The batch of these keys. Raises BadImage with the picture's name."""
        read, bad = {}, []
        for place, key in enumerate(keys):
            try:
                read[place] = self._picture(key)
            except BadImage as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        if not read:
            raise BadImage(f"none of the {len(keys)} pictures of a batch can be read, the first because {bad[0]}")
        good = list(read)
        filled = [place if place in read else good[i % len(good)] for i, place in enumerate(range(len(keys)))]
        keys = [keys[place] for place in filled]
        labels = torch.from_numpy(self.source.labels[[key.picture for key in keys]])
        pictures = [read[place] for place in filled]
        if self.kept is not None:
            return Batch(self._augment(np.stack(pictures), keys), labels, tuple(bad))
        return Batch(torch.stack(pictures), labels, tuple(bad))

    def _picture(self, key: Key):  # type: ignore[no-untyped-def] # pixels where they are kept, else the augmented tensor
        height, width = key.size
        if self.kept is not None:
            if not self.kept.there[key.picture]:
                picture = self.source.picture(key.picture, (2 * height, 2 * width))
                self.kept.put(key.picture, np.asarray(self.augmentation.resized(picture, self.preprocessing, key.size)))
            return self.kept.pixels[key.picture]
        picture = self.source.picture(key.picture, (2 * height, 2 * width))
        # Of timm's transforms only the policies of auto_augment draw from NumPy.
        numpy = self.augmentation.auto_augment is not None
        with random_state(self.seed, key.epoch, key.picture, key.copy, numpy=numpy):
            return self.transforms[key.size](picture)

    def _augment(self, pixels: np.ndarray, keys: list[Key]) -> Tensor:
        """Pixels [B, height, width, 3] uint8 -> cropped, flipped, normalised [B, 3, height, width]."""
        draws = uniform(self.seed, [(key.epoch, key.picture, key.copy) for key in keys], 3)
        if self.augmentation.crop == "pad":
            count, height, width, _ = pixels.shape
            border = max(height, width) // 8
            padded = np.zeros((count, height + 2 * border, width + 2 * border, 3), np.uint8)
            padded[:, border : border + height, border : border + width] = pixels
            corners = np.floor(draws[:, :2] * (2 * border + 1)).astype(int)
            pixels = np.stack(
                [padded[i, top : top + height, left : left + width] for i, (top, left) in enumerate(corners)]
            )
        for i in np.flatnonzero(draws[:, 2] < self.augmentation.hflip):
            pixels[i] = pixels[i, :, ::-1]
        mean, std = (255 * torch.tensor(v)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().sub_(mean).div_(std)


class _Kept:
    """Pixels that every worker forked later sees, whoever decoded them."""

    def __init__(self, count: int, size: tuple[int, int]):
        shape = (count, *size, 3)
        self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self.there = np.frombuffer(mmap.mmap(-1, count), np.uint8)

    def put(self, number: int, pixels: np.ndarray) -> None:
        self.pixels[number] = pixels
        self.there[number] = 1

    def __reduce__(self) -> tuple[type, tuple[int, tuple[int, ...]]]:
        return _Kept, (len(self.there), self.pixels.shape[1:3])  # a spawned worker keeps pictures of its own


def uniform(seed: int, counters: Sequence[tuple[int, ...]], count: int) -> np.ndarray:
    """Numbers in [0, 1), [len(counters), count], each row a function of seed and its counter alone (splitmix64 rounds)."""
    with np.errstate(over="ignore"):
        state = np.full(len(counters), seed, np.uint64)
        for column in np.asarray(counters, np.uint64).reshape(len(counters), -1).T:
            state = _mixed(state ^ column)
        states = _mixed(state[:, None] + np.arange(1, count + 1, dtype=np.uint64))
    return (states >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class EvaluationPictures(Dataset[Batch]):
    """The pictures of a source, or those with the given numbers, as evaluation reads them: every one, or an error."""

    def __init__(self, source: Source, preprocessing: Preprocessing, indices: np.ndarray | None = None):
        source.prepare()
        self.source, self.transform = source, preprocessing.transform()
        self.indices = np.arange(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in `indices`. Raises BadImage with the picture's name."""
        numbers = [int(self.indices[position]) for position in positions]
        pictures = [self.transform(self.source.picture(number)) for number in numbers]
        return Batch(torch.stack(pictures), torch.from_numpy(self.source.labels[numbers]))


def readable(source: Source, indices: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Those of `indices` whose pictures can be read, and a sentence for each other one."""
    good, bad = [], []
    with progress("looking for bad pictures", len(indices)) as meter:
        for number in indices:
            try:
                source.picture(int(number))
            except BadImage as error:
                bad.append(str(error))
            else:
                good.append(number)
            meter.advance(1)
    return np.array(good, dtype=np.int64), bad


def batches(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches; what a worker fails by, such as a bad picture, is reported as in the main process."""
    with from_workers():
        for pictures, labels, bad in started(loader):
            yield Batch(pictures, labels, tuple(bad))


def training_loader(pictures: TrainingPictures, keys: RunKeys | Sequence[list[Key]], workers: int) -> DataLoader[Batch]:
    """The batches in their order; one loader, and one set of workers, for a whole run."""
    return DataLoader(
        pictures, batch_sampler=keys, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=worker_signals
    )


def evaluation_loader(
    pictures: EvaluationPictures, batch_size: int, workers: int, *, patient: bool = False
) -> DataLoader[Batch]:
    """All pictures in their order; workers stay for the next pass, and `patient` ones outlive a signal for a while."""
    return DataLoader(
        pictures,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=worker_signals if patient else end_with_parent,
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
