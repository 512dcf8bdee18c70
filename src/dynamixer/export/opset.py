"""`dynamixer::mixing_matrices` in ONNX's own operators, so that pictures of any size can be given to an exported model.

For a line of K tokens and a native length L, with T = min(K, L): the features of N windows of T tokens (one, of all tokens, where
K <= L) are resampled from T to L, the logits back from L to T, and each window's matrix is put in its place on the line and
averaged over the windows of a token. Resampling between equal lengths is the identity, so that one graph without branches serves
K < L, K = L and K > L; all sizes are integers in the graph. It is held to `ops.batched` by the tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20 as op

Value = Any  # of the graph: what onnxscript passes around while it is traced
INT64, FLOAT = 7, 1  # numbers of the types in the ONNX format


def translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx's `custom_translation_table`."""
    return {torch.ops.dynamixer.mixing_matrices.default: mixing_matrices}


def mixing_matrices(
    x: Value, made: Sequence[Value], kind: str, segments: int, length: int, softmax: bool, windowed: bool
) -> Value:
    """The mixing matrices of x [B, M, K, C], M lines of K tokens each: [B, M, S, K, K] (static: [S, K, K])."""
    line = op.Squeeze(op.Shape(x, start=-2, end=-1), _ints(0)) if kind != "static" else _second_last(x)
    starts, span = _windows(line, length) if windowed else (_ints(0), line)
    back = _interpolation(length, span)  # [T, L]
    if kind == "static":
        logits = _both(op.Unsqueeze(made[0], _ints(0)), back)  # [1, S, T, T]
    else:
        features = _features(x, made, kind)  # [B, M, K, S*n]
        tokens = op.Add(op.Unsqueeze(starts, _ints(1)), op.Unsqueeze(_range(span), _ints(0)))  # [N, T]
        features = op.Gather(features, tokens, axis=2)  # [B, M, N, T, S*n]
        if kind == "dynamic":
            reduced = op.MatMul(_interpolation(span, length), features)  # [B, M, N, L, S*d]
            reduced = op.Reshape(reduced, _ints(0, 0, -1, length, segments, _width(made[0], segments)))
            flat = op.Reshape(op.Transpose(reduced, perm=[0, 1, 2, 4, 3, 5]), _ints(0, 0, 0, 0, -1))  # token-major
            made_logits = op.Add(op.MatMul(flat, _turned(made[2])), made[3])
            logits = _both(op.Reshape(made_logits, _ints(0, 0, 0, 0, length, length)), back)
        else:  # dense: each token made its own row
            rows = op.Reshape(features, op.Concat(op.Shape(features, end=4), _ints(segments, length), axis=0))
            logits = op.MatMul(op.Transpose(rows, perm=[0, 1, 2, 4, 3, 5]), op.Transpose(back, perm=[1, 0]))
    extra = made[4] if kind != "static" and len(made) > 4 else None
    if extra is not None:
        logits = op.Add(logits, _both(extra, back))
    if softmax:
        matrices = op.Softmax(logits, axis=-1)
    else:  # sums over more tokens keep their size
        matrices = op.Mul(logits, op.Div(op.Constant(value_float=float(length)), op.Cast(span, to=FLOAT)))
    return _averaged(matrices, starts, span, line, static=kind == "static")


def _features(x: Value, made: Sequence[Value], kind: str) -> Value:
    first = op.Add(op.MatMul(x, _turned(made[0])), made[1])
    if kind == "dynamic":
        return first
    return op.Add(op.MatMul(op.Gelu(first), _turned(made[2])), made[3])


def _windows(line: Value, length: int) -> tuple[Value, Value]:
    """Where windows start on a line, [N], and how many tokens each has: `ops.resample.windows`, one for a short line."""
    more = op.Max(op.Sub(line, _int(length)), _int(0))
    gap = max(1, length // 4)
    gaps = op.Div(op.Add(more, _int(gap - 1)), _int(gap))
    numbers = _range(op.Add(gaps, _int(1)))
    doubled = op.Mul(op.Max(gaps, _int(1)), _int(2))
    starts = op.Div(op.Add(op.Mul(numbers, op.Mul(more, _int(2))), gaps), doubled)  # rounded
    return starts, op.Min(line, _int(length))


def _averaged(matrices: Value, starts: Value, span: Value, line: Value, *, static: bool) -> Value:
    """Windows' matrices [..., N, S, T, T], each in its place on the line, averaged over the windows of a token."""
    tokens = op.Add(op.Unsqueeze(starts, _ints(1)), op.Unsqueeze(_range(span), _ints(0)))  # [N, T]
    place = op.Cast(
        op.Equal(op.Unsqueeze(_range(line), _ints(0, 2)), op.Unsqueeze(tokens, _ints(1))), to=FLOAT
    )  # [N, K, T]
    put = op.Unsqueeze(place, _ints(1))  # [N, 1, K, T]
    total = op.MatMul(op.MatMul(put, matrices), op.Transpose(put, perm=[0, 1, 3, 2]))
    total = op.ReduceSum(total, _ints(0 if static else 2), keepdims=0)
    count = op.ReduceSum(place, _ints(0, 2), keepdims=0)  # [K]
    return op.Div(total, op.Unsqueeze(count, _ints(1)))


def _interpolation(source: Value | int, target: Value | int) -> Value:
    """The [target, source] matrix of `ops.resample.interpolation`."""
    source, target = (_int(side) if isinstance(side, int) else side for side in (source, target))
    odd = op.Add(op.Mul(_range(target), _int(2)), _int(1))
    centre = op.Sub(op.Mul(odd, source), target)
    token = op.Mul(_range(source), op.Mul(target, _int(2)))
    distance = op.Abs(op.Sub(op.Unsqueeze(centre, _ints(1)), op.Unsqueeze(token, _ints(0))))
    weight = op.Max(op.Sub(op.Mul(op.Max(source, target), _int(2)), distance), _int(0))
    weight = op.Cast(weight, to=FLOAT)
    return op.Div(weight, op.ReduceSum(weight, _ints(1), keepdims=1))


def _both(logits: Value, back: Value) -> Value:
    """Both axes resampled: [..., L, L] -> [..., T, T]."""
    return op.MatMul(back, op.MatMul(logits, op.Transpose(back, perm=[1, 0])))


def _second_last(x: Value) -> Value:
    return op.Squeeze(op.Shape(x, start=-2, end=-1), _ints(0))


def _width(weight: Value, segments: int) -> int:
    return int(weight.shape[0]) // segments


def _turned(weight: Value) -> Value:
    return op.Transpose(weight, perm=[1, 0])


def _range(end: Value) -> Value:
    return op.Range(_int(0), end, _int(1))


def _int(value: int) -> Value:
    return op.Constant(value_int=value)


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))
