"""The house: names, direction of imports, what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import timm

import dynamixer

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "dynamixer"


def test_the_public_names_are_these():
    assert sorted(dynamixer.__all__) == [
        "Checkpoint", "DynaMixer", "RECIPES", "RunError", "TrainConfig", "UserError", "count", "evaluate", "export",
        "load", "load_official", "mixing_matrices", "optimize", "predict", "predict_many", "push", "receptive", "train",
        "use_kernel",
    ]  # fmt: skip
    assert all(hasattr(dynamixer, name) for name in dynamixer.__all__)


def test_the_keys_of_the_state_dict_are_these():
    model = timm.create_model("dynamixer_nano", device="meta", static=True)
    layer = [
        key.removeprefix("stages.1.blocks.0.") for key in model.state_dict() if key.startswith("stages.1.blocks.0.")
    ]
    mixer = ["static", *(f"{part}.{kind}" for part in ("reduce", "generate", "project") for kind in ("weight", "bias"))]
    assert layer == [
        "norm1.weight", "norm1.bias",
        *(f"mixer.column.{key}" for key in mixer), *(f"mixer.row.{key}" for key in mixer),
        "mixer.channel.weight",
        "mixer.reweight.fc1.weight", "mixer.reweight.fc1.bias", "mixer.reweight.fc2.weight", "mixer.reweight.fc2.bias",
        "mixer.project.weight", "mixer.project.bias",
        "norm2.weight", "norm2.bias",
        "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    outside = {key.split(".")[0] for key in model.state_dict()}
    assert outside == {"patch_embed", "stages", "norm", "head"}


# What each part may import of ours, besides itself.
ALLOWED = {
    "native": {"errors"},
    "ops": {"native", "errors"},
    "mixing": {"errors"},
    "fuse": {"ops"},
    "layers": {"fuse", "mixing", "ops", "native", "errors"},
    "models": {"layers", "mixing", "ops", "errors", "files", "data.preprocess"},
    "data": {"errors", "logs", "files", "progress"},
}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    files = [SRC / f"{part}.py"] if (SRC / f"{part}.py").exists() else sorted((SRC / part).glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            for name in names if isinstance(node, ast.Import | ast.ImportFrom) else []:
                if name.startswith("dynamixer."):
                    inner = name.removeprefix("dynamixer.")
                    assert any(inner == p or inner.startswith(f"{p}.") for p in {part, *ALLOWED[part]}), (
                        f"{file.name}: {name}"
                    )


def test_no_file_grows_beyond_a_sitting():
    assert {p.name: n for p in SRC.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350} == {}


def test_other_packages_add_models_and_cannot_break_ours(monkeypatch, tmp_path):
    loaded = []

    class Offer:
        value = "other.models"

        def load(self):
            loaded.append(1)
            raise ImportError("their mistake")

    monkeypatch.setattr(dynamixer, "entry_points", lambda group: [Offer()] if group == "dynamixer.models" else [])
    with pytest.warns(UserWarning, match=r"other.models could not be loaded.*their mistake"):
        dynamixer._load_model_plugins()
    assert loaded == [1]
    (tmp_path / "their_models.py").write_text(
        "from timm.models import register_model\n"
        "@register_model\n"
        "def their_mixer(pretrained=False, **kwargs):\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dynamixer, "plugin_models", [])
    good = EntryPoint("x", "their_models", "dynamixer.models")
    monkeypatch.setattr(dynamixer, "entry_points", lambda group: [good])
    dynamixer._load_model_plugins()
    assert dynamixer.plugin_models == ["their_mixer"]
    assert timm.is_model("their_mixer")


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_wheel_trains_and_predicts_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    source = ROOT / "src"
    files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {str(path.relative_to(source)) for path in files} <= set(names)
    assert {"dynamixer/ops/csrc/layer.cpp", "dynamixer/serve/page/index.html", "dynamixer/py.typed"} <= set(names)
    for licence in ("data/fashion/LICENSE", "serve/photos/LICENSE"):
        assert any(name.endswith(f"licenses/src/dynamixer/{licence}") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if "fashion/" in i.filename) < 6e6
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)

    def command(*words):
        environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("-c", "import dynamixer; print(dynamixer.__file__)").startswith(str(site))
    command("-m", "dynamixer", "train", "fashion_nano", "epochs=1", "limit_train=256", "--out", "run")
    picture = ROOT / "examples/pictures/bag.png"
    assert "bag.png: " in command("-m", "dynamixer", "predict", str(picture), "--model", "run")
    assert "bag.png: " in command("-m", "dynamixer", "predict", str(picture))


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_timms_own_model_tests_pass():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/timm_tests.py", "-q"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
