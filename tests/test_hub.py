"""Models shared: a folder that timm reads, a card, an upload to a stand-in hub and back."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from PIL import Image

import dynamixer
from dynamixer import UserError
from dynamixer.data import Preprocessing
from dynamixer.hub import timm_config, write_folder
from dynamixer.models.checkpoint import create_model, save_checkpoint
from helpers import sharpen
from hub_server import hub

ARGS = {
    "num_classes": 3,
    "depths": [1, 1],
    "dims": [16, 32],
    "segments": [2, 4],
    "img_size": [40, 24],
    "softmax": False,
}
HELD = {"top1": 91.25, "top5": 99.0, "loss": 0.25, "ece": 1.5, "images": 800}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "flowers"
    model = sharpen(create_model("dynamixer_nano", **ARGS)).eval()
    pre = Preprocessing((40, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8)
    save_checkpoint(
        folder / "best.safetensors", model.state_dict(), name="dynamixer_nano", args=ARGS, classes=("rose", "a*b", "ü"),
        preprocessing=pre, trained={"data": "/home/me/flowers", "epoch": 3, "epochs": 9, "seed": 4, "held_out": HELD},
    )  # fmt: skip
    (folder / "config.yaml").write_text("data: /home/me/flowers\nweights: /home/me/runs/first\nlr: 0.002\nepochs: 9\n")
    return folder


def test_timms_own_loader_reads_the_folder(run, tmp_path):
    folder = write_folder(run, tmp_path / "flowers-hub")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    ours = dynamixer.load(run)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 40, 24)
    assert torch.equal(theirs(x), ours.model(x))
    assert theirs.pretrained_cfg["label_names"] == ["rose", "a*b", "ü"]
    config = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**config)
    picture = Image.effect_mandelbrot((99, 70), (-2, -1, 1, 1), 40).convert("RGB")
    assert torch.equal(transform(picture), ours.preprocessing(picture))
    again = dynamixer.load(folder)
    assert (again.classes, again.trained, again.args) == (ours.classes, ours.trained | {"data": "flowers"}, ours.args)
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert fresh(x).shape == (2, 7)
    assert write_folder(run, folder) == folder  # again, over itself
    (folder / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        write_folder(run, folder)


def test_what_timm_saves_is_read(tmp_path):
    model = timm.create_model("dynamixer_nano", **ARGS)
    sharpen(model)
    timm.models.save_for_hf(
        model,
        tmp_path / "timms",
        safe_serialization=True,
        model_args=ARGS,
        model_config={"label_names": ["x", "y", "z"]},
    )
    loaded = dynamixer.load(tmp_path / "timms")
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(loaded.model(x), model.eval()(x))
    assert loaded.classes == ("x", "y", "z")


def test_the_card_says_what_is_known_and_no_path_of_this_machine(run, tmp_path):
    card = (write_folder(run, tmp_path / "hub", name="me/flowers", license="cc-by-4.0") / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "cc-by-4.0"
    assert about["library_name"] == "timm"
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9125
    for words in (
        "# flowers", "hf-hub:me/flowers", "rose, a\\*b, ü", "91.25 %", "Data: flowers", "epoch 3 of 9", "lr: 0.002",
        "weights: first", "## Limits", "cc-by-4.0", "@inproceedings", "arxiv.org/abs/2201.12083", "40x24",
    ):  # fmt: skip
        assert words in body, words
    assert "/home" not in card
    assert not re.search(r"[^ ]None", body)


def test_what_a_kill_left_in_the_folder_does_not_stop_the_next_try(run, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/.model.safetensors.abcdefgh.safetensors").touch()
    assert (write_folder(run, tmp_path / "f") / "model.safetensors").exists()
    (tmp_path / "f/notes.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        write_folder(run, tmp_path / "f")


def test_private_weights_are_not_put_where_everybody_reads_them(run, monkeypatch):
    class Public:
        def __init__(self, **_):
            pass

        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def model_info(self, _):
            return SimpleNamespace(private=False)

    monkeypatch.setattr("huggingface_hub.HfApi", Public)  # which would fail at anything else
    with pytest.raises(UserError, match="is there and public"):
        dynamixer.push(run, "me/flowers", private=True)


def test_what_others_wrote_is_not_written_over(run, tmp_path):
    (tmp_path / "README.md").write_text("notes")
    with pytest.raises(UserError, match="holds something else"):
        write_folder(run, tmp_path)
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="holds something else"):
        write_folder(run, tmp_path)
    assert (tmp_path / "README.md").read_text() == "notes"


def test_a_card_says_what_is_not_known(tmp_path):
    model = create_model("dynamixer_nano", **ARGS)
    save_checkpoint(
        tmp_path / "x.safetensors", model.state_dict(), name="dynamixer_nano", args=ARGS, classes=("a", "b", "c"),
        preprocessing=Preprocessing.of(model).at((40, 24)), trained={"held_out": None},
    )  # fmt: skip
    card = (write_folder(tmp_path / "x.safetensors", tmp_path / "hub") / "README.md").read_text()
    assert "Data: unknown. Seed unknown, dynamixer" in card
    assert "nothing was measured" in card
    assert "model-index" not in card


def test_a_network_that_does_not_say_how_many_features_it_has_is_described_too(run):
    checkpoint = dynamixer.load(run)
    assert timm_config(checkpoint)["num_features"] == checkpoint.model.num_features
    del checkpoint.model.num_features
    assert "num_features" not in timm_config(checkpoint)


ROUND = """
import json, sys, timm, torch, dynamixer
run, address = sys.argv[1:]
url = dynamixer.push(run, "me/flowers", private=True)
theirs = timm.create_model("hf-hub:me/flowers", pretrained=True).eval()
ours = dynamixer.load("hf-hub:me/flowers")
x = torch.randn(2, 3, 40, 24)
assert torch.equal(theirs(x), ours.model(x))
assert torch.equal(ours.model(x), dynamixer.load(run).model(x))
said = []
for model in ("hf-hub:me/flowers@main", "hf-hub:flowers", "hf-hub:../../etc/passwd", "hf-hub:me/a b"):
    try:
        said.append(str(dynamixer.load(model).path.name))
    except dynamixer.UserError as error:
        said.append(str(error))
dynamixer.push(run, "me/flowers", message="again")
import os
os.environ["HF_TOKEN"] = "hf_bad"
try:
    dynamixer.push(run, "me/flowers")
except dynamixer.UserError as error:
    said.append(str(error))
print(json.dumps({"url": url, "said": said}))
"""


@pytest.mark.timeout(200)
def test_what_is_pushed_comes_back_through_the_hub(run, tmp_path):
    with hub() as server:
        environment = {
            **os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_good",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", ROUND, run, server.address],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:] + str(server.asked)
        result = json.loads(done.stdout)
        assert set(server.files) == {"README.md", "config.json", "model.safetensors"}
        assert server.private == {"me/flowers": True}
        assert server.messages == ["Add the model", "again"]
        assert b"hf-hub:me/flowers" in server.files["README.md"]
        assert result["url"].endswith("me/flowers")
        assert result["said"][0] == "model.safetensors"
        assert all("has to be hf-hub:OWNER/NAME" in text for text in result["said"][1:4])
        assert "hf auth login" in result["said"][4]
        fetched = {path.partition("?")[0].rpartition("/")[2] for verb, path, _ in server.asked if "/resolve/" in path}
        assert fetched <= {"model.safetensors", "config.json", "README.md"}  # nothing else of a stranger's is fetched
        assert "/resolve/" not in "".join(path for verb, path, _ in server.asked if "passwd" in path)
        server.files["README.md"] = b"mine"
        words = [sys.executable, "-m", "dynamixer", "push", run, "me/flowers", "--json"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["url"].endswith("me/flowers")
        assert server.files["README.md"] == b"mine"


def test_the_card_says_nothing_of_a_file_that_is_not_the_runs(tmp_path):
    made = timm.create_model("test_vit", num_classes=2)
    about = {"name": "test_vit", "args": {"num_classes": 2}, "classes": ("a", "b"), "trained": {}}
    for name in ("best.safetensors", "loose.safetensors"):
        save_checkpoint(tmp_path / name, made.state_dict(), preprocessing=Preprocessing.of(made), **about)
    (tmp_path / "config.yaml").write_text("lr: 0.002\n")
    cards = [
        (write_folder(tmp_path / name, tmp_path / f"{name}-hub") / "README.md").read_text()
        for name in ("best.safetensors", "loose.safetensors")
    ]
    assert [("lr: 0.002" in card) for card in cards] == [True, False]
    assert not any("DynaMixer is" in card or "any size" in card or "@inproceedings" in card for card in cards)
    (tmp_path / "config.yaml").write_text("lr: 0.002\ndb: {password: hunter2}\n")
    card = (write_folder(tmp_path / "best.safetensors", tmp_path / "again-hub") / "README.md").read_text()
    assert "hunter2" not in card
