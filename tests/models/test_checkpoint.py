import json
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import dynamixer
from dynamixer import RunError, UserError
from dynamixer.data import Preprocessing
from dynamixer.files import is_leftover
from dynamixer.models.checkpoint import KEY, create_model, save_checkpoint
from helpers import sharpen

ARGS = {"num_classes": 3, "img_size": [40, 24], "softmax": False}


@pytest.fixture
def saved(tmp_path):
    model = sharpen(create_model("dynamixer_nano", **ARGS)).eval()
    path = tmp_path / "run" / "best.safetensors"
    about = {"name": "dynamixer_nano", "args": ARGS, "classes": ("a", "b", "c"), "trained": {"epoch": 4}}
    save_checkpoint(path, model.state_dict(), preprocessing=Preprocessing.of(model).at((40, 24)), **about)
    return model, path


def test_what_is_saved_comes_back(saved):
    model, path = saved
    loaded = dynamixer.load(path)
    x = torch.randn(2, 3, 40, 24)
    assert torch.equal(loaded.model(x), model(x))
    assert not loaded.model.training
    assert (loaded.name, loaded.args, loaded.classes, loaded.trained) == (
        "dynamixer_nano",
        ARGS,
        ("a", "b", "c"),
        {"epoch": 4},
    )
    assert loaded.preprocessing.size == (40, 24)
    assert dynamixer.load(path.parent).path == path
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]


def test_a_weight_that_is_not_finite_is_never_saved(saved, tmp_path):
    model, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(RunError, match=r"head.bias is not finite"):
        save_checkpoint(
            path, model.state_dict(), name="dynamixer_nano", args=ARGS, classes=("a", "b", "c"),
            preprocessing=Preprocessing.of(model), trained={},
        )  # fmt: skip
    assert path.read_bytes() == before


KILLED = """
import resource, signal, sys
from pathlib import Path
import torch
from dynamixer.data import Preprocessing
from dynamixer.models.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python asks to live on
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
kept = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
about = {"name": "dynamixer_nano", "args": {}, "classes": ("a", "b"), "trained": {}}
save_checkpoint(Path(sys.argv[1]), {"weight": torch.ones(1000)}, preprocessing=kept, **about)
"""


def test_what_a_kill_inside_a_write_leaves_is_known_as_a_leftover(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "best.safetensors")], check=False, timeout=100
    )
    assert killed.returncode == -signal.SIGXFSZ
    left = list(tmp_path.iterdir())
    assert left
    assert all(is_leftover(path) for path in left), left


def rewrite(path, weights=None, **change):
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[KEY]) | change
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(weights or kept, path, metadata={KEY: json.dumps(about)})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b"junk"), "not a whole safetensors file"),
        (lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p), "not written by dynamixer"),
        (lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p, metadata={KEY: "{"}), "damaged header"),
        (
            lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p, metadata={KEY: '{"format": 1}'}),
            "damaged header",
        ),
        (lambda p: rewrite(p, format=9), "format 9; this version reads 1"),
        (lambda p: rewrite(p, model="dynamixer_tiny"), "does not hold the weights of the dynamixer_tiny it names"),
        (lambda p: rewrite(p, model="os.system"), "unknown model"),
        (lambda p: rewrite(p, model_args={"num_classes": 3, "reduced": 4}), "does not hold the weights"),
        (lambda p: rewrite(p, preprocessing={"sizes": 3}), "damaged header"),
        (
            lambda p: rewrite(p, preprocessing={"size": [0, 3], "mean": [0] * 3, "std": [1] * 3}),
            "not a height and a width",
        ),
        (lambda p: rewrite(p, preprocessing={"size": [3, 3], "mean": [0], "std": [1] * 3}), "three channels"),
        (lambda p: rewrite(p, classes=["a", "b"]), "names 2 classes for a model of 3"),
        (lambda p: rewrite(p, classes=[1, 2, 3]), "no list of class names"),
        (lambda p: rewrite(p, model_args=None), "model arguments"),
        (lambda p: rewrite(p, model_args=ARGS | {"checkpoint_path": "/etc/passwd"}), "model arguments"),
        (lambda p: rewrite(p, model=3), "unknown model"),
    ],
)
def test_a_file_that_is_not_a_whole_checkpoint_of_ours_is_refused(saved, damage, sentence):
    _, path = saved
    damage(path)
    with pytest.raises(UserError, match=sentence):
        dynamixer.load(path)


def test_weights_that_are_not_finite_are_refused(saved):
    model, path = saved
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["head.bias"][0] = float("inf")
    rewrite(path, weights)
    with pytest.raises(UserError, match="not finite"):
        dynamixer.load(path)


def test_what_names_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"weights ship for .*dynamixer_tiny, none for dynamixer_s: train it"):
        dynamixer.load("dynamixer_s")
    with pytest.raises(UserError, match="is not a run folder"):
        dynamixer.load(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*gone"):
        dynamixer.load(tmp_path / "gone")


def test_models_of_timm_are_built_too():
    assert type(create_model("test_vit", num_classes=3)) is type(timm.create_model("test_vit"))
