import random

import numpy as np
import pytest
import timm
import torch

from dynamixer.data import Preprocessing, open_data
from dynamixer.data.loading import (
    EvaluationPictures,
    Key,
    TrainingPictures,
    epoch_keys,
    evaluation_loader,
    holdout,
    random_state,
    training_loader,
)
from dynamixer.data.preprocess import Augmentation

LABELS = np.repeat(np.arange(3), (50, 30, 20))
SIZES = [(16, 16), (24, 24)]


def pictures(auto_augment=None, seed=0):
    source = open_data("fashion-mnist-mini").train
    pre = Preprocessing.of(timm.create_model("dynamixer_nano", device="meta"))
    return TrainingPictures(source, pre, Augmentation(auto_augment=auto_augment, random_erasing=0.5), seed)


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
        return [[key.picture for key in batch] for batch in epoch_keys(np.arange(100), **options)]

    assert sorted(i for batch in order() for i in batch) == list(range(100))
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    assert [len(batch) for batch in order(batch_size=30)] == [30, 30, 30]
    assert [len(batch) for batch in order(batch_size=300)] == [100]


def test_one_size_is_drawn_for_each_batch():
    batches = epoch_keys(np.arange(400), seed=0, epoch=0, batch_size=10, sizes=SIZES)
    sizes = [{key.size for key in batch} for batch in batches]
    assert all(len(s) == 1 for s in sizes)
    assert {next(iter(s)) for s in sizes} == set(SIZES)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1"])
def test_batches_are_the_same_for_any_number_of_workers(auto_augment):
    batches = epoch_keys(np.arange(60), seed=3, epoch=2, batch_size=8, sizes=SIZES)
    runs = [list(training_loader(pictures(auto_augment), batches, workers)) for workers in (0, 1, 2)]
    for other in runs[1:]:
        for (a, la), (b, lb) in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(la, lb)
    assert {tuple(a.shape[2:]) for a, _ in runs[0]} == set(SIZES)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    key = Key(0, 5, (32, 32))
    first = pictures()[key][0]
    pictures()[Key(0, 6, (32, 32))]
    assert torch.equal(pictures()[key][0], first)
    assert not torch.equal(pictures()[key._replace(epoch=1)][0], first)
    assert not torch.equal(pictures(seed=1)[key][0], first)


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
    pre = Preprocessing.of(timm.create_model("dynamixer_nano", device="meta"))
    chosen = EvaluationPictures(source, pre, np.array([5, 3, 200]))
    (batch, labels), (last, _) = evaluation_loader(chosen, 2, 0)
    assert torch.equal(batch[1], pre(source.picture(3)))
    assert torch.equal(last[0], pre(source.picture(200)))
    assert labels.tolist() == source.labels[[5, 3]].tolist()
    assert len(EvaluationPictures(source, pre)) == 2000
