"""Short real runs on the embedded pictures."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import dynamixer
from dynamixer import RunError, TrainConfig, UserError
from dynamixer.lock import locked, unlock
from dynamixer.training import engine, folder
from dynamixer.training.checkpoint import damage
from poison import Poison

# torch warns where a machine has fewer cores than workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
TINY = {"model_args": {"patch_size": 8, "depths": (1, 1), "dims": (16, 32), "segments": (2, 4)}, "lr": 5e-3}


def whole(path):
    return pq.read_metadata(path).num_rows


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
        "config.yaml", "environment.json", "metrics.csv", "timing.csv", "report.html", "checkpoints", "tensorboard",
        "curves.png", "confusion.png", "confused.png", "confused_pairs.png", "calibration.png",
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
    for path in run.run.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 10  # something is drawn
    report = (run.run / "report.html").read_text()
    assert f"{run.top1:.2f}" in report
    assert report.count("data:image/png;base64,") == 5
    assert 'src="http' not in report


def test_a_checkpoint_is_all_that_evaluation_needs(run):
    loaded = dynamixer.load(run.run)
    assert loaded.path.name == "best.safetensors"
    assert loaded.classes[9] == "ankle boot"
    assert loaded.trained["epoch"] == run.best_epoch
    result = dynamixer.evaluate(run.run, "fashion-mnist-mini", split="test", device="cpu")
    assert result["images"] == 2000
    assert abs(result["top1"] - run.top1) < 10
    assert result["top5"] > result["top1"]


def test_of_the_pictures_of_a_training_those_held_out_are_measured(tmp_path, capsys):
    import dynamixer.data  # noqa: PLC0415

    pictures = tmp_path / "clothes.parquet"
    shutil.copy(Path(dynamixer.data.__file__).parent / "fashion" / "train.parquet", pictures)
    trained = dynamixer.train(config(data=str(pictures), epochs=1, limit_train=None, holdout=0.2), tmp_path / "run")
    result = dynamixer.evaluate(trained.run, pictures, device="cpu")
    assert (result["split"], result["images"]) == ("held-out", round(0.2 * whole(pictures)))
    assert result["top1"] == pytest.approx(trained.top1)
    assert "left out, because the model was trained on them: " in capsys.readouterr().err
    every = dynamixer.evaluate(trained.run, pictures, split="train", device="cpu")
    assert (every["split"], every["images"]) == ("train", whole(pictures))
    assert "the model was trained on " in capsys.readouterr().err


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
        ({"model_args": {"global_pool": "foo"}}, "it is one of"),
        ({"model_args": {"device": "meta"}}, "model.device=meta cannot be set: the weights could not be read again"),
        ({"model": "resnet10t", "model_args": {"features_only": True}}, "model.features_only=True cannot be set"),
        (
            {"model": "resnet10t", "model_args": {"block_args": {"attn_layer": "se"}}},
            "model.block_args=.* cannot be set",
        ),
        ({"color_jitter": 1e300}, "is too strong"),
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
    with pytest.raises(UserError, match="neither a run nor an empty folder"):
        dynamixer.train(config(), tmp_path)
    with pytest.raises(UserError, match="neither a run nor an empty folder"):
        dynamixer.train(config(), tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_configuration_in_the_same_folder_is_refused_with_what_differs(run):
    before = {p: p.stat().st_mtime_ns for p in run.run.rglob("*")}
    with pytest.raises(UserError, match=r"another configuration: epochs \(3 here, 2 there\), seed \(1 here, 0 there\)"):
        dynamixer.train(config(epochs=3, seed=1), run.run)
    with pytest.raises(UserError, match="--resume never forbids"):
        dynamixer.train(config(), run.run, resume="never")
    again = dynamixer.train(config(workers=1, checkpoint_every=5, track="none"), run.run)
    assert (again.top1, again.best_epoch, again.data_wait) == (run.top1, run.best_epoch, None)
    assert {p: p.stat().st_mtime_ns for p in run.run.rglob("*")} == before


def weights_of(path):
    return dynamixer.load(path).model.state_dict()


KINDS = st.tuples(st.sampled_from(["input", "loss", "gradient"]), st.sampled_from(["fp32", "bf16"]), st.integers(1, 2))


@settings(
    max_examples=30 if os.environ.get("DYNAMIXER_PROMISES") == "long" else 4, deadline=None, phases=[Phase.generate]
)
@given(kind=KINDS, steps=st.sets(st.integers(0, 5), max_size=5))
def test_steps_that_are_not_finite_change_nothing_and_are_counted(kind, steps):
    where, precision, accumulate = kind
    options = {"ema": 0.9, "model": "test_resnet", "model_args": {}, "size": 32}  # a model with running means
    options |= {"precision": precision, "accumulate": accumulate, "limit_train": 192, "holdout": 0.0, "track": "none"}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        poison = Poison(patch, steps, where)
        result = dynamixer.train(config(**options), Path(folder, "run"))
        rows = list(csv.DictReader(Path(folder, "run/metrics.csv").read_text().splitlines()))
    assert (result.steps, result.skipped) == (6, len(steps))
    assert poison.changed == [number not in steps for number in range(6)]
    assert [row["skipped"] for row in rows] == [str(len(steps & set(range(3)))), str(len(steps))]
    whole = [not {*range(3 * epoch, 3 * epoch + 3)} <= steps for epoch in range(2)]
    assert [math.isfinite(float(row["train_loss"])) for row in rows] == whole


def test_processes_leave_a_step_out_together(tmp_path):
    """What is not finite on one of two processes only."""
    script = Path(__file__).with_name("poisoned.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one["changed"] == [True, False, False, False, True, True]
    assert one["skipped"] == 3


def test_ten_such_steps_in_a_row_stop_the_run_with_the_last_finite_checkpoint(tmp_path, monkeypatch):
    Poison(monkeypatch, set(range(3, 99)), "loss")
    with pytest.raises(RunError, match=r"10 steps in a row, up to step 13, .* a smaller lr may help"):
        dynamixer.train(config(epochs=9, batch_size=64, limit_train=192, holdout=0.0), tmp_path / "run")
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())
    assert [damage(path) for path in (tmp_path / "run/checkpoints").glob("step-*")] == [None, None]


def test_fp16_looks_for_its_scale_and_counts_that_apart(tmp_path, monkeypatch):
    poison = Poison(monkeypatch, {1, 4}, "gradient")
    result = dynamixer.train(config(precision="fp16", limit_train=192, holdout=0.0), tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").read_text().splitlines()))
    assert [row["scaler_skips"] for row in rows] == ["1", "2"]
    assert (result.skipped, result.steps) == (0, 6)
    assert poison.changed == [True, False, True, True, False, True]


def test_fp16_stops_when_no_scale_helps_and_never_takes_a_step_that_is_not_finite(tmp_path, monkeypatch):
    poison = Poison(monkeypatch, set(range(2, 99)), "gradient")
    with pytest.raises(RunError, match="10 steps in a row"):
        dynamixer.train(
            config(precision="fp16", epochs=15, limit_train=192, holdout=0.0, clip_grad=None), tmp_path / "run"
        )
    assert poison.changed[:3] == [True, True, False]
    assert not any(poison.changed[2:])
    assert 25 < len(poison.changed) < 35  # sixteen halvings of the scale, then ten in a row


def test_pictures_that_changed_since_the_run_was_begun_are_noticed(tmp_path, monkeypatch):
    data = two_classes(tmp_path)
    options = {"data": str(data), "limit_train": None, "batch_size": 4, "epochs": 2}
    dynamixer.train(config(**options), tmp_path / "run")
    (data / "cat/3.png").rename(data / "cat/33.png")
    with pytest.raises(UserError, match=r"does not hold the pictures that .* was begun with"):
        dynamixer.train(config(**options), tmp_path / "run")
    (data / "cat/33.png").rename(data / "cat/3.png")
    assert dynamixer.train(config(**options), tmp_path / "run").data_wait is None
    (data / "cat/3.png").unlink()
    with pytest.raises(UserError, match="does not hold the pictures"):
        dynamixer.train(config(**options), tmp_path / "run")


def test_what_a_kill_left_half_written_is_no_run_and_is_cleared_away(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.yaml.abcdefgh.yaml").write_text("epo")
    dynamixer.train(config(epochs=1), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_made_is_found_before_the_data_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no run folder can be made at /proc/run: .*; give another --out"):
        dynamixer.train(config(data="nowhere"), "/proc/run")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for out, sentence in (
        ("file/run", "Not a directory"),
        ("link", "a link that leads nowhere"),
        ("link/run", "No such"),
    ):
        with pytest.raises(UserError, match=sentence):
            dynamixer.train(config(data="nowhere"), tmp_path / out)


def test_if_no_held_out_picture_can_be_read_nothing_is_trained(tmp_path):
    data = two_classes(tmp_path)
    shutil.copytree(data, tmp_path / "both/train")
    shutil.copytree(data, tmp_path / "both/val")
    for path in (tmp_path / "both/val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the pictures held out of"):
        dynamixer.train(
            config(data=str(tmp_path / "both"), limit_train=None, batch_size=4, on_bad_image="skip"), tmp_path / "run"
        )


def test_accumulated_parts_give_the_step_of_the_whole_batch(tmp_path):
    runs = [
        dynamixer.train(config(accumulate=n, precision="fp64", holdout=0.0, epochs=1), tmp_path / str(n))
        for n in (1, 4)
    ]
    a, b = (weights_of(r.run / "last.safetensors") for r in runs)
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0},
        {"repeats": 3},
        {"ema": 0.9},
        {"grad_checkpointing": True},
        {"opt": "lamb"},
        {"opt": "sgd", "precision": "bf16"},
        {"layer_decay": 0.7},
        {"random_erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"},
    ],
    ids=str,
)
def test_options_train_and_resume(tmp_path, options, monkeypatch):
    """Each is stopped in the middle of its epoch, and goes on to the bits of the run that was not."""
    whole = dynamixer.train(config(**options, holdout=0.0, epochs=1), tmp_path / "whole")
    with monkeypatch.context() as patch:
        real = engine._Run._step

        def stop(run, number, loader, meter):
            real(run, number, loader, meter)
            if number == 1:
                run.stopping.asked = signal.SIGTERM

        patch.setattr(engine._Run, "_step", stop)
        with pytest.raises(SystemExit) as left:
            dynamixer.train(config(**options, holdout=0.0, epochs=1), tmp_path / "stopped")
        assert left.value.code == 143
    dynamixer.train(config(**options, holdout=0.0, epochs=1), tmp_path / "stopped")
    for name in ("last.safetensors", "metrics.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole.run / name).read_bytes(), name


def test_a_teacher_is_listened_to(tmp_path, run):
    options = {"teacher": str(run.run), "distill": 1.0, "label_smoothing": 0.0, "holdout": 0.0, "temperature": 2.0}
    result = dynamixer.train(config(**options), tmp_path / "student")
    losses = [float(r["train_loss"]) for r in csv.DictReader((result.run / "metrics.csv").read_text().splitlines())]
    assert losses[1] < losses[0] < 1  # the divergence from a soft teacher, far below the cross-entropy of about 2
    vit = dynamixer.train(config(model="test_vit", model_args={}, size=32, epochs=1, limit_train=64), tmp_path / "vit")
    with pytest.raises(UserError, match=r"teacher .* does not take pictures of 30x30"):
        dynamixer.train(config(teacher=str(vit.run), size=30), tmp_path / "other")
    with pytest.raises(UserError, match="knows other classes than the data"):
        dynamixer.train(config(teacher=str(run.run), data=str(two_classes(tmp_path))), tmp_path / "other")


def test_trackers_know_a_run_again_and_take_no_other_for_it(tmp_path, monkeypatch):
    seen, real = [], engine.open_trackers
    monkeypatch.setattr(
        engine, "open_trackers", lambda *names, **more: seen.append(more["identity"]) or real(*names, **more)
    )
    for fresh in (True, False, True):
        if fresh:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        dynamixer.train(config(limit_train=64, epochs=1), tmp_path / "run")
    assert seen[0] == seen[1] != seen[2]


def test_another_teacher_in_the_place_of_the_first_is_noticed(tmp_path, run):
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(run.run / "best.safetensors", teacher)
    options = {"teacher": str(teacher), "limit_train": 64, "epochs": 1}
    dynamixer.train(config(**options), tmp_path / "run")
    with safetensors.safe_open(teacher, framework="pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({name: value + 0.01 for name, value in weights.items()}, teacher, metadata=about)
    with pytest.raises(UserError, match=r"the teacher .* is not the one that .* was begun with"):
        dynamixer.train(config(**options), tmp_path / "run")
    shutil.copy(run.run / "best.safetensors", teacher)
    dynamixer.train(config(**options), tmp_path / "run")


def two_classes(tmp_path, broken=()):
    root = tmp_path / "pictures"
    for name, colour in (("cat", 40), ("dog", 200)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (colour, i * 9, 9)).save(root / name / f"{i}.png")
    for name in broken:
        (root / name).write_bytes(b"broken")
    return root


def test_finetuning_takes_trained_weights_to_other_classes_and_another_size(tmp_path, run):
    recipe = dynamixer.RECIPES["finetune"]()
    tuned = dataclasses.replace(
        recipe, weights=str(run.run), data=str(two_classes(tmp_path)), size=48, epochs=1, lr=1e-9, min_lr=0.0, batch_size=8,
        drop_path=0.0, device="cpu",
    )  # fmt: skip
    result = dynamixer.train(tuned, tmp_path / "tuned")
    made = dynamixer.load(result.run)
    assert made.classes == ("cat", "dog")
    assert made.preprocessing.size == (48, 48)
    before = dynamixer.load(run.run)
    x = torch.randn(2, 3, 48, 48)
    before.model.set_input_size((48, 48))
    with torch.no_grad():
        a, b = (c.model.forward_features(x) for c in (made, before))
    assert (a - b).abs().max() < 1e-4 * b.abs().max()  # the learning rate is next to nothing
    with pytest.raises(UserError, match=r"weights=.* are of dynamixer_nano, and model=dynamixer_s is another"):
        dynamixer.train(dataclasses.replace(tuned, model="dynamixer_s"), tmp_path / "other")
    with pytest.raises(UserError, match=r"bring their options along: leave model\.softmax out"):
        dynamixer.train(dataclasses.replace(tuned, model_args={"softmax": False}), tmp_path / "other")


def test_bad_pictures_are_skipped_counted_and_named_once_if_asked(tmp_path, capsys):
    data = two_classes(tmp_path, broken=["cat/1.png", "dog/3.png"])
    options = {
        "data": str(data),
        "limit_train": None,
        "batch_size": 8,
        "on_bad_image": "skip",
        "holdout": 0.0,
        "epochs": 3,
    }
    result = dynamixer.train(config(**options), tmp_path / "run")
    assert result.bad_images == 2
    said = capsys.readouterr().err
    assert [said.count(f"trained without it: {data}/{name}") for name in ("cat/1.png", "dog/3.png")] == [1, 1]
    rows = list(csv.DictReader((result.run / "metrics.csv").read_text().splitlines()))
    assert rows[-1]["bad_images"] == "2"
    held = dynamixer.train(config(**options | {"holdout": 0.5, "epochs": 1}), tmp_path / "held")
    said = capsys.readouterr().err
    assert said.count("without it: ") == 2
    assert held.bad_images == 2
    assert held.top1 is not None


def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    result = dynamixer.train(config(lr=1e-12, min_lr=0.0, epochs=9, patience=2, limit_train=64), tmp_path / "run")
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + result.best_epoch + 2
    assert (
        dynamixer.train(config(lr=1e-12, min_lr=0.0, epochs=9, patience=2, limit_train=64), tmp_path / "run").steps
        == result.steps
    )


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_a_compiled_run_comes_to_the_same(tmp_path):
    runs = [dynamixer.train(config(compile=c, holdout=0.0, epochs=1), tmp_path / str(c)) for c in (False, True)]
    a, b = (weights_of(r.run / "last.safetensors") for r in runs)
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3


def test_a_failed_save_keeps_the_epochs_before(tmp_path, monkeypatch, run, capsys):
    real, calls = folder.save_checkpoint, []

    def save(*args, **options):
        calls.append(args)
        if len(calls) > 2:
            raise RunError("there is no space left on the disk")
        real(*args, **options)

    monkeypatch.setattr(folder, "save_checkpoint", save)
    with pytest.raises(RunError, match="no space left"):
        dynamixer.train(config(), tmp_path / "run")
    assert dynamixer.load(tmp_path / "run").trained["epoch"] == 1
    monkeypatch.undo()
    dynamixer.train(config(), tmp_path / "run")
    assert "resuming after step" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.csv").read_bytes() == (run.run / "metrics.csv").read_bytes()


def test_a_signal_while_held_out_pictures_are_read_leaves_a_checkpoint(tmp_path, monkeypatch, run):
    def stopped(*_, stop, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()

    monkeypatch.setattr(engine, "tally", stopped)
    with pytest.raises(SystemExit) as ended:
        dynamixer.train(config(), tmp_path / "run")
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{run.steps // 2:08d}"]
    assert len((tmp_path / "run/timing.csv").read_text().splitlines()) == 2
    monkeypatch.undo()
    dynamixer.train(config(), tmp_path / "run")
    assert (tmp_path / "run/metrics.csv").read_bytes() == (run.run / "metrics.csv").read_bytes()


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.1)
    dynamixer.train(config(epochs=1), tmp_path / "run")
    (tmp_path / "run/.last.safetensors.abcdefgh.safetensors").touch()  # what the other is writing
    held = os.open(tmp_path / "run", os.O_RDONLY)
    assert locked(held)
    with pytest.raises(UserError, match=r"another process trains in .*/run: wait for it"):
        dynamixer.train(config(epochs=1), tmp_path / "run")
    assert (tmp_path / "run/.last.safetensors.abcdefgh.safetensors").exists()
    unlock(held)
    dynamixer.train(config(epochs=1), tmp_path / "run")


def test_classes_of_any_script_come_back_and_others_are_refused_at_once(tmp_path):
    names = ("नमस्\u200dते", "chien\u00a0noir")
    root = two_classes(tmp_path)
    for before, name in zip(("cat", "dog"), names, strict=True):
        (root / before).rename(root / name)
    options = {"data": str(root), "limit_train": None, "batch_size": 4, "epochs": 1}
    result = dynamixer.train(config(**options), tmp_path / "run")
    assert dynamixer.load(result.run).classes == tuple(sorted(names))
    for odd in ("\x1b[2J", "caf\udce9"):
        (root / names[0]).rename(root / odd)
        with pytest.raises(UserError, match="which cannot be written down"):
            dynamixer.train(config(**options), tmp_path / "other")
        (root / odd).rename(root / names[0])
    assert not (tmp_path / "other").exists()


def test_a_run_that_another_process_begins_meanwhile_is_not_gone_on_with(tmp_path, monkeypatch):
    out = tmp_path / "run"
    dynamixer.train(config(epochs=1), out)
    before = (out / "config.yaml").read_text()
    holder = os.open(out, os.O_RDONLY)
    assert locked(holder)
    ours = config(epochs=1, seed=1)
    looked = engine.check_folder
    monkeypatch.setattr(engine, "check_folder", lambda *_: None)  # when it looked, the folder was not there yet
    threading.Timer(1, unlock, [holder]).start()
    with pytest.raises(UserError, match="holds a run of another configuration: seed"):
        dynamixer.train(ours, out)
    monkeypatch.setattr(engine, "check_folder", looked)
    begun = folder.RunFolder.begin

    def late(self):
        out.parent.joinpath("late").mkdir()
        out.parent.joinpath("late/config.yaml").write_text(before)
        begun(self)

    monkeypatch.setattr(folder.RunFolder, "begin", late)
    with pytest.raises(UserError, match="another process has begun a run in"):
        dynamixer.train(ours, tmp_path / "late")
    assert (tmp_path / "late/config.yaml").read_text() == (out / "config.yaml").read_text() == before


def test_every_leg_of_a_run_is_named(tmp_path, capsys):
    out = tmp_path / "run"
    stops = config(epochs=1, drop_path=0.1, checkpoint_every=2)
    dynamixer.train(stops, out)
    first = json.loads((out / "environment.json").read_text())
    (out / "environment.json").write_text(json.dumps(first | {"cpu": "another", "processes": 2}))
    shutil.rmtree(out / "checkpoints/step-00000004")
    dynamixer.train(stops, out)
    again = json.loads((out / "environment.json").read_text())
    assert [leg["cpu"] for leg in (*again["earlier"], again)] == ["another", first["cpu"]]
    assert "drop path draw others from here on" in capsys.readouterr().err.replace("\n", " ")
    shutil.rmtree(out / "checkpoints/step-00000004")
    dynamixer.train(stops, out)
    assert json.loads((out / "environment.json").read_text()) == again
