"""What lean layers give and keep, beside the plain ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynamixer.layers import DynaMixerBlock, LeanMlp
from dynamixer.mixing import Mixing
from dynamixer.ops.lean import gelu_linear, weighted_linear
from helpers import error, sharpen


def both(make):
    torch.manual_seed(0)
    plain = make()
    lean = copy.deepcopy(plain)
    lean.lean = True
    return plain, lean


def mlp():
    return LeanMlp(12, 36)


def block(**mixing):
    return sharpen(DynaMixerBlock(12, (3, 4), 2, 2, Mixing(**mixing)))


def kept(module, x):
    """Numbers that a forward pass keeps for the backward pass, weights left out."""
    weights, found = {p.data_ptr() for p in module.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    return sum(found.values())


def numbers(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(gelu_linear, numbers((2, 3, 5), (4, 5), (4,)))
    shares, weight, bias, *branches = numbers((3, 2, 1, 1, 5), (4, 5), (4,), *3 * [(2, 3, 2, 5)])
    assert torch.autograd.gradcheck(
        lambda s, w, b, *parts: weighted_linear(s, parts, w, b), (shares, weight, bias, *branches)
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [mlp, block, lambda: block(channel=False), lambda: block(column=False)])
def test_values_and_gradients_are_those_of_the_plain_layers(make, autocast):
    plain, lean = both(make)
    x = torch.randn(2, 3, 4, 12)
    found = []
    for module in (plain, lean):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(given)
        y.float().square().sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert error(b.float(), a.float()) < (1e-2 if autocast else 1e-6)


def test_they_keep_less():
    plain, lean = both(mlp)
    x = torch.randn(8, 12)
    assert kept(plain, x) - kept(lean, x) == 8 * 36
    plain, lean = both(block)
    x = torch.randn(8, 3, 4, 12)
    assert kept(plain, x) - kept(lean, x) == x.numel()


def test_a_changed_second_layer_is_used_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    _, lean = both(mlp)
    lean.fc2 = Doubled(36, 12)
    x = torch.randn(8, 12)
    torch.testing.assert_close(lean(x), 2 * F.linear(F.gelu(lean.fc1(x)), lean.fc2.weight, lean.fc2.bias))
