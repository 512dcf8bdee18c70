import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dynamixer
from dynamixer.data import Preprocessing
from dynamixer.errors import RunError, UserError
from dynamixer.explain import look, page, report
from dynamixer.explain.page import notes, photo_of
from dynamixer.explain.report import explain
from dynamixer.models.checkpoint import save_checkpoint
from dynamixer.training.report import MARK
from small_models import BAG, EXAMPLES, OPTIONS, pictures, saved, small


class Addresses(HTMLParser):
    """Every address in a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]


def test_the_page_holds_every_picture_and_asks_nothing_of_the_network(tmp_path):
    found = explain(
        BAG, saved(tmp_path), out=tmp_path / "out", pictures=EXAMPLES, token=(1, 7), blocks=[0, -1], device="cpu"
    )
    names = [Path(file).name for file in found.files]
    assert names == [
        "picture.png", "receptive.png", "token-00.png", "matrices-00.png", "token-02.png", "matrices-02.png",
        "branches.png", "entropy.png", "dynamic.png", "report.html",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    for file in found.files[:-1]:
        assert np.asarray(Image.open(file).convert("L")).std() > 5
    page = Path(found.files[-1]).read_text()
    addresses = Addresses(page).found
    assert sum(a.startswith("data:image/png;base64,") for a in addresses) == 9
    assert all(a.startswith("data:") for a in addresses)
    assert "<script" not in page
    assert "stages.1.blocks.1" in page
    assert "leaves out the MLPs" in page
    assert found.pictures == 10
    assert found.receptive["token"] == (0, 3)
    assert all(0 < row["dynamic_row"] < 1 for row in found.blocks)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["top"][0]["label"] in "abc"
    assert again["blocks"][2]["grid"] == "4x4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generator": "static"}, "no content"),
        ({"softmax": False}, "weights may be negative"),
        ({"row": False}, "no row branch"),
        ({"column": False}, "no column branch"),
        ({"channel": False}, "no channel branch"),
        ({"reweight": False}, "sums its branches"),
        ({}, None),
    ],
)
def test_what_is_special_of_a_model_is_said(options, words):
    found = notes(look(small(**options), pictures(count=1)))
    assert found == [] if words is None else (len(found) == 1 and words in found[0])


def test_it_is_said_beside_the_first_picture_and_the_figures_follow(tmp_path):
    options = {"generator": "static", "softmax": False, "row": False, "reweight": False}
    found = explain(BAG, saved(tmp_path, **options), out=tmp_path / "out", blocks=[1], size=20, device="cpu")
    assert len(found.notes) == 4
    page = Path(found.files[-1]).read_text()
    first = html.unescape(page.split("<section")[1])
    assert all(note in first for note in found.notes)
    assert page.count("the same for every picture") >= 3
    assert page.count("Red weights add") == 2 * 2  # captions, and the words for those who do not see the pictures
    assert [Path(f).stem for f in found.files] == [
        "picture",
        "receptive",
        "token-01",
        "matrices-01",
        "entropy",
        "report",
    ]
    assert set(found.blocks[0]) == {"block", "name", "grid", "segments", "entropy_row", "entropy_column"}
    assert found.blocks[0]["entropy_row"] is None
    assert found.size == (20, 20)


def test_what_does_not_exist_for_one_token_is_a_dash(tmp_path):
    found = explain(BAG, saved(tmp_path), out=tmp_path / "out", blocks=[0], size=2, device="cpu")
    assert found.receptive["rank_correlation"] is None
    words = html.unescape(re.sub('data:[^"]*', "", Path(found.files[-1]).read_text()))
    assert "Rank correlation of rollout and gradient: - (- with even weights" in words
    assert not re.search(r"\bnan\b", words)


@pytest.mark.heavy
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_is_drawn(tmp_path, options):
    model = saved(tmp_path, **options)
    found = explain(BAG, model, out=tmp_path / "out", pictures=EXAMPLES, blocks=[0, -1], size=21, device="cpu")
    assert all(np.asarray(Image.open(file).convert("L")).std() > 5 for file in found.files[:-1])
    assert found.pictures == 10


def test_the_photograph_is_the_crop_that_the_network_sees():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 18, 3), dtype=np.uint8)).resize((450, 200))
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((64, 64), half, half, crop_pct=0.9)
    seen = preprocessing(picture)
    photo = photo_of(picture, preprocessing, (64, 64))
    assert min(photo.picture.size) >= 512
    shrunk = np.asarray(photo.picture.resize((64, 64), Image.Resampling.BOX)) / 255
    expected = ((seen + 1) / 2).permute(1, 2, 0).numpy()
    assert np.corrcoef(shrunk.flatten(), expected.flatten())[0, 1] > 0.97
    large = Preprocessing((100, 8192), half, half)
    assert photo_of(picture, large, (100, 8192)).picture.size == (8192, 100)


@pytest.fixture
def _undrawn(monkeypatch):
    monkeypatch.setattr(report, "write_page", lambda folder, *_: [str(folder / "report.html")])


@pytest.mark.usefixtures("_undrawn")
def test_pictures_that_cannot_be_read_are_named_and_left_out(tmp_path):
    folder = tmp_path / "photos" / "inside"
    folder.mkdir(parents=True)
    for i, name in enumerate("abc"):
        Image.new("RGB", (30, 20), (80 * i, 0, 0)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"oops")
    model = saved(tmp_path)
    found = explain(BAG, model, out=tmp_path / "out", pictures=tmp_path / "photos", batch_size=2, device="cpu")
    assert found.pictures == 3
    assert len(found.skipped) == 1
    assert "broken.png" in found.skipped[0]
    limited = explain(BAG, model, out=tmp_path / "out", pictures="fashion-mnist-mini", limit=5, device="cpu")
    assert limited.pictures == 5


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    model = saved(tmp_path)
    other = tmp_path / "resnet.safetensors"
    resnet = timm.create_model("resnet10t", num_classes=2)
    about = {"name": "resnet10t", "args": {"num_classes": 2}, "classes": ("a", "b"), "trained": {}}
    save_checkpoint(other, resnet.state_dict(), preprocessing=Preprocessing.of(resnet), **about)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "a.png")
    (tmp_path / "file").touch()
    mine = tmp_path / "token-03.png"
    Image.new("RGB", (9, 9)).save(mine)
    out = {"out": tmp_path / "out", "device": "cpu"}
    for call, words in (
        (lambda: explain(tmp_path / "gone.png", model, **out), "gone.png does not exist"),
        (lambda: explain(BAG, tmp_path / "gone", **out), "there is no"),
        (lambda: explain(BAG, other, **out), "resnet10t is not a DynaMixer"),
        (lambda: explain(BAG, model, **out, token=(8, 0)), r"no token \(8, 0\): this grid has 8 rows and 8 columns"),
        (lambda: explain(BAG, model, **out, blocks=[7]), "no block 7"),
        (lambda: explain(BAG, model, **out, pictures=tmp_path / "one"), "has one picture"),
        (lambda: explain(BAG, model, **out, pictures=tmp_path / "gone"), "no file or folder"),
        (lambda: explain(BAG, model, **out, limit=1), "limit=1"),
        (lambda: explain(BAG, model, **out, size=0), "size"),
        (lambda: explain(BAG, model, out=tmp_path / "file"), "file is a file"),
        (lambda: explain(mine, model, out=tmp_path), "token-03.png would be overwritten: give --out another"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_undrawn")
def test_nothing_of_others_is_written_over(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="holds a trained model, whose report would be overwritten"):
        explain(BAG, tmp_path / "model.safetensors", out=tmp_path)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/picture.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holiday/picture\.png would be overwritten"):
        explain(BAG, tmp_path / "model.safetensors", out=tmp_path / "holiday")
    assert (tmp_path / "holiday/picture.png").read_bytes() == b"mine"
    (tmp_path / "work").mkdir()
    (tmp_path / "work/report.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match=r"work/report\.html would be overwritten"):
        explain(BAG, tmp_path / "model.safetensors", out=tmp_path / "work")
    with pytest.raises(UserError, match=r"report\.html is no folder"):
        explain(BAG, tmp_path / "model.safetensors", out=tmp_path / "work/report.html/inside")


def test_a_folder_has_the_pictures_of_one_explanation_or_none(tmp_path, monkeypatch):
    model, out = saved(tmp_path), tmp_path / "out"

    def broken(*_, **__):
        raise RunError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(page, "write_report", broken)
        with pytest.raises(RunError, match="full"):
            explain(BAG, model, out=out, blocks=[0])
    assert [*out.iterdir()] == []
    explain(BAG, model, out=out, blocks=[0], pictures="fashion-mnist-mini", limit=2)
    before = {path.name for path in out.iterdir()}
    assert {"token-00.png", "dynamic.png"} <= before
    (out / "notes.png").write_bytes(b"mine")
    found = explain(BAG, model, out=out, blocks=[1])
    assert {path.name for path in out.iterdir()} == {*(Path(file).name for file in found.files), "notes.png"}
    assert "token-01.png" in {Path(file).name for file in found.files}
    with monkeypatch.context() as patch:
        patch.setattr(page, "write_report", broken)
        with pytest.raises(RunError, match="full"):
            explain(BAG, model, out=out, blocks=[1])
    assert (out / "report.html").exists()
    assert (out / "token-01.png").exists()


@pytest.mark.usefixtures("_undrawn")
def test_pictures_are_a_data_set_s_evaluation_split_or_a_folder_s_own_without_ours(tmp_path):
    model = saved(tmp_path)
    for name in (
        "train/a/1",
        "train/b/1",
        "val/a/1",
        "val/a/2",
        "val/b/1",
        "photos/1",
        "photos/2",
        "photos/out/picture",
    ):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    (tmp_path / "photos/made.parquet").touch()
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / "data" / split)
    assert explain(BAG, model, out=tmp_path / "o", pictures=tmp_path / "data").pictures == 3
    (tmp_path / "photos/out/report.html").write_text(MARK)
    assert explain(BAG, model, out=tmp_path / "photos/out", pictures=tmp_path / "photos").pictures == 2


def test_a_name_that_is_no_utf8_or_looks_like_a_formula_is_shown(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9_$5_and_$6.png")
    odd.write_bytes(BAG.read_bytes())
    saved(tmp_path)
    explain(odd, tmp_path / "model.safetensors", out=tmp_path / "out")
    assert "How caf\N{REPLACEMENT CHARACTER}_$5_and_$6.png is mixed" in (tmp_path / "out/report.html").read_text()


def test_a_picture_of_the_native_size_gives_the_answer_of_predict(tmp_path):
    model = saved(tmp_path)
    found = explain(BAG, model, out=tmp_path / "out", device="cpu", blocks=[0])
    (predicted,) = dynamixer.predict([BAG], model, device="cpu").results
    assert [g.label for g in found.top] == [g.label for g in predicted.top]
    assert torch.allclose(
        torch.tensor([g.probability for g in found.top]),
        torch.tensor([g.probability for g in predicted.top]),
        atol=1e-6,
    )
