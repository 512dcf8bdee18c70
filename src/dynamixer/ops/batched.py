"""The mixing operation for all lines and segments at once, in the dtype at hand: what the model runs.

Lines of the native length L generate one matrix. On others the reduced tokens are resampled to L and the logits of the matrix
back, or longer lines are cut into overlapping windows of L tokens, whose matrices are averaged (docs/adr/0003-any-size.md).

Letters: L native line length, K the line's real length, N windows, C channels, S segments, d reduced width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamixer.ops.opaque import opaque_matrices
from dynamixer.ops.resample import resample_matrix, resample_rows, resample_tokens, same_length, windows
from dynamixer.ops.weights import DenseWeights, DynamicWeights, StaticWeights, Weights

Called = Mapping[str, Callable[[Tensor], Tensor]]
NONE: Called = {}


def mixing_matrices(
    x: Tensor,
    weights: Weights,
    *,
    segments: int,
    length: int,
    softmax: bool = True,
    windowed: bool = True,
    called: Called = NONE,
) -> Tensor:
    """What each line of x [..., K, C] mixes with: [..., S, K, K] (static: [S, K, K]), [output token, input token].

    With the softmax every row sums to 1. `windowed` chooses windows for lines longer than the native `length`. What `called` has
    (of reduce, generate, hidden, rows and project) is called in place of the linear layer whose parameters are in `weights`.
    """
    real = x.shape[-2]
    traced = torch.compiler.is_dynamo_compiling() or isinstance(real, torch.SymInt)  # torch.compile, torch.export
    if traced and not called and not same_length(real, length):
        return opaque_matrices(x, weights, segments, length, softmax, windowed)
    features = _features(x, weights, called)
    if not windowed or real <= length:
        return _normalised(features, weights, segments, length, softmax, real, called)
    at = windows(real, length, like=x)
    cut = None if features is None else at.cut(features)
    matrices = _normalised(cut, weights, segments, length, softmax, length, called)
    if features is None:
        matrices = matrices.expand(len(at.tokens), *matrices.shape)
    return at.average(matrices)


def batched_mixing(x: Tensor, weights: Weights, *, segments: int, called: Called = NONE, **options: Any) -> Tensor:
    """Mix the tokens of each line and project: x [..., K, C] -> [..., K, C]. Options as for `mixing_matrices`."""
    matrices = mixing_matrices(x, weights, segments=segments, called=called, **options)
    values = x.unflatten(-1, (segments, -1)).movedim(-2, -3)  # [..., S, K, C/S]
    mixed = (matrices @ values).movedim(-3, -2).flatten(-2)
    return _linear("project", mixed, weights.project_weight, weights.project_bias, called)


def _linear(name: str, x: Tensor, weight: Tensor, bias: Tensor, called: Called) -> Tensor:
    return called[name](x) if name in called else F.linear(x, weight, bias)


def _features(x: Tensor, weights: Weights, called: Called) -> Tensor | None:
    """What the generation reads of each token: x [..., K, C] -> [..., K, S*d] or, dense, its rows [..., K, S*L]."""
    if isinstance(weights, DynamicWeights):
        return _linear("reduce", x, weights.reduce_weight, weights.reduce_bias, called)
    if isinstance(weights, DenseWeights):
        hidden = F.gelu(_linear("hidden", x, weights.hidden_weight, weights.hidden_bias, called))
        return _linear("rows", hidden, weights.row_weight, weights.row_bias, called)
    return None


def _normalised(
    features: Tensor | None,
    weights: Weights,
    segments: int,
    length: int,
    softmax: bool,
    real: int,
    called: Called,
) -> Tensor:
    """The matrices of lines of K = `real` tokens from their features [..., K, S*n]: [..., S, K, K] (static: [S, K, K])."""
    if isinstance(weights, DynamicWeights) and features is not None:
        reduced = resample_tokens(features, length).unflatten(-1, (segments, -1))  # [..., L, S, d]
        flat = reduced.movedim(-2, -3).flatten(-2)  # [..., S, L*d], token-major
        logits = _linear("generate", flat, weights.generate_weight, weights.generate_bias, called)
        logits = resample_matrix(logits.unflatten(-1, (length, length)), real)
    elif isinstance(weights, StaticWeights) or features is None:
        logits = resample_matrix(weights[0], real)
    else:  # dense: each token made its own row
        logits = resample_rows(features.unflatten(-1, (segments, length)).movedim(-2, -3), real)
    if weights.static is not None:
        logits = logits + resample_matrix(weights.static, real).to(logits.dtype)
    if softmax:
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)
    return logits if real == length else logits * (length / real)  # sums over more tokens keep their size
