"""What each block mixes with: its matrices and the weights of its branches, taken beside a forward pass that stays what it is.

Letters: B images, H W grid of tokens, C channels, S segments, K tokens in a line.
Every matrix is [output token, input token]: a row says where an output token reads from.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynamixer.errors import UserError, did_you_mean
from dynamixer.layers import DynaMixerBlock, MixerLayer
from dynamixer.mixing import Generator

Axis = Literal["row", "column"]
AXES: tuple[Axis, ...] = ("row", "column")


@dataclass(frozen=True)
class BlockMixing:
    """How one block mixed a batch of pictures.

    `row` and `column` hold its matrices, [B, lines, S, output, input]: line i of `row` is row i of the grid, line j of `column`
    its column j. With the softmax every row of a matrix sums to 1, without it weights may be negative. They are None where the
    block lacks the branch or it was not asked for.
    """

    block: int  # counted from 0 through all stages
    name: str  # as in the model: stages.0.blocks.1
    grid: tuple[int, int]  # (H, W) tokens
    segments: int
    softmax: bool
    generator: Generator
    row: Tensor | None  # [B, H, S, W, W]
    column: Tensor | None  # [B, W, S, H, H]
    branches: tuple[str, ...]  # those that the block has: of column, row and channel
    branch_weights: (
        Tensor | None
    )  # [B, C, branches], sum to 1: the reweighting; None without it, or if it was not asked for
    shares: dict[str, Tensor]  # of the block's output, by branch (see `_shares`): column, row [B, S] and channel [B]

    @property
    def content(self) -> bool:
        """Whether the matrices depend on the picture: those of generator=static do not."""
        return self.generator != "static"

    def matrices(self, axis: Axis) -> Tensor | None:
        """Those of one axis."""
        return self.row if axis == "row" else self.column

    def entropy(self, axis: Axis) -> Tensor | None:
        """How widely the output tokens read, [B, S]: 0 for one token each, 1 for all alike (None without that axis).

        The mean entropy of the matrices' rows over log K. Without the softmax it is that of the weights without their signs,
        divided by their sum.
        """
        matrices = self.matrices(axis)
        return None if matrices is None else relative_entropy(matrices).mean((1, 3))


@dataclass(frozen=True)
class Explanation:
    """All that a forward pass over a batch of pictures mixed with, and what came out."""

    logits: Tensor  # what the model gave: [B, classes] with a classifier
    size: tuple[int, int]  # (height, width) in pixels that the stem read: larger than the picture where `enlarge` acted
    patch: int  # side of a token of the first grid, in pixels of `size`; 0 for a model that is not a DynaMixer
    blocks: tuple[BlockMixing, ...]

    def token_side(self, mixing: BlockMixing) -> int:
        """Side of a token of a block in pixels of `size`; the last tokens of a grid may reach beyond the picture."""
        side = max(1, self.patch)
        while tuple(-(-pixels // side) for pixels in self.size) > mixing.grid:
            side *= 2
        return side


def mixing_matrices(
    model: nn.Module, images: Tensor, *, blocks: Sequence[int] | None = None, axes: Sequence[Axis] = AXES
) -> tuple[BlockMixing, ...]:
    """The matrices that each block mixes pictures with, [images, lines, segments, output, input] for rows and for columns.

    Args:
        model: a DynaMixer, or a model that holds its blocks; it stays as it is.
        images: what the model reads, [B, 3, height, width].
        blocks: which, counted from 0 (-1 is the last); all if None.
        axes: "row", "column" or both.

    Returns:
        One entry for each block asked for, in the order of depth. Nothing else is kept.

    Raises:
        UserError: a model without our blocks, or a block or axis that does not exist.
    """
    return look(model, images, blocks=blocks, axes=axes, weights=False).blocks


@torch.no_grad()
def look(
    model: nn.Module,
    images: Tensor,
    *,
    blocks: Sequence[int] | None = None,
    axes: Sequence[Axis] = AXES,
    weights: bool = True,
) -> Explanation:
    """Run pictures through a model in evaluation mode, and keep what its blocks mixed with.

    Args:
        model: as for `mixing_matrices`.
        images: as there.
        blocks: as there.
        axes: as there.
        weights: also the weights of the branches, for which each block's branches are computed once more.

    Raises:
        UserError: as there.
    """
    if images.ndim != 4:
        raise UserError(f"images have to be [images, channels, height, width]; these are {list(images.shape)}.")
    training = {module for module in model.modules() if module.training}
    size: list[tuple[int, int]] = []
    stem = getattr(model, "patch_embed", None)
    note = of_this_thread(lambda _, args: size.append(tuple(args[0].shape[-2:])))
    handle = stem.register_forward_pre_hook(note) if stem is not None else None
    try:
        with record(model.eval(), blocks=blocks, axes=axes, weights=weights) as seen:
            logits = model(images)
    finally:
        for module in training:
            module.training = True
        if handle is not None:
            handle.remove()
    return Explanation(
        logits=logits,
        size=size[0] if size else (images.shape[-2], images.shape[-1]),
        patch=getattr(model, "patch_size", 0),
        blocks=tuple(sorted(seen, key=lambda mixing: mixing.block)),
    )


@contextmanager
def record(
    model: nn.Module, *, blocks: Sequence[int] | None = None, axes: Sequence[Axis] = AXES, weights: bool = True
) -> Iterator[list[BlockMixing]]:
    """A list that each forward pass of the model, run inside, adds its blocks' mixing to; what it computes stays the same.

    The matrices are made once more from what a block reads, without gradients. Passes of other threads are left alone. A
    compiled model runs uncompiled meanwhile, in one thread at a time.

    Raises:
        UserError: as for `mixing_matrices`.
    """
    known = blocks_of(model)
    chosen = check_blocks(blocks, len(known))
    if wrong := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"unknown axis {wrong[0]!r}: {did_you_mean(str(wrong[0]), AXES)}")
    seen: list[BlockMixing] = []

    layers = {id(part.mixer): part for part in model.modules() if isinstance(part, MixerLayer)}

    def watch(number: int) -> RemovableHandle:
        name, block = known[number]
        layer = layers.get(id(block))  # the kernels compute a whole layer, but not one whose parts have hooks

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                read = args[0] if layer is None else layer.norm1(args[0])
            seen.append(_mixing(block, read, number, name, axes, weights))

        return (block if layer is None else layer).register_forward_pre_hook(of_this_thread(hook))

    handles = [watch(number) for number in chosen]
    try:
        with uncompiled(model):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> list[tuple[str, DynaMixerBlock]]:
    """The blocks of a model with their names, in the order of depth.

    Raises:
        UserError: it has none.
    """
    found = [
        (name.removeprefix("_orig_mod.").removesuffix(".mixer"), module)
        for name, module in model.named_modules()
        if isinstance(module, DynaMixerBlock)
    ]
    if not found:
        raise UserError(f"this {type(model).__name__} has no DynaMixer blocks, so it has no mixing to show.")
    return found


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same hook, silent in other threads, which may run the same model meanwhile."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Runs a compiled model as it is written: what was compiled before a hook came does not know of it."""
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def check_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """The numbers of the blocks asked for, sorted, negative ones counted from the end.

    Raises:
        UserError: one that does not exist.
    """
    for number in blocks or ():
        if not -depth <= number < depth:
            raise UserError(f"there is no block {number}: this model has {depth}, numbered from 0 to {depth - 1}.")
    return sorted({number % depth for number in blocks}) if blocks is not None else list(range(depth))


def relative_entropy(matrices: Tensor) -> Tensor:
    """Entropy of each row of [..., output, input] over that of even weights: 0 to 1, [..., output]; 0 for one token."""
    p = matrices.detach().float().abs()
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.special.entr(p).sum(-1) / max(math.log(matrices.shape[-1]), 1e-12)


@torch.no_grad()
def _mixing(
    block: DynaMixerBlock, x: Tensor, number: int, name: str, axes: Sequence[Axis], weights: bool
) -> BlockMixing:
    row, column = block.row, block.row if block.shared else block.column
    mixers = {"column": column, "row": row, "channel": block.channel}
    branches = tuple(branch for branch, mixer in mixers.items() if mixer is not None)
    lines = {"row": x, "column": x.transpose(1, 2).contiguous()}
    made: dict[str, Tensor] = {}
    for axis, mixer in (("row", row), ("column", column)):
        if mixer is not None and axis in axes:
            matrices = mixer.matrices_for(lines[axis])  # static: [S, K, K], the same for all lines
            made[axis] = matrices.expand(*x.shape[:1], lines[axis].shape[1], *matrices.shape[-3:]).detach()
    branch_weights = None
    if weights and block.reweight is not None:
        branch_weights = block.branch_weights(block.branches(x)).detach()
    some = row if row is not None else column
    assert some is not None, "a block mixes rows or columns"
    return BlockMixing(
        block=number,
        name=name,
        grid=(x.shape[1], x.shape[2]),
        segments=some.segments,
        softmax=some.softmax,
        generator=some.generator,
        row=made.get("row"),
        column=made.get("column"),
        branches=branches,
        branch_weights=branch_weights,
        shares=_shares(block, branches, branch_weights, len(x)) if weights else {},
    )


def _shares(block: DynaMixerBlock, branches: tuple[str, ...], weights: Tensor | None, images: int) -> dict[str, Tensor]:
    """How much of the sum of a block's branches comes from each segment of each branch; for a picture all of them sum to 1.

    Output channel c takes |weight of the branch for c| x sum of |projection to c| from the channels of a segment. That is divided
    by its sum over segments and branches, and averaged over c.
    """
    parts: dict[str, Tensor] = {}
    for i, branch in enumerate(branches):
        if branch == "channel":
            assert block.channel is not None
            projection, segments = block.channel.weight, 1
        else:
            mixer = block.column if branch == "column" and not block.shared else block.row
            assert mixer is not None
            projection, segments = mixer.project.weight, mixer.segments
        taken = projection.detach().float().abs().unflatten(1, (segments, -1)).sum(-1)  # [C, S]
        parts[branch] = taken.expand(images, -1, -1)
        if weights is not None:
            parts[branch] = parts[branch] * weights[..., i, None].float()
    whole = torch.cat(list(parts.values()), dim=2).sum(2, keepdim=True)  # [B, C, 1]
    tiny = torch.finfo(whole.dtype).tiny
    shares = {branch: (part / whole.clamp(min=tiny)).mean(1) for branch, part in parts.items()}
    return {branch: share[:, 0] if branch == "channel" else share for branch, share in shares.items()}
