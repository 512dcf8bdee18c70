"""The quickest way on this machine: the model's answers, whatever the batch, and a second start from the cache."""

import copy
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import dynamixer
from dynamixer.data import Preprocessing
from dynamixer.data.sources import open_data
from dynamixer.errors import UserError
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.native import processor
from dynamixer.speed import fast as module
from dynamixer.speed.fast import FastModel, optimize
from helpers import error, relative_entropy, sharpen
from small_models import small

BYTES = pytest.mark.skipif(
    "avx512_vnni" not in processor(), reason="this processor does not multiply eight bits: the kernels refuse it"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIXER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "optimized"


@pytest.fixture(scope="module")
def model():
    return sharpen(timm.create_model("dynamixer_nano", img_size=16, depths=(1, 1), dims=(32, 64), segments=4)).eval()


@pytest.fixture
def pictures():
    return torch.randn(4, 3, 16, 16)


def transposed(model):
    """The model with every mixing matrix turned: what a wrong layout would give."""
    other = timm.create_model("dynamixer_nano", img_size=16, depths=(1, 1), dims=(32, 64), segments=4).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for part in other.modules():
            if hasattr(part, "generate"):
                for p in (part.generate.weight, part.generate.bias):
                    p.copy_(p.unflatten(0, (part.length, -1)).transpose(0, 1).flatten(0, 1).clone())
    return other


def test_these_weights_show_a_transposed_matrix(model, pictures):
    found = []
    mixer = model.stages[0].blocks[0].mixer
    handle = mixer.register_forward_pre_hook(lambda _, inputs: found.append(mixer.row.matrices_for(inputs[0])))
    with torch.no_grad():
        expected = model(pictures)
        handle.remove()
        assert relative_entropy(found[0]) < 0.7
        assert error(transposed(model)(pictures), expected) > 0.05


def test_the_kernels_give_the_models_answers_for_any_batch_and_without_a_file(model, pictures, cache):
    fast = optimize(model, pictures, way="kernel", precision="fp32")
    assert (fast.way, fast.precision, fast.batch) == ("kernel", "fp32", 4)
    more = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        assert error(fast(more), model(more)) < 1e-4
    assert torch.equal(fast(more)[5:6], fast(more[5:6]))  # whoever stands beside it
    assert fast(more[:0]).shape == (0, 10)
    assert not cache.exists()


@pytest.mark.parametrize(
    "options",
    [{"reweight": False}, {"row": False}, {"channel": False}, {"shared": True}, {"generator": "static"}],
    ids=str,
)
def test_the_kernels_freeze_every_block(options, pictures, cache):
    made = timm.create_model("dynamixer_nano", img_size=16, depths=(1, 1), dims=(32, 64), segments=4, **options)
    other = sharpen(made).eval()
    with torch.no_grad():
        assert error(optimize(other, pictures, way="kernel", precision="fp32")(pictures), other(pictures)) < 1e-4


def test_the_kernels_frozen_weights_are_those_of_the_moment(model, pictures, cache):
    changed = copy.deepcopy(model)
    fast = optimize(changed, pictures, way="kernel", precision="fp32")
    with torch.no_grad():
        before = changed(pictures)
        changed.stages[0].blocks[0].mlp.fc1.weight.zero_()
    assert error(fast(pictures), before) < 1e-4


def test_bf16_errs_at_most_twice_as_much_as_the_plain_way(model, pictures, cache):
    many = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        expected = model(many)
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(many).float()
    found = optimize(model, many, way="kernel", precision="bf16")(many)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 2 * (plain - expected).norm()
    assert error(found, expected) < error(transposed(model)(many), expected) / 3


def test_a_size_that_is_not_native_is_left_to_another_way(model, cache, capsys, monkeypatch):
    monkeypatch.setattr(module, "WAYS", {name: module.WAYS[name] for name in ("kernel", "eager")})
    pictures = torch.randn(2, 3, 24, 24)
    fast = optimize(model, pictures, precision="fp32")
    assert fast.way == "eager"
    assert (
        "not by kernel: the C++ kernels do not compute this model here: the kernel mixes lines of the native 8 tokens"
        in (capsys.readouterr().err)
    )


def test_openvino_gives_the_models_answers_for_any_batch_and_starts_from_the_cache(model, pictures, cache):
    fast = optimize(model, pictures, way="openvino", precision="fp32")
    assert (fast.way, fast.precision, fast.cached, fast.batch) == ("openvino", "fp32", False, 4)
    more = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        assert error(fast(more), model(more)) < 1e-4
    assert fast(more).dtype == torch.float32
    assert torch.equal(fast(more)[5:6], fast(more[5:6]))  # whoever stands beside it
    assert fast(more[:0]).shape == (0, 10)
    again = optimize(model, pictures, way="openvino", precision="fp32")
    assert again.cached
    assert torch.equal(again(more), fast(more))
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len(list(cache.iterdir())) == 1


def test_other_weights_options_or_shapes_are_made_anew(model, pictures, cache, monkeypatch):
    made = []
    monkeypatch.setattr(module._OpenVino, "make", lambda self, m, e, p, c, path: made.append(path.name) or path.touch())
    monkeypatch.setattr(module._OpenVino, "load", lambda self, model, path, precision: model)
    other = sharpen(
        timm.create_model("dynamixer_nano", img_size=16, depths=(1, 1), dims=(32, 64), segments=4), 1
    ).eval()
    soft = timm.create_model("dynamixer_nano", img_size=16, depths=(1, 1), dims=(32, 64), segments=4, softmax=False)
    soft.load_state_dict(model.state_dict())
    for one, example in (
        (model, pictures),
        (model, pictures),
        (other, pictures),
        (soft, pictures),
        (model, pictures[:1]),
    ):
        optimize(one, example, way="openvino", precision="fp32")
    assert len(made) == len(set(made)) == 4


def test_answers_that_are_not_the_models_are_refused(model, pictures, cache, monkeypatch):
    wrong = transposed(model)
    monkeypatch.setattr(module._OpenVino, "load", lambda self, model, path, precision: wrong)
    with pytest.raises(UserError, match="logits differ by"):
        optimize(model, pictures, way="openvino", precision="fp32")


def test_what_cannot_be_had_is_passed_over_with_the_reason(model, pictures, cache, monkeypatch, capsys):
    monkeypatch.setattr(module._Kernel, "why_not", lambda self, precision: "there is no kernel here.")
    monkeypatch.setattr(module._OpenVino, "why_not", lambda self, precision: "there is no openvino here.")
    monkeypatch.setattr(module._Aoti, "why_not", lambda self, precision: "there is no compiler here.")
    fast = optimize(model, pictures)
    assert fast.way == "eager"
    said = capsys.readouterr().err
    assert "not by kernel: there is no kernel here." in said
    assert "not by openvino: there is no openvino here." in said
    assert "not by aoti: there is no compiler here." in said
    with pytest.raises(UserError, match="no openvino here"):
        optimize(model, pictures, way="openvino")


@pytest.mark.parametrize("left", [1000, 0])
def test_a_damaged_file_is_made_again(pictures, cache, capsys, left):
    model = small(generator="dense")
    optimize(model, pictures, way="openvino", precision="fp32")
    (blob,) = [path for path in cache.rglob("*") if path.suffix == ".blob"]
    blob.write_bytes(blob.read_bytes()[:left])
    again = optimize(model, pictures, way="openvino", precision="fp32")
    assert not again.cached
    torch.testing.assert_close(again(pictures), model(pictures), atol=1e-3, rtol=1e-3)
    assert f"{blob} cannot be read" in capsys.readouterr().err


def test_what_fails_in_making_is_passed_over_too(model, pictures, cache, monkeypatch, capsys):
    monkeypatch.setattr(module.WAYS["kernel"], "load", lambda *_: 1 / 0)
    monkeypatch.setattr(module.WAYS["openvino"], "make", lambda *_: 1 / 0)
    monkeypatch.setattr(module.WAYS["aoti"], "make", lambda *_: 1 / 0)
    assert optimize(model, pictures).way == "eager"
    assert "not by openvino: openvino does not take this model: division by zero" in capsys.readouterr().err


def test_a_write_that_is_cut_short_leaves_nothing_behind(model, pictures, cache, monkeypatch):
    def cut(self, model, example, precision, calibration, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module._OpenVino, "make", cut)
    with pytest.raises(KeyboardInterrupt):
        optimize(model, pictures, way="openvino")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=BYTES), "openvino"])
def test_int8_is_near_the_model_where_a_transposed_matrix_is_far(model, pictures, cache, way):
    many = torch.randn(64, 3, 16, 16)
    calibration = [p.numpy() for p in many.split(4)] if way == "openvino" else None
    fast = optimize(model, pictures, way=way, precision="int8", calibration=calibration)
    assert (fast.way, fast.precision) == (way, "int8")
    with torch.no_grad():
        expected, turned = model(many), transposed(model)(many)
    near, far = ((found - expected).norm() / expected.norm() for found in (fast(many), turned))
    assert near < (0.1 if way == "kernel" else 0.3)
    assert far > 0.4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"way": "openvin"}, "did you mean 'openvino'"),
        ({"precision": "int4"}, "unknown precision"),
        ({"way": "openvino", "precision": "int8"}, "calibrated on real pictures"),
        (
            {"way": "eager", "precision": "int8", "calibration": [np.zeros((4, 3, 16, 16), np.float32)]},
            "needs openvino",
        ),
    ],
)
def test_mistakes_are_named(model, pictures, options, why):
    with pytest.raises(UserError, match=why):
        optimize(model, pictures, **options)


def test_a_fast_model_stands_in_for_few_and_many_pictures(model, cache, monkeypatch):
    monkeypatch.setattr(module, "WAYS", {"eager": module.WAYS["eager"]})
    sizes = [
        FastModel(model, (16, 16), images=images, batch=32, device=torch.device("cpu")).run.batch
        for images in (1, 3, 32, 1000)
    ]
    assert sizes == [1, 4, 32, 32]
    with pytest.raises(UserError, match="for processors"):
        FastModel(model, (16, 16), images=1, batch=1, device=torch.device("cuda"))


@pytest.mark.heavy
def test_torchs_compiler_gives_the_models_answers_and_starts_from_the_cache(model, pictures, cache):
    fast = optimize(model, pictures, way="aoti", precision="fp32")
    with torch.no_grad():
        assert error(fast(pictures), model(pictures)) < 1e-4
    assert optimize(model, pictures, way="aoti", precision="fp32").cached


def test_a_way_that_fails_leaves_the_weights_as_they_are(model, pictures, tmp_path, monkeypatch):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(torch.export, "export", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="could not compile"):
        module._Aoti().make(model, pictures, "bf16", None, tmp_path / "x.pt2")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_predict_and_eval_say_the_same_by_the_fast_way(tmp_path, cache):
    args = {"num_classes": 10, "img_size": 16, "depths": [1, 1], "dims": [32, 64], "segments": [4, 4]}
    made = sharpen(timm.create_model("dynamixer_nano", **args)).eval()
    path, examples = tmp_path / "m.safetensors", Path(__file__).parents[2] / "examples/pictures"
    save_checkpoint(
        path, made.state_dict(), name="dynamixer_nano", args=args, classes=open_data("fashion-mnist-mini").test.classes,
        preprocessing=Preprocessing.of(made), trained={},
    )  # fmt: skip
    plain, fast = (dynamixer.predict([examples], path, top=10, fast=way, device="cpu") for way in (False, True))
    for one, other in zip(plain.results, fast.results, strict=True):
        assert one.path == other.path
        shares = {guess.label: guess.probability for guess in other.top}
        assert all(abs(guess.probability - shares[guess.label]) < 0.02 for guess in one.top)  # bf16 where there is any
    assert len({result.top[0].label for result in plain.results}) > 1
    plain, fast = (dynamixer.evaluate(path, "fashion-mnist-mini", fast=way, device="cpu") for way in (False, True))
    assert (plain["top1"], plain["images"]) == (fast["top1"], fast["images"])
    assert abs(plain["loss"] - fast["loss"]) < 1e-4
    with pytest.raises(UserError, match="fp32 or bf16"):
        dynamixer.evaluate(path, "fashion-mnist-mini", fast=True, precision="fp16")
