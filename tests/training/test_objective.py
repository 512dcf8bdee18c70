"""What a step minimises."""

import shutil

import pytest
import torch

from dynamixer import TrainConfig, UserError
from dynamixer.layers import AxisMixer
from dynamixer.training.objective import digest_of_teacher, make_task
from helpers import error
from small_models import saved, small

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kernel", "precision", "fused"), [("auto", "fp32", True), ("off", "fp32", False), ("auto", "fp64", False)]
)
def test_a_teacher_is_computed_by_the_kernels_too(tmp_path, kernel, precision, fused):
    config = TrainConfig(teacher=str(saved(tmp_path)), kernel=kernel, precision=precision)
    task = make_task(config, small(), ("a", "b", "c"), [(16, 16)], CPU)
    assert {part.fused for part in task.teacher.modules() if isinstance(part, AxisMixer)} == {fused}


def test_a_teacher_answers_in_the_order_of_the_data(tmp_path):
    config = TrainConfig(teacher=str(saved(tmp_path)))
    x = torch.randn(2, 3, 16, 16)
    one, other = (make_task(config, small(), classes, [(16, 16)], CPU).teacher for classes in ("abc", "cab"))
    assert torch.equal(other(x), one(x)[:, [2, 0, 1]])
    assert not torch.equal(other(x), one(x))


@pytest.mark.parametrize("teacher", ["run", "dynamixer_nano"])
def test_a_teacher_of_as_many_other_classes_is_refused(tmp_path, teacher):
    name, classes = (str(saved(tmp_path)), "abd") if teacher == "run" else (teacher, "abcdefghij")
    with pytest.raises(UserError, match="knows other classes than the data"):
        make_task(TrainConfig(teacher=name), small(), tuple(classes), [(16, 16)], CPU)


def test_the_divergence_from_a_near_teacher_is_not_lost_in_bf16(tmp_path, monkeypatch):
    """Of the same bf16 logits the loss and its gradient are as in fp64, to fp32's rounding."""
    task = make_task(TrainConfig(teacher=str(saved(tmp_path)), distill=1.0), small(), tuple("abc"), [(16, 16)], CPU)
    theirs = (3 * torch.randn(8, 3)).bfloat16()
    mine = (theirs.float() + 0.05 * torch.randn(8, 3)).bfloat16().requires_grad_()
    monkeypatch.setattr(task.trainable_module, "forward", lambda _: mine)
    monkeypatch.setattr(task.teacher, "forward", lambda *_, **__: theirs)
    with torch.autocast("cpu", torch.bfloat16):
        found = task(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long))["loss"]
    found.backward()
    exact = mine.detach().double().requires_grad_()
    shares = theirs.double().softmax(-1)
    expected = (shares * (shares.log() - exact.log_softmax(-1))).sum(-1).mean()
    expected.backward()
    assert 1e-5 < expected < 1e-2
    assert abs(found - expected) < 1e-3 * expected
    assert error(mine.grad.double(), exact.grad) < 0.01  # the gradient is rounded to bf16 in the end


def test_a_teacher_is_known_again_by_its_weights(tmp_path):
    path = saved(tmp_path)
    config, again = (
        TrainConfig(teacher=str(path)),
        TrainConfig(teacher=str(shutil.copy(path, tmp_path / "copy.safetensors"))),
    )
    tasks = [make_task(one, small(), tuple("abc"), [(16, 16)], CPU) for one in (config, again, config)]
    with torch.no_grad():
        next(tasks[2].teacher.parameters())[0] += 1e-3
    first, same, other = map(digest_of_teacher, tasks)
    assert first == same != other
    assert digest_of_teacher(make_task(TrainConfig(), small(), tuple("abc"), [(16, 16)], CPU)) is None


def test_a_teacher_of_another_size_is_warned_of(tmp_path, capsys):
    make_task(TrainConfig(teacher=str(saved(tmp_path))), small(), tuple("abc"), [(24, 24)], CPU)
    assert "was trained at 16x16 and is asked at 24x24, where it may know less" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/run", "dynamixer_s"])
def test_a_teacher_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"teacher={name}: there is no such run folder or checkpoint"):
        make_task(TrainConfig(teacher=name), small(), tuple("abc"), [(16, 16)], CPU)
