"""Short real runs on the embedded pictures."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dynamixer
from dynamixer import RunError, TrainConfig, UserError
from dynamixer.training import engine

TINY = {"model_args": {"patch_size": 8, "depths": (1, 1), "dims": (16, 32), "segments": (2, 4)}, "lr": 5e-3}


def config(**change):
    options = {"epochs": 2, "limit_train": 256, "batch_size": 64, "crop": "none", "device": "cpu", **TINY} | change
    return TrainConfig(**options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("engine") / "run"
    return dynamixer.train(config(), out)


def test_the_run_folder_has_all_that_is_promised(run):
    names = {p.name for p in run.run.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.csv", "timing.csv", "curves.png", "confusion.png",
        "best.safetensors", "last.safetensors",
    }  # fmt: skip
    written = yaml.safe_load((run.run / "config.yaml").read_text())
    assert (written["epochs"], written["model_args"]["patch_size"]) == (2, 8)
    assert json.loads((run.run / "environment.json").read_text())["torch"] == torch.__version__
    rows = list(csv.DictReader((run.run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"]) < 2.5
    best = max(rows, key=lambda row: float(row["val_top1"]))
    assert run.top1 == float(best["val_top1"])
    assert run.top1 > 15  # chance is 10
    for name in ("curves.png", "confusion.png"):
        assert np.asarray(Image.open(run.run / name).convert("L")).std() > 10  # something is drawn


def test_a_checkpoint_is_all_that_evaluation_needs(run):
    loaded = dynamixer.load(run.run)
    assert loaded.path.name == "best.safetensors"
    assert loaded.classes[9] == "ankle boot"
    assert loaded.trained["epoch"] == run.best_epoch
    result = dynamixer.evaluate(run.run, "fashion-mnist-mini", split="test", device="cpu")
    assert result["images"] == 2000
    assert abs(result["top1"] - run.top1) < 10
    assert result["top5"] > result["top1"]


def test_the_same_configuration_gives_the_same_weights_whatever_the_workers(run, tmp_path):
    again = dynamixer.train(config(workers=2), tmp_path / "again")
    a, b = (dynamixer.load(r.run / "last.safetensors").model.state_dict() for r in (run, again))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (run.run / "metrics.csv").read_bytes() == (again.run / "metrics.csv").read_bytes()
    other = dynamixer.train(config(seed=1, epochs=1), tmp_path / "other")
    assert not torch.equal(
        a["head.weight"], dynamixer.load(other.run / "last.safetensors").model.state_dict()["head.weight"]
    )


def test_mixed_sizes_and_options_train(tmp_path):
    options = {"model_args": TINY["model_args"] | {"softmax": False}, "size": 24, "sizes": (16, 24, 40), "epochs": 1}
    result = dynamixer.train(config(**options, holdout=0.0, precision="bf16", drop_path=0.1), tmp_path / "run")
    assert result.top1 is None
    loaded = dynamixer.load(tmp_path / "run")
    assert loaded.preprocessing.size == (24, 24)
    assert loaded.args["softmax"] is False
    sizes = [dynamixer.evaluate(tmp_path / "run", "fashion-mnist-mini", size=s, device="cpu")["size"] for s in (24, 40)]
    assert sizes == [[24, 24], [40, 40]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": "nowhere"}, "no file or folder nowhere"),
        ({"model": "dynamixer_nan"}, "did you mean 'dynamixer_nano'"),
        ({"model": "resnet5"}, "unknown model 'resnet5': did you mean"),
        ({"model_args": {"sofmax": False}}, "no option 'sofmax'; did you mean 'softmax'"),
        ({"model_args": {"generator": "statc"}}, "did you mean 'static'"),
        ({"model_args": {"depths": 3}}, "cannot be built"),
        ({"opt": "adamwow"}, "not an optimiser of timm"),
        ({"holdout": 0.9999, "limit_train": None}, "leaves no training pictures"),
        ({"auto_augment": "randd"}, "auto_augment=randd"),
        ({"model_args": {"num_classes": 5}}, "the data says how many classes"),
        ({"model_args": {"img_size": 64}}, "size=... does that"),
        ({"model_args": {"softmax": "maybe"}}, "softmax='maybe' has to be true or false"),
        ({"model_args": {"reduced": 0}}, "are 1 or more"),
        ({"model_args": {"patch_size": 0}}, "are 1 or more"),
        ({"model_args": {"global_pool": "foo"}}, "cannot be built"),
        ({"model": "test_vit", "model_args": {}, "size": 50}, "does not take pictures of 50x50|cannot be built"),
        ({"seed": 2**64}, "below 2"),
        ({"lr": float("inf")}, "finite"),
        ({"clip_grad": 0.0}, "clip_grad=0.0 has to be above 0"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        dynamixer.train(config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_stops_the_run_with_its_name_and_leaves_nothing(tmp_path, workers):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (20, 20), (i * 20, 9, 9)).save(tmp_path / name / f"{i}.png")
    for i in range(4):
        (tmp_path / "dog" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        dynamixer.train(config(data=str(tmp_path), limit_train=None, batch_size=2, workers=workers), tmp_path / "run")
    assert re.fullmatch(r"\S+/dog/\d.png is not a picture of a known format \(.*\)\.", str(caught.value))
    assert not (tmp_path / "run").exists()


def test_models_of_timm_train_at_their_own_or_another_size(tmp_path):
    result = dynamixer.train(config(model="test_resnet", model_args={}, size=32, epochs=1), tmp_path / "run")
    assert dynamixer.load(result.run).preprocessing.size == (32, 32)


def test_a_run_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        dynamixer.train(config(), tmp_path)
    with pytest.raises(UserError, match="not an empty folder"):
        dynamixer.train(config(), tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_stops_the_run_with_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"the loss became nan in epoch 1, step \d"):
        dynamixer.train(config(lr=1e30, clip_grad=None, warmup_epochs=0.0), tmp_path / "run")


def test_a_failed_save_keeps_the_epochs_before(tmp_path, monkeypatch):
    real, calls = engine.save_checkpoint, []

    def save(*args, **options):
        calls.append(args)
        if len(calls) > 2:
            raise RunError("there is no space left on the disk")
        real(*args, **options)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    with pytest.raises(RunError, match="no space left"):
        dynamixer.train(config(), tmp_path / "run")
    assert dynamixer.load(tmp_path / "run").trained["epoch"] == 1
