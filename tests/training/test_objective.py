"""What a step minimises."""

import pytest
import torch

from dynamixer import TrainConfig, UserError
from dynamixer.layers import AxisMixer
from dynamixer.training.objective import make_task
from small_models import saved, small


@pytest.mark.parametrize(
    ("kernel", "precision", "fused"), [("auto", "fp32", True), ("off", "fp32", False), ("auto", "fp64", False)]
)
def test_a_teacher_is_computed_by_the_kernels_too(tmp_path, kernel, precision, fused):
    config = TrainConfig(teacher=str(saved(tmp_path)), kernel=kernel, precision=precision)
    task = make_task(config, small(), ("a", "b", "c"), [(16, 16)], torch.device("cpu"))
    assert {part.fused for part in task.teacher.modules() if isinstance(part, AxisMixer)} == {fused}


def test_a_teacher_answers_in_the_order_of_the_data(tmp_path):
    config = TrainConfig(teacher=str(saved(tmp_path)))
    x = torch.randn(2, 3, 16, 16)
    one, other = (
        make_task(config, small(), classes, [(16, 16)], torch.device("cpu")).teacher for classes in ("abc", "cab")
    )
    assert torch.equal(other(x), one(x)[:, [2, 0, 1]])
    assert not torch.equal(other(x), one(x))


@pytest.mark.parametrize("teacher", ["run", "dynamixer_nano"])
def test_a_teacher_of_as_many_other_classes_is_refused(tmp_path, teacher):
    name, classes = (str(saved(tmp_path)), "abd") if teacher == "run" else (teacher, "abcdefghij")
    with pytest.raises(UserError, match="knows other classes than the data"):
        make_task(TrainConfig(teacher=name), small(), tuple(classes), [(16, 16)], torch.device("cpu"))
