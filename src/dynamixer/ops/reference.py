"""The mixing operation as the paper states it (section 3.2), one line and one segment at a time, in fp32.

Every faster way is held to this file. It is never optimised.

Letters: L tokens in a line, C channels, S segments, d reduced width.
Every matrix here is [output token, input token]: its rows, softmaxed, say where an output token reads from.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamixer.ops.weights import DenseWeights, DynamicWeights, StaticWeights, Weights


def reference_mixing(x: Tensor, weights: Weights, *, segments: int, softmax: bool = True) -> Tensor:
    """Mix the tokens of each line, for lines of the native length L: x [..., L, C] -> [..., L, C]."""
    weights = type(weights)(*(None if w is None else w.float() for w in weights))  # type: ignore[arg-type]
    lines = [_mix_line(line.float(), weights, segments, softmax) for line in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(lines).reshape(x.shape) if lines else x.float()


def _mix_line(x: Tensor, weights: Weights, segments: int, softmax: bool) -> Tensor:
    mixed = []
    for s, x_s in enumerate(x.chunk(segments, dim=1)):  # segment s owns C/S consecutive channels
        logits = _logits(x, s, weights, segments)  # [L, L]
        if weights.static is not None:
            logits = logits + weights.static[s]
        matrix = logits.softmax(dim=1) if softmax else logits
        mixed.append(matrix @ x_s)
    return torch.cat(mixed, dim=1) @ weights.project_weight.T + weights.project_bias


def _logits(x: Tensor, s: int, weights: Weights, segments: int) -> Tensor:
    match weights:
        case DynamicWeights():
            reduce_weight, reduce_bias = (p.chunk(segments)[s] for p in (weights.reduce_weight, weights.reduce_bias))
            reduced = x @ reduce_weight.T + reduce_bias  # [L, d], from all C channels
            flat = reduced.reshape(-1)  # token-major
            return (weights.generate_weight @ flat + weights.generate_bias).reshape(len(x), len(x))
        case DenseWeights():
            hidden = F.gelu(x @ weights.hidden_weight.T + weights.hidden_bias)
            rows = hidden @ weights.row_weight.T + weights.row_bias  # [L, S*L]: each token makes its own rows
            return rows.chunk(segments, dim=1)[s]
        case StaticWeights():
            return weights.matrices[s]
