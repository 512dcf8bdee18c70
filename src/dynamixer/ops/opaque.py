"""`mixing_matrices` as one opaque operator, for torch.export of symbolic lengths and torch.compile off the native one.

The number of windows depends on the length in ways that the exporter cannot prove anything about and that take the compiler
minutes. As one operator, whose result has the length's own shape, it needs no proof. A program exported with it needs
`import dynamixer` where it is loaded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from dynamixer.ops.weights import DenseWeights, DynamicWeights, StaticWeights, Weights

KINDS: dict[str, Callable[..., Weights]] = {"dynamic": DynamicWeights, "dense": DenseWeights, "static": StaticWeights}


def opaque_matrices(x: Tensor, weights: Weights, segments: int, length: int, softmax: bool, windowed: bool) -> Tensor:
    """What `mixing_matrices` gives, for x [..., K, C] with a symbolic K."""
    if isinstance(weights, StaticWeights):
        return _matrices(x, [weights.matrices], "static", segments, length, softmax, windowed)
    kind = "dynamic" if isinstance(weights, DynamicWeights) else "dense"
    made = [weights[0], weights[1], weights[2], weights[3]]
    if weights.static is not None:
        made.append(weights.static)
    return _matrices(x, made, kind, segments, length, softmax, windowed)


def _plain(
    x: Tensor, made: Sequence[Tensor], kind: str, segments: int, length: int, softmax: bool, windowed: bool
) -> Tensor:
    from dynamixer.ops.batched import mixing_matrices  # noqa: PLC0415 - it imports this file

    made = [w.to(x.dtype) for w in made]  # compiled under autocast, x comes in half precision
    count = 1 if kind == "static" else 4
    weights = KINDS[kind](*made[:count], x, x, *made[count:])  # the projection takes no part
    return mixing_matrices(x, weights, segments=segments, length=length, softmax=softmax, windowed=windowed)


@torch.library.custom_op("dynamixer::mixing_matrices", mutates_args=())
def _matrices(
    x: Tensor, made: Sequence[Tensor], kind: str, segments: int, length: int, softmax: bool, windowed: bool
) -> Tensor:
    return _plain(x, made, kind, segments, length, softmax, windowed).clone()  # never one of the arguments itself


@_matrices.register_fake
def _(
    x: Tensor, made: Sequence[Tensor], kind: str, segments: int, length: int, softmax: bool, windowed: bool
) -> Tensor:
    leading = () if kind == "static" else x.shape[:-2]
    return x.new_empty(*leading, segments, x.shape[-2], x.shape[-2])


@torch.library.custom_op("dynamixer::mixing_matrices_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    kind: str,
    segments: int,
    length: int,
    softmax: bool,
    windowed: bool,
) -> list[Tensor]:
    # Inside an operator autograd is switched off. It is switched on again for this thread, and not asked of another one: to
    # the engine that would be no backward pass within a backward pass, which on a GPU would wait for itself for ever.
    on = torch._C._dispatch_tls_local_include_set()
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        off = off.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(on, off), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, *made)]
        result = _plain(leaves[0], leaves[1:], kind, segments, length, softmax, windowed)
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(result, leaves, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.clone() for g, t in zip(grads, leaves, strict=True)]


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    made: Sequence[Tensor],
    kind: str,
    segments: int,
    length: int,
    softmax: bool,
    windowed: bool,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *made)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, made, *ctx.options = inputs
    ctx.save_for_backward(x, *made)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *made = ctx.saved_tensors
    to_x, *to_made = _backward(grad, x, made, *ctx.options)
    return to_x, to_made, None, None, None, None, None


_matrices.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.dynamixer.mixing_matrices)
def _flops(x_shape: Any, made_shapes: Any, *options: Any, **_: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        _plain(torch.empty(x_shape, device="meta"), [torch.empty(s, device="meta") for s in made_shapes], *options)
    return int(counter.get_total_flops())
