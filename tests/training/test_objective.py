"""What a step minimises."""

import pytest
import torch

from dynamixer import TrainConfig
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
