"""The mixing operation for all lines and segments at once, in the dtype at hand: what the model runs.

Letters: L native line length, K the line's real length, C channels, S segments, d reduced width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamixer.ops.resample import resample_matrix, resample_rows, resample_tokens, same_length
from dynamixer.ops.weights import DenseWeights, DynamicWeights, Weights


def mixing_matrices(
    x: Tensor,
    weights: Weights,
    *,
    segments: int,
    length: int,
    softmax: bool = True,
) -> Tensor:
    """What each line of x [..., K, C] mixes with: [..., S, K, K] (static: [S, K, K]), [output token, input token].

    With the softmax every row sums to 1. Without it the matrix is scaled by length / K, which keeps the size of its
    products when the native length is not the line's.
    """
    real = x.shape[-2]
    logits = _logits(x, weights, segments, length)
    if weights.static is not None:
        logits = logits + resample_matrix(weights.static, real).to(logits.dtype)
    if softmax:
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(dim=-1, dtype=accumulate).to(logits.dtype)
    return logits if same_length(real, length) else logits * (length / real)


def batched_mixing(
    x: Tensor,
    weights: Weights,
    *,
    segments: int,
    length: int,
    softmax: bool = True,
) -> Tensor:
    """Mix the tokens of each line and project: x [..., K, C] -> [..., K, C]."""
    matrices = mixing_matrices(x, weights, segments=segments, length=length, softmax=softmax)
    values = x.unflatten(-1, (segments, -1)).movedim(-2, -3)  # [..., S, K, C/S]
    mixed = (matrices @ values).movedim(-3, -2).flatten(-2)
    return F.linear(mixed, weights.project_weight, weights.project_bias)


def _logits(x: Tensor, weights: Weights, segments: int, length: int) -> Tensor:
    real = x.shape[-2]
    if isinstance(weights, DynamicWeights):
        reduced = F.linear(x, weights.reduce_weight, weights.reduce_bias).unflatten(-1, (segments, -1))
        tokens = resample_tokens(reduced, length).movedim(-2, -3).flatten(-2)  # [..., S, L*d], token-major
        logits = F.linear(tokens, weights.generate_weight, weights.generate_bias).unflatten(-1, (length, length))
        return resample_matrix(logits, real)
    if isinstance(weights, DenseWeights):
        hidden = F.gelu(F.linear(x, weights.hidden_weight, weights.hidden_bias))
        rows = F.linear(hidden, weights.row_weight, weights.row_bias).unflatten(-1, (segments, length))
        return resample_rows(rows.movedim(-2, -3), real)
    return resample_matrix(weights.matrices, real)
