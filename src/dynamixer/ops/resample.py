"""Lines of another length than the native one: linear interpolation as a small matrix (docs/adr/0003-any-size.md).

Letters: L native line length, K the line's real length, S segments, d reduced width.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def same_length(a: int, b: int) -> bool:
    """Whether two lengths are known to be equal while tracing; a symbolic one counts as different, without a guard."""
    return bool(statically_known_true(a == b))


def interpolation(source: int, target: int, *, like: Tensor) -> Tensor:
    """The [target, source] matrix of linear interpolation between token centres; its rows sum to 1.

    Shrinking widens the kernel, so that every source token counts. Equal lengths give the identity exactly.
    """
    # In integers, where a half token is `target` and a source token 2 * target: exact, and free of symbolic floats.
    centre = (2 * torch.arange(target, device=like.device) + 1) * source - target
    token = 2 * torch.arange(source, device=like.device) * target
    distance = (centre[:, None] - token[None, :]).abs()
    weight = (
        (-distance + 2 * torch.sym_max(source, target)).clamp(min=0).to(torch.promote_types(like.dtype, torch.float32))
    )
    return (weight / weight.sum(dim=1, keepdim=True)).to(like.dtype)


def resample_tokens(x: Tensor, length: int) -> Tensor:
    """Reduced tokens [..., K, S, d] -> [..., length, S, d]."""
    if same_length(x.shape[-3], length):
        return x
    weight = interpolation(x.shape[-3], length, like=x)
    return (weight @ x.flatten(-2)).unflatten(-1, x.shape[-2:])


def resample_rows(logits: Tensor, length: int) -> Tensor:
    """The input-token axis of logits: [..., L] -> [..., length]."""
    if same_length(logits.shape[-1], length):
        return logits
    return logits @ interpolation(logits.shape[-1], length, like=logits).transpose(0, 1)


def resample_matrix(logits: Tensor, length: int) -> Tensor:
    """Both axes of mixing logits: [..., L, L] -> [..., length, length]."""
    if same_length(logits.shape[-1], length):
        return logits
    return interpolation(logits.shape[-2], length, like=logits) @ resample_rows(logits, length)
