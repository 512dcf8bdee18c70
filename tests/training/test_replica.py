"""What every process holds of the model: how it is sped up."""

from types import SimpleNamespace

import pytest
import torch

from dynamixer.training import TrainConfig
from dynamixer.training.replica import _speed_up
from small_models import small


@pytest.mark.parametrize(
    ("sizes", "says"), [((), ""), ((32,), ""), ((24, 32, 48), "those of 24, 48 px are computed without it, slower")]
)
def test_sizes_that_the_kernel_does_not_mix_are_named(sizes, says, capsys):
    model = small(img_size=32)
    _speed_up(TrainConfig(sizes=sizes, kernel="auto"), model, SimpleNamespace(device=torch.device("cpu")))
    told = capsys.readouterr().err.replace("\n", " ")
    assert says in told
    assert bool(says) == ("kernel mixes" in told)
