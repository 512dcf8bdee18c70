"""The teacher of nano's weights (tools/teacher.py)."""

import importlib
from pathlib import Path

import pytest
import timm
import torch

import dynamixer
from helpers import shared_data

TOOL = Path(__file__).parents[1] / "tools/teacher.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return importlib.import_module("teacher")  # once: timm warns of a second network of the same name


def test_the_first_batch_decides_how_patches_are_whitened(tool):
    torch.manual_seed(0)
    whitening = tool.Whitening()
    pictures = torch.randn(64, 3, 16, 16).cumsum(-1).cumsum(-2)  # neighbours alike, as in pictures
    axes = whitening(pictures).transpose(0, 1).reshape(24, -1)
    assert torch.allclose(axes[:12], -axes[12:], atol=1e-4)
    assert torch.allclose(axes[:12].cov(), torch.eye(12), atol=5e-3)
    before = whitening.kernels.clone()
    whitening(2 * pictures)
    assert whitening.kernels.equal(before)


def test_the_teacher_is_as_large_as_its_page_says_and_comes_back_from_its_state(tool):
    torch.manual_seed(0)
    model = timm.create_model(tool.NAME)
    model(torch.randn(8, 3, 32, 32))
    size = dynamixer.count(model)
    assert f"{size.parameters / 1e6:.0f}M parameters, {size.multiply_adds / 1e6:.0f}M" in tool.__doc__
    again = timm.create_model(tool.NAME)
    again.load_state_dict(model.state_dict())
    pictures = torch.randn(2, 3, 32, 32)
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
def test_the_teacher_that_is_kept_is_as_good_as_the_table_says(tool):
    found = dynamixer.evaluate(TOOL.with_name("teacher_cifar10.safetensors"), shared_data("cifar10/test.parquet"))
    assert found["top1"] == pytest.approx(dynamixer.load("dynamixer_nano").trained["teacher_top1"], abs=0.1)
