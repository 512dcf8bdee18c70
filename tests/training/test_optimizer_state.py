import json

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from dynamixer import RunError
from dynamixer.training import optimizer_state

OPTIMIZERS = [
    "adamw",
    "sgd",
    "lamb",
    "lion",
    "adan",
    "muon",
    "adafactor",
    "nadamw",
    "madgrad",
    "radam",
    "rmsproptf",
    "adopt",
]


FUSED = {"fused": True}


def made(name, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    return model, create_optimizer_v2(model, name, lr=0.1, weight_decay=0.05, **options)


def step(model, optimizer, number):
    torch.manual_seed(number)
    optimizer.zero_grad()
    model(torch.randn(3, 4)).pow(2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OPTIMIZERS), ("adamw", FUSED), ("sgd", FUSED)])
def test_an_optimiser_goes_on_from_its_saved_state_to_the_bit(name, options):
    model, optimizer = made(name, **options)
    for number in range(3):
        step(model, optimizer, number)
    tensors, about = optimizer_state.take(optimizer)
    tensors = {key: value.clone() for key, value in tensors.items()}
    other, second = made(name, **options)
    other.load_state_dict(model.state_dict())
    places = optimizer_state.places(second, about)
    assert {k: (v.shape, v.dtype) for k, v in places.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}
    optimizer_state.put(second, tensors, json.loads(json.dumps(about)))
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, second, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_saved_is_a_sentence():
    model, optimizer = made("sgd")
    step(model, optimizer, 0)
    optimizer.state[model[0].weight]["odd"] = ["a list"]
    with pytest.raises(RunError, match="SGD keeps a list, which checkpoints cannot hold: choose another opt"):
        optimizer_state.take(optimizer)
