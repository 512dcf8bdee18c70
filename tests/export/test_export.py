"""Exported files, run by the programs that they are for, and kept only if they say what the model says."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

import dynamixer
from dynamixer import RunError, UserError
from dynamixer.data import Preprocessing, decode
from dynamixer.data.sources import open_data
from dynamixer.export import run as export_run
from dynamixer.export.check import apart, compare, tensors
from dynamixer.models.checkpoint import create_model, save_checkpoint
from helpers import shared_data, sharpen

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "pictures"
ARGS = {
    "num_classes": 3, "depths": [1], "dims": [16], "segments": [2], "reduced": [2], "patch_size": 8, "img_size": 48,
}  # fmt: skip
DEEPER = {"depths": [1, 1], "dims": [16, 32], "segments": [2, 4], "reduced": 2, "enlarge": True}


def save(path, **more):
    args = ARGS | more
    model = sharpen(create_model("dynamixer_nano", **args)).eval()
    about = {"name": "dynamixer_nano", "args": args, "classes": ("a", "b", "ü"), "trained": {"epoch": 3}}
    save_checkpoint(path, model.state_dict(), preprocessing=Preprocessing.of(model), **about)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("export") / "m.safetensors")


@pytest.fixture(scope="module")
def everything(model):
    """ONNX for any batch and any size."""
    return model, dynamixer.export(model, "onnx", model.with_name("m.onnx"), dynamic="all", data=[EXAMPLES])


def answers(path, session, *sizes):
    """The largest difference between the model and a function, on real pictures."""
    checkpoint = dynamixer.load(path)
    largest = 0.0
    for height, width in sizes:
        pre = checkpoint.preprocessing.at((height, width))
        batch = torch.stack([pre(decode(file)) for file in sorted(EXAMPLES.glob("*.png"))[:5]])
        with torch.inference_mode():
            expected = checkpoint.model(batch).numpy()
        found = session(batch.numpy())
        assert expected.std() > 0.1
        assert (found.argmax(1) == expected.argmax(1)).all()
        largest = max(largest, float(np.abs(found - expected).max()))
    return largest


SIZES = [(48, 48), (24, 80), (7, 9), (64, 63), (96, 40)]


def test_onnx_runtime_runs_any_batch_and_size_and_the_classes_are_inside(everything):
    path, done = everything
    (file,) = done.files
    assert done.agreement.share == 100
    assert done.agreement.max_difference < 1e-4
    assert done.agreement.pictures > 10  # more than one size was compared
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 3]
    assert answers(path, lambda x: session.run(["logits"], {"pictures": x})[0], *SIZES) < 1e-4
    about = json.loads(session.get_modelmeta().custom_metadata_map["dynamixer"])
    assert about["classes"] == ["a", "b", "ü"]
    assert about["preprocessing"]["size"] == [48, 48]
    assert about["input"] == ["batch", 3, "height", "width"]
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []


def test_openvino_runs_what_was_written(model, tmp_path):
    done = dynamixer.export(model, "openvino", tmp_path / "m.xml", dynamic="none", batch_size=5)
    assert [file.name for file in done.files] == ["m.xml", "m.bin"]
    core = openvino.Core()
    read = core.read_model(tmp_path / "m.xml")
    assert json.loads(read.get_rt_info(["dynamixer"]).value)["classes"] == ["a", "b", "ü"]
    assert list(read.inputs[0].get_partial_shape().to_shape()) == [5, 3, 48, 48]
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert answers(model, lambda x: np.array(compiled(x)[0]), (48, 48)) < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]


def run_pt2(path):
    extra = {"dynamixer.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["dynamixer.json"])["trained"] == {"epoch": 3}
    return lambda x: module(torch.from_numpy(x)).detach().numpy()


def test_torch_runs_what_was_written(model, tmp_path):
    dynamixer.export(model, "pt2", tmp_path / "m.pt2", size=40)
    assert answers(model, run_pt2(tmp_path / "m.pt2"), (40, 40)) < 1e-4


def test_a_larger_size_is_exported_without_sums_that_race(model, tmp_path):
    """ONNX Runtime adds to one cell in several threads and loses some of it: seen in few pictures, in large batches."""
    dynamixer.export(model, "onnx", tmp_path / "m.onnx", size=(64, 112))
    assert not {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node} & {"ScatterND", "ScatterElements"}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert answers(model, lambda x: session.run(["logits"], {"pictures": x})[0], (64, 112)) < 1e-4


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_every_format_takes_every_size_of_the_model_that_is_hardest_to_export(tmp_path):
    """Small pictures are enlarged by a ratio that depends on both sides, and there are two stages."""
    path = save(tmp_path / "m.safetensors", **DEEPER)
    dynamixer.export(path, "onnx", tmp_path / "m.onnx", dynamic="all")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert answers(path, lambda x: session.run(["logits"], {"pictures": x})[0], *SIZES) < 1e-4
    dynamixer.export(path, "openvino", tmp_path / "m.xml", dynamic="all")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "m.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert answers(path, lambda x: np.array(compiled(x)[0]), *SIZES) < 1e-4
    dynamixer.export(path, "pt2", tmp_path / "m.pt2", dynamic="all")
    assert answers(path, run_pt2(tmp_path / "m.pt2"), (48, 48), (24, 80), (64, 63), (96, 40)) < 1e-4


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_int8_is_kept_only_if_it_agrees_on_nearly_all_pictures(tmp_path, monkeypatch):
    path = save(tmp_path / "m.safetensors", **DEEPER)
    data, out = shared_data("cifar10/test.parquet"), tmp_path / "m.xml"
    monkeypatch.setattr(export_run, "INT8_SHARE", 100.1)
    with pytest.raises(RunError, match=r"of 1000 pictures.*100\.1 % of them"):
        dynamixer.export(path, "openvino", out, int8=True, data=[data])
    assert not out.exists()
    monkeypatch.setattr(export_run, "INT8_SHARE", 90.0)  # random weights as sharp as these lose more than trained ones
    done = dynamixer.export(path, "openvino", out, int8=True, data=[data])
    assert done.agreement.pictures == 1000
    kinds = [node.get_type_name() for node in openvino.Core().read_model(out).get_ordered_ops()]
    assert kinds.count("FakeQuantize") >= 10


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_int8_of_weights_that_ship_agrees_on_pictures_of_their_test_set(tmp_path):
    done = dynamixer.export(
        "dynamixer_nano", "openvino", tmp_path / "m.xml", int8=True, data=[shared_data("cifar10/test.parquet")]
    )
    assert done.agreement.pictures == 1000
    assert done.agreement.share >= 98.5


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A model that knows the classes of the pictures that ship, in another order."""
    path = tmp_path_factory.mktemp("clothes") / "m.safetensors"
    args = ARGS | {"num_classes": 10}
    model = sharpen(create_model("dynamixer_nano", **args)).eval()
    classes = tuple(reversed(open_data("fashion-mnist-mini").train.classes))
    about = {"name": "dynamixer_nano", "args": args, "classes": classes, "trained": {}}
    save_checkpoint(path, model.state_dict(), preprocessing=Preprocessing.of(model), **about)
    return path


def test_int8_is_calibrated_on_other_pictures_than_it_is_compared_on(clothes, tmp_path, capsys):
    checkpoint = dynamixer.load(clothes)
    calibration, lot = apart(["fashion-mnist-mini"], checkpoint, compared=50, calibrated=20)
    assert (calibration.pictures.name, lot.pictures.name) == ("fashion-mnist-mini train", "fashion-mnist-mini test")
    assert (len(calibration.numbers), len(lot.numbers), calibration.labels) == (20, 50, None)
    test = open_data("fashion-mnist-mini").test
    assert [checkpoint.classes[label] for label in lot.labels] == [test.classes[test.labels[i]] for i in lot.numbers]
    for number in range(60):
        shutil.copy(EXAMPLES / "bag.png", tmp_path / f"{number}.png")
    calibration, lot = apart([tmp_path], checkpoint, compared=40, calibrated=20)
    assert "accuracy is not measured: " in capsys.readouterr().err
    assert lot.labels is None
    assert not {*calibration.numbers} & {*lot.numbers}
    assert len(calibration.numbers) == 20
    calibration, lot = apart([tmp_path], checkpoint, compared=20, calibrated=10)
    assert max(calibration.numbers) > 50  # of all, not of the first classes
    assert not {*calibration.numbers} & {*lot.numbers}
    calibration, lot = apart([tmp_path], checkpoint, compared=60, calibrated=20)
    assert "there are only 60 pictures: it is calibrated and compared on the same ones" in capsys.readouterr().err
    assert len(calibration.numbers) == 20
    assert {*calibration.numbers} <= {*lot.numbers}


def test_a_data_set_of_other_classes_is_taken_for_its_pictures(model, capsys):
    calibration, lot = apart(["fashion-mnist-mini"], dynamixer.load(model), compared=48, calibrated=20)
    assert "accuracy is not measured: " in capsys.readouterr().err
    splits = open_data("fashion-mnist-mini")
    assert (len(calibration.pictures), len(lot.pictures)) == (len(splits.train), len(splits.test))
    assert lot.labels is None


def test_accuracies_are_those_of_the_model_and_of_the_file(clothes):
    checkpoint = dynamixer.load(clothes)
    _, lot = apart(["fashion-mnist-mini"], checkpoint, compared=48, calibrated=20)
    true = iter(lot.labels)

    def run(pictures):  # right about every second picture
        answer = np.zeros((len(pictures), 10), np.float32)
        for i, row in enumerate(answer):
            row[(next(true) + i % 2) % 10] = 1
        return answer

    options = {"batches": [16], "sizes": [checkpoint.preprocessing.size]}
    found = compare(checkpoint.model, run, lot, checkpoint.preprocessing, **options)
    with torch.inference_mode():
        top = np.concatenate(
            [checkpoint.model(torch.from_numpy(x)).argmax(1) for x in tensors(lot, checkpoint.preprocessing, [16])]
        )
    assert found.file_accuracy == 50
    assert found.model_accuracy == pytest.approx(100 * (top == lot.labels).mean())
    assert 0 < found.model_accuracy < 50
    assert f"accuracy {found.model_accuracy:.1f} -> 50.0 %" in str(found)


def test_int8_goes_on_to_what_agrees(clothes, tmp_path, monkeypatch, capsys):
    """More and more of the model is left in fp32, and no more than it takes."""
    shares, tried, real = [90.0, 98.5], [], export_run.compare

    def compared(*words, **options):
        found = real(*words, **options)
        return replace(found, pictures=1000, same_top1=round(10 * shares.pop(0)))

    monkeypatch.setattr(export_run, "compare", compared)
    monkeypatch.setattr(export_run, "quantise", lambda model, pictures, in_fp32: tried.append(in_fp32) or model)
    monkeypatch.setattr(export_run, "INT8_COMPARED", 16)
    options = {"int8": True, "data": ["fashion-mnist-mini"]}
    done = dynamixer.export(clothes, "openvino", tmp_path / "m.xml", **options)
    (first, _), (second, second_of) = [*export_run.IN_FP32.items()][:2]
    assert done.in_fp32 == second
    assert tried[-1] is second_of
    assert len(tried) == 2
    said = capsys.readouterr().err
    assert f"int8 with {first} in fp32: the same top-1 for 90 %" in said
    assert f"int8 with {second} in fp32: the same top-1 for 98.5 %" in said
    shares[:] = [90.0] * (len(export_run.IN_FP32) - 1) + [98.4]
    with pytest.raises(RunError, match=r"the same top-1 for 984 of 1000 pictures.*98\.5 % of them"):
        dynamixer.export(clothes, "openvino", tmp_path / "other.xml", **options)
    assert shares == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]


def test_a_file_that_says_something_else_is_not_kept(model, tmp_path, monkeypatch):
    real, program = export_run.RUNNERS["pt2"], export_run.trace(dynamixer.load(model).model, (1, 3, 48, 48), "batch")
    monkeypatch.setattr(export_run, "trace", lambda *_: program)
    out = tmp_path / "m.pt2"
    out.write_bytes(b"what was there before")
    for wrong in (lambda found: found + 2e-4, lambda found: found * np.nan, lambda found: found[:, ::-1]):

        def spoilt(path, wrong=wrong):
            run, about = real(path)
            return lambda x: wrong(run(x)), about

        monkeypatch.setitem(export_run.RUNNERS, "pt2", spoilt)
        with pytest.raises(RunError, match=r"was not kept: the same top-1 for \d+ of 64 pictures, largest difference"):
            dynamixer.export(model, "pt2", out)
        assert out.read_bytes() == b"what was there before"
        assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_what_a_library_fails_at_is_a_sentence(model, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file\nwith much behind it")

    monkeypatch.setitem(export_run.WRITERS, "pt2", full)
    with pytest.raises(RunError, match=r"m\.pt2 could not be made: PytorchStreamWriter failed writing file\.$"):
        dynamixer.export(model, "pt2", tmp_path / "m.pt2", data=str(EXAMPLES))
    assert [*tmp_path.iterdir()] == []


def test_a_missing_library_and_the_weights_of_others_are_found_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_run, "trace", None)
    (tmp_path / "m.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"m\.bin would be overwritten, and no m\.xml is beside it"):
        dynamixer.export(model, "openvino", tmp_path / "m.xml")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match=r"this needs nncf: .*openvino"):
        dynamixer.export(model, "openvino", tmp_path / "o.xml", int8=True, data=EXAMPLES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "onxx"}, "did you mean 'onnx'"),
        ({"dynamic": "size"}, "unknown dynamic"),
        ({"batch_size": 4}, "dynamic=none"),
        ({"dynamic": "all", "size": 64}, "leave size out"),
        ({"out": "m.xml"}, r"has to end in .onnx"),
        ({"int8": True}, "format=openvino"),
        ({"int8": True, "format": "openvino"}, "give some"),
        ({"data": ["nowhere"]}, "no file or folder nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused(model, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        dynamixer.export(model, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export_run, "trace", lambda *_: None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'onnx>="):
        dynamixer.export(model, "onnx", tmp_path / "m.onnx")


def test_the_example_needs_no_torch_and_says_what_predict_says(everything, tmp_path):
    path, done = everything
    script = ROOT / "examples" / "onnx_without_torch.py"
    assert len(script.read_text().splitlines()) <= 30
    Image.effect_mandelbrot((90, 61), (-2, -1, 1, 1), 40).convert("RGB").save(tmp_path / "wide.png")
    files = [tmp_path / "wide.png", EXAMPLES / "bag.png"]
    refuse = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", refuse, script, done.files[0], *files], capture_output=True, text=True, check=True
    )
    expected = dynamixer.predict(files, path, device="cpu", top=3)
    lines = [
        f"{r.path}: " + ", ".join(f"{g.label} {100 * g.probability:.1f} %" for g in r.top) for r in expected.results
    ]
    assert ran.stdout.splitlines() == lines
    png = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(png[:300])
    (tmp_path / "huge.bmp").write_bytes(
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 60, 0, 54, 40, 99999, 9999, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    for name in ("cut.png", "huge.bmp"):  # to Pillow the first is an OSError, the second none
        ran = subprocess.run(
            [sys.executable, script, done.files[0], tmp_path / name], capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.splitlines()[-1].startswith(f"{tmp_path / name} cannot be read: ")
        assert "Traceback" not in ran.stderr


def test_a_place_within_a_file_is_refused_before_anything_is_traced(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        dynamixer.export("dynamixer_nano", "pt2", out=tmp_path / "file/x.pt2")
