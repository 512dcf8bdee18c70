import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dynamixer import RunError
from dynamixer.data import Preprocessing, open_data
from dynamixer.data.decode import BadImage
from dynamixer.data.loading import (
    EpochKeys,
    EvaluationPictures,
    Key,
    RunKeys,
    TrainingPictures,
    evaluation_loader,
    holdout,
    random_state,
    readable,
    training_loader,
    uniform,
)
from dynamixer.data.loading import (
    batches as loaded,
)
from dynamixer.data.preprocess import Augmentation

# torch warns where a machine has fewer cores than workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
LABELS = np.repeat(np.arange(3), (50, 30, 20))
SIZES = [(16, 16), (24, 24)]


NANO = Preprocessing.of(timm.create_model("dynamixer_nano", device="meta"))


def pictures(auto_augment=None, seed=0):
    augmentation = Augmentation(auto_augment=auto_augment, random_erasing=0.5)
    return TrainingPictures(open_data("fashion-mnist-mini").train, NANO, augmentation, seed, sizes=[*SIZES, (32, 32)])


def test_a_failure_of_the_machine_in_a_worker_is_one_sentence(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    loader = evaluation_loader(EvaluationPictures(open_data(tmp_path).train, NANO), 2, workers=1)

    def away(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(RunError) as failed:
        list(loaded(loader))
    assert str(failed.value).endswith(
        f"{tmp_path / 'cat' / '0.png'} cannot be read: {os.strerror(errno.EIO)}; start again, without it if it is the file."
    )
    assert "Traceback" not in str(failed.value)


def test_the_held_out_pictures_are_a_share_of_each_class_and_always_the_same():
    train, held = holdout(LABELS, 0.2)
    assert np.bincount(LABELS[held]).tolist() == [10, 6, 4]
    assert sorted([*train, *held]) == list(range(100))
    assert holdout(LABELS, 0.2)[1].tolist() == held.tolist()
    assert len(holdout(np.array([0, 0, 0, 1, 1, 2]), 0.1)[1]) == 2  # one of each class that can spare it
    assert len(holdout(LABELS, 0)[1]) == 0
    assert holdout(LABELS, 0.2, seed=1)[1].tolist() != held.tolist()


def test_an_epoch_has_every_picture_once_in_an_order_of_its_own():
    def order(**change):
        options = {"seed": 0, "epoch": 0, "batch_size": 10, "sizes": SIZES} | change
        return [[key.picture for key in batch] for batch in EpochKeys(np.arange(100), **options)]

    assert sorted(i for batch in order() for i in batch) == list(range(100))
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    assert [len(batch) for batch in order(batch_size=30)] == [30, 30, 30]
    assert [len(batch) for batch in order(batch_size=300)] == [100]


def test_one_size_is_drawn_for_each_batch():
    batches = EpochKeys(np.arange(400), seed=0, epoch=0, batch_size=10, sizes=SIZES)
    sizes = [{key.size for key in batch} for batch in batches]
    assert all(len(s) == 1 for s in sizes)
    assert {next(iter(s)) for s in sizes} == set(SIZES)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1"])
def test_batches_are_the_same_for_any_number_of_workers(auto_augment):
    batches = EpochKeys(np.arange(60), seed=3, epoch=2, batch_size=8, sizes=SIZES)
    runs = [list(training_loader(pictures(auto_augment), list(batches), workers)) for workers in (0, 1, 2, 4)]
    for other in runs[1:]:
        same(runs[0], other)
    assert {tuple(batch.pictures.shape[2:]) for batch in runs[0]} == set(SIZES)


def same(some, others):
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a.pictures, b.pictures)
        assert torch.equal(a.labels, b.labels)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    key = Key(0, 5, (32, 32))

    def read(*keys, seed=0):
        return pictures(seed=seed).__getitems__(list(keys)).pictures

    first = read(key)[0]
    assert torch.equal(read(Key(0, 6, (32, 32)), key)[1], first)
    assert not torch.equal(read(key._replace(epoch=1))[0], first)
    assert not torch.equal(read(key._replace(copy=1))[0], first)
    assert not torch.equal(read(key, seed=1)[0], first)


def small(crop="pad", seed=0, **options):
    source = open_data("fashion-mnist-mini").train
    return TrainingPictures(source, NANO, Augmentation(crop=crop, **options), seed, sizes=[(24, 24)])


def test_small_pictures_are_kept_and_augmented_as_batches_the_same_for_any_number_of_workers():
    keys = [[Key(e, i, (24, 24)) for i in range(first, first + 8)] for e in (0, 1) for first in (0, 8)]
    runs = [list(training_loader(small(), keys, workers)) for workers in (0, 2)]
    same(*runs)
    assert not torch.equal(runs[0][0].pictures, runs[0][2].pictures)  # another epoch
    chosen = small().__getitems__([keys[0][3]])
    assert torch.equal(chosen.pictures[0], runs[0][0].pictures[3])  # whoever else is in the batch


def test_a_whole_batch_is_cropped_flipped_and_normalised_as_timm_does_it():
    key = Key(0, 5, (24, 24))
    plain = small("none", hflip=0.0)
    expected = NANO.at(24).transform()(plain.source.picture(5).resize((24, 24), 3))
    assert (plain.__getitems__([key]).pictures[0] - expected).abs().max() < 1e-5
    assert torch.equal(
        small("none", hflip=1.0).__getitems__([key]).pictures[0], plain.__getitems__([key]).pictures[0].flip(2)
    )
    black = plain.__getitems__([key]).pictures.new_tensor([-m / s for m, s in zip(NANO.mean, NANO.std, strict=True)])
    bordered = torch.nn.functional.pad(plain.__getitems__([key]).pictures[0], (3, 3, 3, 3), value=float("nan"))
    bordered = torch.where(bordered.isnan(), black[:, None, None], bordered)
    crops = bordered.unfold(1, 24, 1).unfold(2, 24, 1).flatten(1, 2).permute(1, 0, 2, 3)
    for epoch in range(8):
        got = small("pad", hflip=0.0).__getitems__([key._replace(epoch=epoch)]).pictures[0]
        assert (crops - got).abs().amax((1, 2, 3)).min() < 1e-5


def test_uniform_numbers_are_uniform_and_depend_on_every_counter():
    draws = uniform(0, [(e, i, 0) for e in range(20) for i in range(500)], 3)
    assert draws.shape == (10_000, 3)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert abs(counts - 3000).max() < 300  # five standard deviations are 260
    assert abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.05
    assert len(np.unique(draws)) == draws.size
    assert uniform(0, [(1, 2, 3)], 2).tolist() == uniform(0, [(9, 9, 9), (1, 2, 3)], 2)[1:].tolist()
    assert uniform(0, [(1, 2, 3)], 2).tolist() != uniform(1, [(1, 2, 3)], 2).tolist()


def run_keys(first=0, slices=1, mine=range(1), **options):
    settings = {"seed": 0, "batch_size": 8, "sizes": [(24, 24)]} | options
    return RunKeys(
        lambda epoch: EpochKeys(np.arange(40), epoch=epoch, **settings),
        steps=5, epochs=3, first=first, slices=slices, mine=mine,
    )  # fmt: skip


def test_a_run_starts_at_any_step_with_what_would_have_come():
    every = list(run_keys())
    assert len(every) == len(run_keys()) == 15
    for first in (0, 1, 4, 5, 9, 14, 15):
        assert list(run_keys(first)) == every[first:]
        assert len(run_keys(first)) == 15 - first


def test_starting_late_looks_at_no_earlier_epoch():
    asked = []

    def keys(epoch):
        asked.append(epoch)
        return EpochKeys(np.arange(40), seed=0, epoch=epoch, batch_size=8, sizes=[(24, 24)])

    late = RunKeys(keys, steps=5, epochs=4000, first=10_000, slices=1, mine=range(1))
    assert next(iter(late)) == EpochKeys(np.arange(40), seed=0, epoch=2000, batch_size=8, sizes=[(24, 24)])[0]
    assert asked == [2000]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_processes_share_every_step_in_the_same_order(processes, accumulate):
    slices = processes * accumulate
    mine = [list(run_keys(0, slices, range(rank, slices, processes))) for rank in range(processes)]
    for step, batch in enumerate(run_keys()):
        parts = [mine[part % processes][step * accumulate + part // processes] for part in range(slices)]
        assert [key for part in parts for key in part] == batch


def test_repeated_augmentation_brings_a_picture_several_times():
    batch = EpochKeys(np.arange(30), seed=0, epoch=0, batch_size=6, sizes=SIZES, repeats=3)[0]
    assert [key.copy for key in batch] == [0, 1, 2, 0, 1, 2]
    assert len({key.picture for key in batch}) == 2
    whole = EpochKeys(np.arange(30), seed=0, epoch=0, batch_size=6, sizes=SIZES, repeats=3)
    assert len({key.picture for batch in whole for key in batch}) == 10


@pytest.fixture
def broken():
    """A source of which picture 3 cannot be read."""
    source = open_data("fashion-mnist-mini").train
    whole = source.encoded
    source.encoded = lambda index: b"oops" if index == 3 else whole(index)
    return source


@pytest.mark.parametrize("crop", ["none", "rrc"])
def test_a_bad_picture_stops_or_is_filled_in_and_named(broken, crop):
    keys = [Key(0, i, (24, 24)) for i in (2, 3, 4)]
    options = {"augmentation": Augmentation(crop=crop), "seed": 0, "sizes": [(24, 24)]}
    with pytest.raises(BadImage, match="row 3 is not a picture"):
        TrainingPictures(broken, NANO, **options).__getitems__(keys)
    pictures = TrainingPictures(broken, NANO, **options, skip_bad=True)
    batch = pictures.__getitems__(keys)
    assert torch.equal(batch.pictures[1], batch.pictures[2])
    assert batch.labels.tolist() == broken.labels[[2, 4, 4]].tolist()
    assert len(batch.bad) == 1
    assert "row 3" in batch.bad[0]
    with pytest.raises(BadImage, match="none of the 2 pictures of a batch can be read"):
        pictures.__getitems__(keys[1:2] * 2)
    assert readable(broken, np.arange(6))[0].tolist() == [0, 1, 2, 4, 5]


def test_the_callers_random_state_is_left_alone():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with random_state(4, 2):
        inside = draws()
    assert draws() == expected
    with random_state(4, 2):
        assert draws() == inside
    with random_state(4, 3):
        assert draws() != inside


def test_evaluation_reads_each_picture_once_in_order():
    source = open_data("fashion-mnist-mini").test
    chosen = EvaluationPictures(source, NANO, np.array([5, 3, 200]))
    first, last = evaluation_loader(chosen, 2, 0)
    assert torch.equal(first.pictures[1], NANO(source.picture(3)))
    assert torch.equal(last.pictures[0], NANO(source.picture(200)))
    assert first.labels.tolist() == source.labels[[5, 3]].tolist()
    assert len(EvaluationPictures(source, NANO)) == 2000
