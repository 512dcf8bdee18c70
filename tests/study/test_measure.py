"""What is measured of a run's weights: the same as the public functions say."""

import hashlib
import json

import numpy as np
import pytest
import torch

import dynamixer
from dynamixer.data import Preprocessing, open_data
from dynamixer.explain import average, mixing_matrices
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.speed.kernel import kernel_if_any
from dynamixer.study import measure, times
from dynamixer.study.measure import KINDS, measure_run, parts_of
from dynamixer.study.rows import ROWS, Run, runs
from small_models import NUMBERS, small

DATA = "fashion-mnist-mini"
OPTIONS = {"num_classes": 10}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("measure") / "last.safetensors"
    model = small(**OPTIONS)
    about = {
        "name": "dynamixer_nano",
        "args": NUMBERS | OPTIONS,
        "classes": open_data(DATA).test.classes,
        "trained": {},
    }
    save_checkpoint(path, model.state_dict(), preprocessing=Preprocessing.of(model), **about)
    return path


def test_a_model_that_the_kernels_could_compute_says_why_they_do_not(monkeypatch, capsys):
    monkeypatch.setattr("dynamixer.speed.kernel.load_kernel", lambda: "there is no compiler.")
    for model, says in ((small(), True), (small(generator="dense"), False), (torch.nn.Linear(2, 2), False)):
        assert kernel_if_any(model) is model
        assert ("without the kernels: there is no compiler." in capsys.readouterr().err) == says


def test_which_parts_are_measured_of_which_runs():
    assert parts_of(Run("cifar10", "dynamic", 0), corrupted=True) == ["runs", "sizes", "depth", "corrupted"]
    assert parts_of(Run("cifar10", "dynamic", 0), corrupted=False) == ["runs", "sizes", "depth"]
    assert parts_of(Run("cifar10", "dynamic", 4), corrupted=True) == ["runs"]
    assert parts_of(Run("cifar10", "dynamic", 0, 10), corrupted=True) == ["runs"]
    assert parts_of(Run("cifar10", "static", 0), corrupted=True) == ["runs", "sizes", "corrupted"]
    assert parts_of(Run("cifar10", "vit", 0), corrupted=True) == ["runs", "corrupted"]
    assert parts_of(Run("imagenette", "dynamic_plain", 0), corrupted=True) == ["runs", "depth", "matrices"]
    assert parts_of(Run("imagenette", "static", 1), corrupted=True) == ["runs", "depth"]
    assert all("runs" in parts_of(run, corrupted=True) for run in runs())


def test_the_figures_are_those_of_the_public_functions(weights, monkeypatch):
    monkeypatch.setattr(measure, "SIZES", (12, 20))
    monkeypatch.setattr(measure, "PICTURES", 40)
    found = measure_run(weights, DATA, ["runs", "sizes", "depth"], None)
    expected = dynamixer.evaluate(weights, DATA)
    assert expected["split"] == "test"
    (line,) = found["runs"]
    assert line["test_top1"] == pytest.approx(expected["top1"], abs=1e-3)
    assert line["test_loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert line["parameters"] == sum(p.numel() for p in small(**OPTIONS).parameters())
    assert [v["top1"] for v in found["sizes"]] == pytest.approx(
        [dynamixer.evaluate(weights, DATA, size=size)["top1"] for size in (12, 20)], abs=1e-3
    )
    checkpoint = dynamixer.load(weights)
    source = open_data(DATA).test
    numbers = np.linspace(0, len(source) - 1, 40).astype(int)
    pictures = torch.stack([checkpoint.preprocessing(source.picture(int(n))) for n in numbers])
    blocks = average(checkpoint.model, [pictures]).blocks
    assert [(v["block"], v["axis"]) for v in found["depth"]] == [
        (b, axis) for b in range(3) for axis in ("row", "column")
    ]
    assert [v["dynamic"] for v in found["depth"]] == pytest.approx(
        [block.of(axis).dynamic for block in blocks for axis in ("row", "column")], abs=1e-4
    )


def test_matrices_are_kept_output_token_by_output_token(weights, monkeypatch):
    monkeypatch.setattr(measure, "PICTURES", 10)
    lines = measure_run(weights, DATA, ["matrices"], None)["matrices"]
    checkpoint, source = dynamixer.load(weights), open_data(DATA).test
    pictures = torch.stack([checkpoint.preprocessing(source.picture(n)) for n in (0, len(source) - 1)])
    every = mixing_matrices(checkpoint.model, pictures)
    first = [mixing for mixing in every if mixing.grid == every[0].grid]
    of_picture = [v for v in lines if v["picture"] == f"picture {len(source) - 1}"]
    assert [v["segment"] for v in of_picture] == [0, 1]
    assert all((v["block"], v["line"]) == (len(first) - 1, first[0].grid[0] // 2) for v in lines)
    for line in of_picture:
        matrix = first[-1].row[1, line["line"], line["segment"]]
        assert not torch.allclose(matrix, matrix.T, rtol=0.05)
        assert [*map(float, line["weights"].split())] == pytest.approx(matrix.flatten().tolist(), rel=0.01)
    mean = (
        average(checkpoint.model, measure._batches(DATA, checkpoint.preprocessing), blocks=[len(first) - 1])
        .blocks[0]
        .row.mean
    )
    (found,) = [v for v in lines if (v["picture"], v["segment"]) == ("mean", 1)]
    assert [*map(float, found["weights"].split())] == pytest.approx(mean[found["line"], 1].flatten().tolist(), rel=0.01)


def test_corrupted_pictures_are_read_kind_by_kind(weights, tmp_path, monkeypatch):

    read = []

    def told(checkpoint, test, precision, size=None):
        read.append(test.rsplit("/", 1)[1])
        return 100 - len(read), 1.0

    monkeypatch.setattr(measure, "_accuracy", told)
    found = measure_run(weights, DATA, ["corrupted"], tmp_path)["corrupted"]
    assert len(found) == len(read) == 95 == 5 * len(set(KINDS))
    assert read[:2] == ["gaussian_noise-1.parquet", "gaussian_noise-2.parquet"]
    assert found[6] == {"kind": KINDS[1], "severity": 2, "error": 7}


def test_a_run_in_bf16_is_measured_in_bf16(weights):
    exact, rounded = (measure_run(weights, DATA, ["runs"], None, kind)["runs"][0] for kind in ("fp32", "bf16"))
    assert rounded["test_loss"] != exact["test_loss"]
    assert rounded["test_loss"] == pytest.approx(exact["test_loss"], rel=0.02)


def test_what_was_measured_before_a_stop_is_not_measured_again(weights, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        measure, "measure_run", lambda weights, test, parts, corrupted, precision: asked.append(parts) or {parts[0]: []}
    )
    out = tmp_path / "measured.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    out.write_text(json.dumps({"weights": digest, "runs": [{"test_top1": 1.0}]}))
    task = {
        "weights": str(weights),
        "test": DATA,
        "parts": ["runs", "depth"],
        "corrupted": None,
        "precision": "fp32",
        "out": str(out),
    }
    measure.main(json.dumps(task))
    assert asked == [["depth"]]
    assert json.loads(out.read_text()) == {"weights": digest, "runs": [{"test_top1": 1.0}], "depth": []}
    out.write_text(json.dumps({"weights": "others", "runs": [{"test_top1": 1.0}]}))
    measure.main(json.dumps(task))
    assert asked == [["depth"], ["runs"], ["depth"]]
    assert json.loads(out.read_text()) == {"weights": digest, "runs": [], "depth": []}


def test_step_times_are_ratios_to_the_first_row(monkeypatch):
    monkeypatch.setattr(times, "ROWS", {row: ROWS[row] for row in ("dynamic", "frozen", "vit")})
    threads = torch.get_num_threads()
    lines = times.step_times("cifar10", threads=1, rounds=2, batch=2)
    torch.set_num_threads(threads)
    assert [line["row"] for line in lines] == ["dynamic", "frozen", "vit"]
    assert lines[0]["ratio"] == lines[0]["low"] == 1
    assert all(line["milliseconds"] > 0 and line["low"] <= line["ratio"] <= line["high"] for line in lines)
    assert lines[0]["parameters"] == lines[1]["parameters"] == 916_490
