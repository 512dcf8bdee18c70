"""What every process holds of the model: how it is sped up."""

from types import SimpleNamespace

import pytest
import torch

from dynamixer.training import TrainConfig
from dynamixer.training.replica import Replica, _speed_up
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


@pytest.mark.parametrize(("warmup", "decays"), [(False, [0, 0, 0.9, 0.9]), (True, [0, 0, 0.37, 0.519])])
def test_weights_are_averaged_with_the_decay_that_was_asked_for(warmup, decays):
    model = small(img_size=32)
    members = SimpleNamespace(device=torch.device("cpu"), size=1, rank=0, main=True)
    network = SimpleNamespace(model=model, sizes=[(32, 32)])
    replica = Replica(TrainConfig(ema=0.9, ema_warmup=warmup), network, ("a", "b"), members)
    expected = model.norm.weight.detach().clone()
    for step, decay in enumerate(decays):
        with torch.no_grad():
            model.norm.weight.fill_(step + 2.0)
        replica.average(step)
        expected = decay * expected + (1 - decay) * (step + 2.0)
        torch.testing.assert_close(replica.kept().norm.weight, expected, atol=1e-3, rtol=0)
