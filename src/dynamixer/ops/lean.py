"""Two linear layers that compute what they read again in the backward pass, where autograd would keep it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), x.to(grad.dtype))
        return grad_x.to(x.dtype), *_of_layer(grad, F.gelu(x), weight, bias)


class _WeightedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, weight: Tensor, bias: Tensor, *branches: Tensor) -> Tensor:
        ctx.save_for_backward(shares, weight, bias, *branches)
        return F.linear(weighted_sum(shares, branches), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        shares, weight, bias, *branches = ctx.saved_tensors
        inner = grad @ weight.to(grad.dtype)
        grad_shares = torch.stack([(inner * branch).sum((-3, -2), keepdim=True) for branch in branches])
        layer = _of_layer(grad, weighted_sum(shares, branches), weight, bias)
        mixed = ((inner * share).to(branch.dtype) for share, branch in zip(shares, branches, strict=True))
        return grad_shares.to(shares.dtype), *layer, *mixed


def weighted_sum(shares: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """The sum of branches [B, H, W, C], each times its share; `shares` are [branches, B, 1, 1, C]."""
    total = branches[0] * shares[0]
    for share, branch in zip(shares[1:], branches[1:], strict=True):
        total = torch.addcmul(total, branch, share)
    return total


def _of_layer(grad: Tensor, read: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer's weight and bias, from its output's and what it read."""
    rows = grad.flatten(0, -2)
    return (rows.mT @ read.to(grad.dtype).flatten(0, -2)).to(weight.dtype), rows.sum(0).to(bias.dtype)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(gelu(x), weight, bias)` for x [..., in], which computes the GELU again in the backward pass.

    Gradients of gradients are not defined.
    """
    result: Tensor = _GeluLinear.apply(x, weight, bias)
    return result


def weighted_linear(shares: Tensor, branches: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """`linear(weighted_sum(shares, branches), weight, bias)`, which sums again in the backward pass.

    Gradients of gradients are not defined.
    """
    result: Tensor = _WeightedLinear.apply(shares, weight, bias, *branches)
    return result
