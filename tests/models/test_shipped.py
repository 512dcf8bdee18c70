"""The weights that come with the package."""

import importlib
import json

import pytest
import timm
import torch
from safetensors import safe_open

import dynamixer
from dynamixer import UserError
from dynamixer.data import Preprocessing
from dynamixer.data.sources import open_data
from dynamixer.evaluate import match_classes
from dynamixer.models import shipped
from dynamixer.models.checkpoint import Checkpoint
from helpers import shared_data
from small_models import small

MODELS = shipped.names()
TESTS = {
    "dynamixer_tiny": "imagenette128/val.parquet",
    "dynamixer_nano": "cifar10/test.parquet",
    "dynamixer_nano_plus": "cifar10/test.parquet",
}


def test_what_ships_is_small_and_has_cards():
    assert shipped.DEFAULT in MODELS
    assert sum(shipped.shipped(name).stat().st_size for name in MODELS) <= 16e6
    for name in MODELS:
        trained = dynamixer.load(name).trained
        card = (shipped.FOLDER / name / "README.md").read_text()
        assert f"| top-1 | {trained['test']['top1']:.2f} % |\n" in card
        assert "seed" in trained
        assert "```yaml\n" in card  # the recipes of all stages
        assert "  classifier_times: " in card
        assert card.count("ema_warmup: true") == card.count("ema: 0.99")
        assert "/" not in trained["data"]


@pytest.mark.parametrize("name", MODELS)
def test_timm_creates_them_with_their_weights(name):
    ours = dynamixer.load(name)
    assert (ours.name, ours.args, ours.path) == (name, {"num_classes": 10}, shipped.shipped(name))
    theirs = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(2, 3, *ours.preprocessing.size)
    assert torch.equal(theirs(x), ours.model(x))
    assert not torch.equal(timm.create_model(name).eval()(x), ours.model(x))
    assert tuple(theirs.pretrained_cfg["label_names"]) == ours.classes
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["input_size"][1:], data["mean"]) == (ours.preprocessing.size, ours.preprocessing.mean)
    others = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert torch.equal(others.forward_features(x), ours.model.forward_features(x))
    assert others(x).shape == (2, 3)


def test_at_another_size_they_compute_what_the_native_one_does_there():
    native = timm.create_model(shipped.DEFAULT, pretrained=True, windows=False).eval()
    made = timm.create_model(shipped.DEFAULT, pretrained=True, windows=False, img_size=(160, 96)).eval()
    assert made.img_size == (160, 96)
    x = torch.randn(2, 3, 160, 96)
    torch.testing.assert_close(made(x), native(x), atol=1e-4, rtol=0)
    assert (made(x) - made(x.flip(-1))).abs().max() > 1e-2


def test_other_channels_and_another_size_at_once():
    made = timm.create_model("dynamixer_nano", pretrained=True, in_chans=1, img_size=48).eval()
    x = torch.randn(2, 1, 48, 48)
    colour = timm.create_model("dynamixer_nano", pretrained=True, img_size=48).eval()
    torch.testing.assert_close(made(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-3, rtol=1e-3)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / shipped.DEFAULT).mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        dynamixer.load(shipped.DEFAULT)


@pytest.mark.parametrize("name", MODELS)
def test_the_card_says_from_what_they_were_trained(name):
    folder = shipped.FOLDER / name
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dynamixer"])["model"] == name
    card = (folder / "README.md").read_text()
    assert "epochs: " in card
    assert "/tmp" not in card


def test_what_ships_is_as_sure_as_it_is_right(tmp_path, monkeypatch):
    """Held-out labels are drawn from the model's own probabilities, made twice as sure: the classifier is to be doubled."""
    monkeypatch.syspath_prepend(str(shipped.FOLDER.parents[2] / "tools"))
    ship = importlib.import_module("ship")
    (tmp_path / "config.yaml").write_text("data: fashion-mnist-mini\nholdout: 0.2\n")
    model = small(num_classes=10).eval()
    model.head.weight.data *= 10
    checkpoint = Checkpoint(model, "dynamixer_nano", {}, tuple("abcdefghij"), Preprocessing.of(model), {}, tmp_path)
    data = ship.prepare_data(ship.TrainConfig(data="fashion-mnist-mini", holdout=0.2))
    pictures = torch.stack([checkpoint.preprocessing(data.val.picture(int(n))) for n in data.val_indices])
    with torch.no_grad():
        logits = model(pictures)
    data.val.labels[data.val_indices] = (2 * logits).softmax(1).multinomial(1)[:, 0].numpy()
    monkeypatch.setattr(ship, "prepare_data", lambda config: data)
    factor, figures = ship.calibrate(checkpoint, tmp_path)
    assert factor == pytest.approx(2, rel=0.2)
    assert figures["ece"] < 10
    torch.testing.assert_close(model(pictures), factor * logits, rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODELS)
def test_they_are_as_good_as_their_cards_say(name):
    data = shared_data(TESTS[name])
    told = dynamixer.load(name).trained["test"]
    found = dynamixer.evaluate(name, data)
    assert found["images"] == told["images"]
    assert found["top1"] >= told["top1"] - 0.1
    assert found["ece"] == pytest.approx(told["ece"], abs=0.3)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "least"), [("bf16", 99.5), ("int8", 98.5)])
@pytest.mark.parametrize("name", MODELS)
def test_by_the_kernels_in_fewer_bits_they_answer_alike(name, precision, least):
    checkpoint = dynamixer.load(name)
    source = match_classes(open_data(shared_data(TESTS[name])).for_evaluation()[1], checkpoint)
    numbers = range(0, len(source), len(source) // 1900)
    pictures = torch.stack([checkpoint.preprocessing(source.picture(number)) for number in numbers])
    labels = torch.as_tensor([int(source.labels[number]) for number in numbers])
    try:
        fast = dynamixer.optimize(checkpoint.model, pictures[:50], way="kernel", precision=precision)
    except UserError as error:
        assert precision == "int8", error
        pytest.skip(str(error))
    with torch.inference_mode():
        expected, found = (
            torch.cat([way(part) for part in pictures.split(50)]).argmax(1) for way in (checkpoint.model, fast)
        )
    assert 100 * (found == expected).float().mean() >= least
    assert 100 * ((expected == labels).float().mean() - (found == labels).float().mean()) <= 0.5
