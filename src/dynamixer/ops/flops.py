"""How much the C++ kernels of a layer multiply and add, for torch's counter, which sees operators and not what is in them.

Letters: C channels, F hidden channels of the MLP. A multiply-add is two operations, as torch counts.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Any  # of a tensor; None where there is none


def register_formulas() -> None:
    """Tell torch's counter of the operators, which exist once the kernels are loaded."""
    ops = torch.ops.dynamixer
    every: dict[Any, Any] = {
        ops.normed: _normed,
        ops.tail: _tail,
        ops.tail_grads: _tail_grads,
        ops.branch_grads: _branch_grads,
        ops.normed_grads: _normed_grads,
    }
    for op, formula in every.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def _normed(x: Shape, weight: Shape, bias: Shape, eps: float, reduce: Shape, reduce_bias: Shape, **_: Any) -> int:
    return 0 if reduce_bias is None else 2 * prod(x) * reduce_bias[0]


def _tail(x: Shape, mixed: list[Shape], *more: Any, **_: Any) -> int:
    channels, hidden = x[3], more[9][0]  # fc1's bias [F]
    return int(2 * prod(x) * ((len(mixed) + 1) * channels + 2 * hidden))


def _tail_grads(grad: Shape, mixed: list[Shape], *more: Any, **_: Any) -> int:
    channels, hidden = grad[3], more[5][3]  # the hidden channels themselves [B, H, W, F]
    return int(2 * prod(grad) * (len(mixed) * channels + 2 * (channels + 2 * hidden)))


def _branch_grads(sums_grad: Shape, shares: Shape, means_grad: Shape, packs: list[Shape], **_: Any) -> int:
    return int(2 * prod(sums_grad) * len(packs) * sums_grad[3])


def _normed_grads(x: Shape, *more: Any, **_: Any) -> int:
    reduced = more[5]  # gradients of what each axis read [B, H, W, S*d]
    return int(2 * 2 * prod(x) * sum(shape[3] for shape in reduced))
