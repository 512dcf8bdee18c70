"""Generate, normalise and mix in one pass over the tokens by the C++ kernel, for processors: fp32, bf16 and fp16, native lengths.

The operators exist without the kernel, for graphs that hold them; `kernel.load_kernel` gives them something to run.

Letters: B images, H W grid of tokens, L native line length, C channels, S segments, d reduced width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dynamixer.ops.kernel import load_kernel
from dynamixer.ops.weights import DenseWeights, DynamicWeights, Weights

ARGUMENTS = (
    "Tensor x, Tensor? features, Tensor? weight, Tensor? bias, Tensor? added, int axis, int segments, bool softmax"
)
torch.library.define("dynamixer::mix", f"({ARGUMENTS}) -> Tensor")
torch.library.define("dynamixer::mix_grads", f"(Tensor grad, {ARGUMENTS}) -> Tensor[]")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(x: Tensor, weights: Weights, *, axis: int, length: int) -> str | None:
    """Why the kernel cannot mix x along `axis` (-3: columns, -2: rows), or None: a clause to end a sentence with."""
    reasons = {
        "an exported program has to run where the kernel is not": torch.compiler.is_exporting(),
        "the kernel mixes grids [B, H, W, C]": x.dim() != 4,
        f"the kernel is for processors, and the tokens are on {x.device.type}": x.device.type != "cpu",
        f"the kernel takes fp32, bf16 and fp16, and the tokens are {x.dtype}": x.dtype not in DTYPES,
        "the kernel does not generate dense matrices": isinstance(weights, DenseWeights),
        f"the kernel mixes lines of the native {length} tokens, and these have {x.shape[axis]}": x.shape[axis]
        != length,
    }
    why = next((why for why, holds in reasons.items() if holds), None)
    return (
        why if why or torch.compiler.is_compiling() else load_kernel()
    )  # a copied model may be where it is not loaded


def fused_mix(
    x: Tensor, features: Tensor | None, weights: Weights, *, axis: int, segments: int, softmax: bool
) -> Tensor:
    """Mix the columns (axis -3) or rows (axis -2) of x [B, H, W, C], not yet projected: [B, H, W, C].

    `features` [B, H, W, S*d] are the reduced tokens; None for static matrices.
    """
    if features is not None:
        x = x.to(features.dtype)  # under autocast
    weight, bias = (
        (weights.generate_weight, weights.generate_bias) if isinstance(weights, DynamicWeights) else (None, None)
    )
    added = weights.static if isinstance(weights, DynamicWeights) else weights[0]
    return torch.ops.dynamixer.mix(x, features, weight, bias, added, x.dim() + axis, segments, softmax)


@torch.library.register_fake("dynamixer::mix")
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("dynamixer::mix_grads")
def _(
    grad: Tensor,
    x: Tensor,
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    likes = (x, features, weight, bias, added)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in likes if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, axis, segments, softmax = inputs
    ctx.options = axis, segments, softmax
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    made = iter(torch.ops.dynamixer.mix_grads(grad, *tensors, *ctx.options))
    return (*(None if t is None else next(made) for t in tensors), None, None, None)


torch.library.register_autograd("dynamixer::mix", _differentiate, setup_context=_save)


@register_flop_formula(torch.ops.dynamixer.mix)
def _flops(
    x: Any, features: Any, weight: Any, bias: Any, added: Any, axis: int, segments: int, *_: Any, **__: Any
) -> int:
    length, tokens = x[axis], x[0] * x[1] * x[2]
    generated = 0 if weight is None else tokens // length * segments * weight[0] * weight[1]
    return int(2 * (generated + tokens * length * x[3]))


@register_flop_formula(torch.ops.dynamixer.mix_grads)
def _flops_of_grads(grad: Any, *shapes: Any, **_: Any) -> int:
    return 2 * _flops(*shapes)
