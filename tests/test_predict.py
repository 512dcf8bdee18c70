from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import dynamixer
from dynamixer import UserError
from dynamixer.data import Preprocessing, decode
from dynamixer.data.sources import open_data
from dynamixer.explain.report import explain
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.predict import find_pictures
from helpers import sharpen

EXAMPLES = Path(__file__).parents[1] / "examples" / "pictures"
ARGS = {"num_classes": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    made = sharpen(timm.create_model("dynamixer_nano", **ARGS)).eval()
    path = tmp_path_factory.mktemp("predict") / "x.safetensors"
    about = {"name": "dynamixer_nano", "args": ARGS, "classes": ("a", "b", "c"), "trained": {}}
    save_checkpoint(path, made.state_dict(), preprocessing=Preprocessing.of(made), **about)
    return path


def test_probabilities_are_the_models_whatever_the_batch(model):
    files = sorted(EXAMPLES.glob("*.png"))
    checkpoint = dynamixer.load(model)
    batch = torch.stack([checkpoint.preprocessing(decode(f)) for f in files])
    with torch.inference_mode():
        expected = checkpoint.model(batch).softmax(1)
    for size in (1, 3, 32):
        found = dynamixer.predict([EXAMPLES], model, batch_size=size, device="cpu", top=3)
        assert [r.path for r in found.results] == [str(f) for f in files]
        for result, row in zip(found.results, expected, strict=True):
            got = {guess.label: guess.probability for guess in result.top}
            assert torch.allclose(torch.tensor([got[c] for c in "abc"]), row, atol=1e-5)
            assert result.top[0].label == "abc"[int(row.argmax())]


def test_another_size_is_read_with_the_same_weights(model):
    checkpoint, file = dynamixer.load(model), sorted(EXAMPLES.glob("*.png"))[0]
    with torch.inference_mode():
        expected = checkpoint.model(checkpoint.preprocessing.at(24)(decode(file))[None]).softmax(1)
    for size, same in ((24, True), (None, False)):
        (result,) = dynamixer.predict([file], model, device="cpu", size=size).results
        assert bool(abs(result.top[0].probability - float(expected.max())) < 1e-5) == same


def test_bad_pictures_stand_under_errors_and_the_order_stays(model, tmp_path):
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    found = dynamixer.predict([tmp_path, tmp_path / "gone.png"], model, device="cpu")
    assert [Path(r.path).name for r in found.results] == ["a.png", "c.png"]
    assert len(found.errors) == 2
    assert "b.png is empty" in found.errors[0]
    assert "gone.png does not exist" in found.errors[1]
    assert found.to_dict()["results"][0]["top"][0]["label"] in "abc"


def test_folders_are_searched_through_and_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "z.PNG")
    assert find_pictures([tmp_path]) == [tmp_path / "in" / "z.PNG"]
    assert capsys.readouterr().err == ""
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    assert find_pictures([tmp_path]) == [tmp_path / "in" / "z.PNG"]
    said = f"left out what is not a picture: 2 in {tmp_path}, the first is {tmp_path / 'link.jpg'}"
    assert said in capsys.readouterr().err


def test_answers_that_are_no_numbers_are_a_failure(model, tmp_path):
    checkpoint = dynamixer.load(model)
    weights = {key: value * 1e30 for key, value in checkpoint.model.state_dict().items()}
    about = {"name": "dynamixer_nano", "args": ARGS, "classes": ("a", "b", "c"), "trained": {}}
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, weights, preprocessing=checkpoint.preprocessing, **about)
    for call in (
        lambda: dynamixer.predict([EXAMPLES], path, device="cpu"),
        lambda: dynamixer.predict_many([EXAMPLES], path, tmp_path / "p.parquet", device="cpu"),
        lambda: explain(sorted(EXAMPLES.glob("*.png"))[0], path, out=tmp_path / "explained", device="cpu"),
    ):
        with pytest.raises(dynamixer.RunError, match="numbers that are not finite"):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_name_that_is_no_utf_8_is_drawn_with_a_mark(model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "caf\udce9.png")
    dynamixer.predict([tmp_path], model, device="cpu", sheet=tmp_path / "sheet" / "sheet.png")
    assert (tmp_path / "sheet" / "sheet.png").stat().st_size > 1000


def test_what_cannot_be_predicted_is_refused(model, tmp_path):
    with pytest.raises(dynamixer.UserError, match=r"x.png cannot be written: .* is no folder"):
        dynamixer.predict([EXAMPLES], model, sheet=model / "x.png")
    with pytest.raises(dynamixer.UserError, match="one of the paths is empty"):
        dynamixer.predict([""], model)
    with pytest.raises(dynamixer.UserError, match="has no pictures"):
        dynamixer.predict([tmp_path], model)
    with pytest.raises(dynamixer.UserError, match="no pictures were given"):
        dynamixer.predict([], model)
    with pytest.raises(dynamixer.UserError, match="above 0"):
        dynamixer.predict([EXAMPLES], model, top=0)
    with pytest.raises(dynamixer.UserError, match=r"end in .png"):
        dynamixer.predict([EXAMPLES], model, sheet=tmp_path)


def test_one_path_may_be_given_alone(model):
    file = sorted(EXAMPLES.glob("*.png"))[0]
    assert [r.path for r in dynamixer.predict(str(file), model, device="cpu").results] == [str(file)]


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path):
    classes = open_data("fashion-mnist-mini").test.classes
    args = {"num_classes": len(classes), "depth": 1, "img_size": 32}
    made = timm.create_model("vit_tiny_patch16_224", **args)
    about = {"name": "vit_tiny_patch16_224", "args": args}
    path = tmp_path / "vit.safetensors"
    save_checkpoint(
        path, made.state_dict(), classes=classes, trained={}, preprocessing=Preprocessing.of(made).at(32), **about
    )
    for run in (
        lambda: dynamixer.predict([EXAMPLES], path, size=64, device="cpu"),
        lambda: dynamixer.predict_many(EXAMPLES, path, tmp_path / "x.parquet", size=64, device="cpu"),
        lambda: dynamixer.evaluate(path, "fashion-mnist-mini", size=64, device="cpu"),
    ):
        with pytest.raises(UserError, match="does not take pictures of 64x64"):
            run()
