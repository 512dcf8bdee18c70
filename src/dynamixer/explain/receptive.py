"""From where a token's value comes: rollout through the mixing matrices, and the gradient's answer beside it.

Letters: B images, H W grid of tokens, C channels, S segments, N tokens that are asked about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynamixer.errors import UserError
from dynamixer.explain.matrices import (
    AXES,
    BlockMixing,
    Explanation,
    check_blocks,
    look,
    of_this_thread,
    uncompiled,
)
from dynamixer.models.dynamixer import DynaMixer

PROBES = 16
LEFT_OUT = (
    "The rollout follows the mixing matrices alone, without the signs that weights have where there is no softmax. It leaves "
    "out the MLPs, the norms, each block's last projection, and that the tokens which are read also generate the weights; it "
    "counts the residual as one half of every block, and reads evenly from the tokens that a down-sampling merges."
)


@dataclass(frozen=True)
class Receptive:
    """From which tokens of the first grid, [H, W], the value of one token comes."""

    token: tuple[int, int]  # (row, column) on the grid of `block`
    block: int  # the token is looked at after this one
    rollout: Tensor  # [H, W], sums to 1
    gradient: Tensor  # [H, W], size of the token's derivative by each token of the stem, sums to 1
    rank_correlation: float  # Spearman's, of the two
    even_correlation: float  # of the gradient with a rollout of even weights, which the grid alone would give
    left_out: str = LEFT_OUT


def receptive(
    model: nn.Module, image: Tensor, token: tuple[int, int], *, block: int = -1, probes: int = PROBES
) -> Receptive:
    """From where in the picture a token's value comes, by rollout and by the gradient.

    The rollout (Abnar and Zuidema, 2020, for attention) takes each block for the mean of the identity, which is its residual,
    and of its mixing: row, column and channel parts by the reweighting and the projections (BlockMixing.shares), the channel
    part an identity too. It leaves out MLPs, norms, the projection of the branches' sum and the making of the weights.
    The gradient has all of the network in it, near this picture.

    Args:
        model: a DynaMixer.
        image: what the model reads, [1, 3, height, width] or [3, height, width].
        token: (row, column) on the grid of `block`.
        block: after which the token is looked at, counted from 0; the last by default.
        probes: random directions of the token's value that the gradient is averaged over; more are surer and slower.

    Raises:
        UserError: another model, several pictures, or a token or block that does not exist.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if not isinstance(model, DynaMixer):
        raise UserError(f"receptive follows the stages of a DynaMixer, and this is a {type(model).__name__}.")
    image = image[None] if image.ndim == 3 else image
    if len(image) != 1 or image.ndim != 4:
        raise UserError(f"receptive takes one picture, [1, 3, height, width]; this is {list(image.shape)}.")
    seen = look(model, image)
    (number,) = check_blocks([block], len(seen.blocks))
    check_token(token, seen.blocks[number].grid)
    rolled = rollout(seen, token, block=number)
    gradient = gradient_of(model, image, token, block=number, probes=probes)
    even = rollout(with_even_weights(seen), token, block=number)
    return Receptive(
        token, number, rolled, gradient, rank_correlation(rolled, gradient), rank_correlation(even, gradient)
    )


def check_token(token: Sequence[int], grid: tuple[int, int]) -> None:
    """Refuse a token outside a grid.

    Raises:
        UserError: it is.
    """
    if len(token) != 2 or not all(0 <= at < side for at, side in zip(token, grid, strict=False)):
        raise UserError(
            f"there is no token {tuple(token)}: this grid has {grid[0]} rows and {grid[1]} columns, each counted from 0."
        )


def rollout(seen: Explanation, token: tuple[int, int] | None = None, *, block: int = -1, image: int = 0) -> Tensor:
    """What each token of the first grid gives to tokens after a block, through all blocks before it.

    Args:
        seen: what `look` gave, with all blocks, both axes and weights.
        token: (row, column) on the grid of `block`; all of its tokens if None.
        block: counted from 0; the last by default.
        image: which picture of the batch.

    Returns:
        [H, W] of the first grid, or [H', W', H, W] for all tokens. What a token takes sums to 1.

    Raises:
        UserError: a block or token that does not exist, or something of `look` was not asked for.
    """
    if not all(_is_whole(mixing, i) for i, mixing in enumerate(seen.blocks)):
        raise UserError("rollout needs both axes and the weights: call look(model, images) without choosing.")
    (last,) = check_blocks([block], len(seen.blocks))
    height, width = seen.blocks[last].grid
    device = next(iter(seen.blocks[last].shares.values())).device
    if token is None:
        flow = torch.eye(height * width, device=device).view(height * width, height, width)
    else:
        check_token(token, (height, width))
        flow = torch.zeros(1, height, width, device=device)
        flow[0, token[0], token[1]] = 1
    for mixing in reversed(seen.blocks[: last + 1]):
        if flow.shape[1:] != mixing.grid:
            flow = _before_downsampling(flow, mixing.grid)
        flow = _before_block(flow, mixing, image)
    return flow[0] if token is not None else flow.view(height, width, *flow.shape[1:])


def _is_whole(mixing: BlockMixing, number: int) -> bool:
    there = (mixing.matrices(axis) is not None for axis in AXES if axis in mixing.branches)
    return mixing.block == number and bool(mixing.shares) and all(there)


def with_even_weights(seen: Explanation) -> Explanation:
    """The same with 1/K for every weight: what the rollout would be if only the grid and the shares decided."""

    def even(matrices: Tensor | None) -> Tensor | None:
        return None if matrices is None else torch.ones_like(matrices)

    blocks = tuple(replace(mixing, row=even(mixing.row), column=even(mixing.column)) for mixing in seen.blocks)
    return replace(seen, blocks=blocks)


def _before_block(flow: Tensor, mixing: BlockMixing, image: int) -> Tensor:
    """What tokens take from a block's outputs [N, H, W] as what they take from its inputs."""
    mixed = flow * mixing.shares["channel"][image] if "channel" in mixing.shares else torch.zeros_like(flow)
    if mixing.row is not None:
        mixed = mixed + torch.einsum("nhw,hwv->nhv", flow, _averaged(mixing.row[image], mixing.shares["row"][image]))
    if mixing.column is not None:
        column = _averaged(mixing.column[image], mixing.shares["column"][image])
        mixed = mixed + torch.einsum("nhw,whu->nuw", flow, column)
    whole = sum(share[image].sum() for share in mixing.shares.values())  # 1; less where projections are zero
    return (flow + mixed) / (1 + whole)


def _averaged(matrices: Tensor, shares: Tensor) -> Tensor:
    """The sum over segments of [lines, S, K, K], without signs and with rows that sum to 1, times shares [S]: [lines, K, K]."""
    sizes = matrices.float().abs()
    sizes = sizes / sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    return torch.einsum("lskj,s->lkj", sizes, shares.float())


def _before_downsampling(flow: Tensor, grid: tuple[int, int]) -> Tensor:
    """Spread [N, H', W'] evenly over the up to 2x2 tokens of the larger grid that each one merged."""
    height, width = grid
    (rows, columns) = (torch.arange(side, device=flow.device) // 2 for side in grid)
    merged = torch.bincount(rows)[rows][:, None] * torch.bincount(columns)[columns][None]
    return flow[:, rows][:, :, columns].view(-1, height, width) / merged


def gradient_of(model: DynaMixer, image: Tensor, token: tuple[int, int], *, block: int, probes: int = PROBES) -> Tensor:
    """How much a token's value after a block changes with each token of the stem: [H, W], sums to 1.

    The size of the Jacobian (its Frobenius norm over both tokens' channels), estimated from its products with `probes` random
    directions of +1 and -1, the same ones each time.
    """
    if probes < 1:
        raise UserError(f"probes={probes} has to be 1 or more.")
    kept: dict[str, Tensor] = {}

    def stem(_module: nn.Module, _args: object, tokens: Tensor) -> Tensor:
        kept["stem"] = tokens.detach().requires_grad_()
        return kept["stem"]

    def after(_module: nn.Module, _args: object, tokens: Tensor) -> None:
        kept["value"] = tokens[0, token[0], token[1]]

    layers = [layer for stage in model.stages for layer in stage.blocks]
    handles = [
        model.patch_embed.register_forward_hook(of_this_thread(stem)),
        layers[block].register_forward_hook(of_this_thread(after)),
    ]
    training = {module for module in model.modules() if module.training}
    try:
        # A server looks in inference mode, in which nothing could be differentiated.
        with torch.inference_mode(False), torch.enable_grad(), uncompiled(model):
            model.eval().forward_features(image.clone())
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    value, tokens = kept["value"], kept["stem"]
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(tokens.shape[1:3], device=tokens.device)
    for _ in range(probes):
        direction = (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1).to(value)
        (change,) = torch.autograd.grad(value, tokens, direction, retain_graph=True)
        squares += change[0].float().square().sum(-1)
    size = squares.sqrt()
    return size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing theirs. nan if all values of one are equal."""
    first, second = (_ranks(values.flatten()) for values in (a, b))
    first, second = first - first.mean(), second - second.mean()
    size = first.norm() * second.norm()
    return float(first @ second / size) if size > 0 else float("nan")


def in_words(correlation: float) -> str:
    """A correlation for people; a dash where there is none, as on a grid of one token."""
    return "-" if math.isnan(correlation) else f"{correlation:.2f}"


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.detach().cpu().double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]
