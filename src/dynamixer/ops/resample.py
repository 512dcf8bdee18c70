"""Lines of another length than the native one: windows, and linear interpolation (docs/adr/0003-any-size.md).

Letters: L native line length, K the line's real length, N windows, S segments.
"""

from typing import NamedTuple

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
    """Lines resampled to another number of tokens: [..., K, C] -> [..., length, C]."""
    if same_length(x.shape[-2], length):
        return x
    return interpolation(x.shape[-2], length, like=x) @ x


def resample_rows(logits: Tensor, length: int) -> Tensor:
    """The input-token axis of logits: [..., L] -> [..., length]."""
    if same_length(logits.shape[-1], length):
        return logits
    return logits @ interpolation(logits.shape[-1], length, like=logits).transpose(0, 1)


def resample_matrix(logits: Tensor, length: int) -> Tensor:
    """Both axes of mixing logits: [..., L, L] -> [..., length, length]."""
    return resample_tokens(resample_rows(logits, length), length)


class Windows(NamedTuple):
    """Windows of L tokens on a line of K > L, evenly spread from end to end, neighbours at most L/4 apart."""

    tokens: Tensor  # [N, L], the numbers of the tokens in each window
    line: int  # K

    def cut(self, x: Tensor) -> Tensor:
        """Lines [..., K, C] -> windows [..., N, L, C]."""
        return x.index_select(-2, self.tokens.flatten()).unflatten(-2, self.tokens.shape)

    def average(self, matrices: Tensor) -> Tensor:
        """The windows' matrices [..., N, S, L, L], each in its place, averaged over the windows of a token: [..., S, K, K]."""
        k, tokens = self.line, self.tokens
        # In a file's graph by products: runtimes make sums into one cell in several threads, and lose some of them.
        if torch.compiler.is_exporting():
            rows = torch.arange(k, device=tokens.device)[:, None]
            place = (rows == tokens[:, None, :]).to(matrices.dtype)  # [N, K, L]
            put = place[:, None]
            return (put @ matrices @ put.mT).sum(-4) / place.sum((0, 2))[:, None]
        cells = (tokens[:, :, None] * k + tokens[:, None, :]).flatten()  # [N*L*L], of the [K, K] matrix
        entries = matrices.movedim(-4, -3).flatten(-3)  # [..., S, N*L*L]
        total = entries.new_zeros(*entries.shape[:-1], k * k).index_add(-1, cells, entries).unflatten(-1, (k, k))
        ones = torch.ones_like(tokens.flatten(), dtype=matrices.dtype)
        return total / ones.new_zeros(k).index_add(0, tokens.flatten(), ones)[:, None]


def windows(line: int, length: int, *, like: Tensor) -> Windows:
    """Where the windows of the native length lie on a longer line."""
    gaps = -(-(line - length) // max(1, length // 4))
    starts = (torch.arange(gaps + 1, device=like.device) * (2 * (line - length)) + gaps) // (2 * gaps)  # rounded
    return Windows(starts[:, None] + torch.arange(length, device=like.device), line)
