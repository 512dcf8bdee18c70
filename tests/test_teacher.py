"""The teachers of the weights that ship (tools/teacher.py)."""

import importlib
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

import dynamixer
from helpers import shared_data

TOOL = Path(__file__).parents[1] / "tools/teacher.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return importlib.import_module("teacher")  # once: timm warns of a second network of the same name


@pytest.mark.parametrize(("patch", "stride"), [(2, 1), (3, 2)])
def test_the_first_batch_decides_how_patches_are_whitened(tool, patch, stride):
    torch.manual_seed(0)
    size = 3 * patch**2
    whitening = tool.Whitening(patch, stride)
    pictures = torch.randn(64, 3, 17, 17).cumsum(-1).cumsum(-2)  # neighbours alike, as in pictures
    found = whitening(pictures)
    places = (17 - patch) // stride + 1
    assert found.shape == (64, 2 * size, places, places)
    axes = F.conv2d(pictures, whitening.kernels).transpose(0, 1).reshape(2 * size, -1)
    assert torch.allclose(axes[:size], -axes[size:], atol=1e-4)
    assert torch.allclose(axes[:size].cov(), torch.eye(size), atol=5e-3)
    before = whitening.kernels.clone()
    whitening(2 * pictures)
    assert whitening.kernels.equal(before)


@pytest.mark.parametrize(("name", "size"), [("teacher_cifar10", 32), ("teacher_imagenette", 128)])
def test_a_teacher_is_as_large_as_its_page_says_and_comes_back_from_its_state(tool, name, size):
    torch.manual_seed(0)
    model = timm.create_model(name)
    model(torch.randn(8, 3, size, size))
    found = dynamixer.count(model)
    page = " ".join(tool.__doc__.split())
    assert (
        f"{found.parameters / 1e6:.0f}M parameters and {found.multiply_adds / 1e6:.0f}M multiply-adds at {size} px"
        in page
    )
    again = timm.create_model(name)
    again.load_state_dict(model.state_dict())
    pictures = torch.randn(2, 3, size, size)
    assert again.eval()(pictures).equal(model.eval()(pictures))


def test_only_a_distilled_run_is_compared_with_others(tool, tmp_path):
    ship = importlib.import_module("ship")
    runs = []
    for name, teacher in [("first", "null"), ("second", "null"), ("third", "runs/big"), ("fourth", "runs/bigger")]:
        runs.append(str(tmp_path / name))
        Path(runs[-1]).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"teacher: {teacher}\n")
    assert ship.compared(runs[:2]) == {}
    assert ship.compared(runs) == {"undistilled_top1": runs[1], "teacher_top1": "runs/bigger"}


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("teacher", "student", "pictures"),
    [
        ("teacher_cifar10", "dynamixer_nano", "cifar10/test.parquet"),
        ("teacher_imagenette", "dynamixer_tiny", "imagenette128/val.parquet"),
    ],
)
def test_a_teacher_that_is_kept_is_as_good_as_the_table_says(tool, teacher, student, pictures):
    shipped = dynamixer.load(student)
    kept = TOOL.with_name(f"{teacher}.safetensors")
    found = dynamixer.evaluate(kept, shared_data(pictures), size=shipped.preprocessing.size)
    assert found["top1"] == pytest.approx(shipped.trained["teacher_top1"], abs=0.1)
