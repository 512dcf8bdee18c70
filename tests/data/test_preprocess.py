import itertools
import pickle
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dynamixer
from dynamixer.data import Preprocessing
from dynamixer.data.preprocess import Augmentation

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_a_model_says_how_it_wants_its_pictures():
    p = Preprocessing.of(timm.create_model("dynamixer_s", device="meta"))
    assert (p.size, p.crop_pct, p.interpolation) == ((224, 224), 0.9, "bicubic")
    assert Preprocessing.from_dict(p.to_dict()) == p


def test_evaluation_is_timms_transform():
    p = Preprocessing.of(timm.create_model("dynamixer_s", device="meta")).at(48)
    config = timm.data.resolve_data_config(
        {"input_size": (3, 48, 48)}, model=timm.create_model("dynamixer_s", device="meta")
    )
    expected = timm.data.create_transform(**config)(PICTURE)
    assert torch.equal(p(PICTURE), expected)
    assert p.at((32, 64))(PICTURE).shape == (3, 32, 64)


@pytest.mark.parametrize("crop", ["rrc", "pad", "none"])
def test_training_pictures_have_the_size_asked_for_and_are_normalised(crop):
    p = Preprocessing.of(timm.create_model("dynamixer_nano", device="meta"))
    transform = Augmentation(crop=crop, hflip=0).transform(p, (40, 24))
    torch.manual_seed(0)
    first, second = transform(PICTURE), transform(PICTURE)
    assert first.shape == (3, 40, 24)
    assert abs(float(first.mean())) < 1
    assert torch.equal(first, second) == (crop == "none")


def test_erasing_and_policies_are_timms():
    p = Preprocessing.of(timm.create_model("dynamixer_nano", device="meta"))
    names = [
        type(t).__name__
        for t in Augmentation(random_erasing=0.5, auto_augment="rand-m9").transform(p, (32, 32)).transforms
    ]
    assert "RandomErasing" in names
    assert "RandAugment" in names


def test_an_unknown_crop_is_refused():
    with pytest.raises(dynamixer.UserError, match="rrc, pad, none"):
        Augmentation(crop="center")


@pytest.mark.parametrize("crop", ["rrc", "pad", "none"])
def test_augmentation_travels_to_workers_of_any_kind(crop):
    transform = Augmentation(crop=crop).transform(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3), (16, 16))
    again = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(0), random.seed(0)
    expected = transform(PICTURE)
    torch.manual_seed(0), random.seed(0)
    assert torch.equal(again(PICTURE), expected)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "augmix-m3-w3", "v0"])
def test_no_policy_of_timm_asks_pillow_for_what_it_refuses(policy):
    transform = Augmentation(auto_augment=policy).transform(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3), (16, 16))
    steps = [
        s for p in transform.transforms for s in [*getattr(p, "ops", []), *itertools.chain(*getattr(p, "policy", []))]
    ]
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    posterizing = [step for step in steps if "osterize" in step.aug_fn.__name__]
    assert posterizing
    for step in posterizing:
        assert max(step.aug_fn(picture, 0).getpixel((0, 0))) == 128  # the highest bit is kept
        assert step.aug_fn(picture, 8) == picture
