"""The matrices of every block, taken while the model runs.

Letters: B images, H W grid of tokens, C channels, K a line's length, S segments.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynamixer.layers import AxisMixer, DynaMixerBlock
from dynamixer.models import DynaMixer


@dataclass(frozen=True)
class BlockMixing:
    """What one block mixes with, for one picture or for an average of several.

    `row` is [H, S, W, W] and `column` [W, S, H, H]: [line, segment, output token, input token]. Where matrices are the same
    for every line and picture (generator="static") there is one line. None: the block has no such branch.
    """

    stage: int
    grid: tuple[int, int]
    cell: tuple[float, float]  # height and width of a token as shares of the picture's; the last may reach beyond it
    row: Tensor | None
    column: Tensor | None
    branches: dict[str, float] | None  # the reweighting, averaged over channels; None where branches are summed

    @property
    def numbers(self) -> int:
        """How many weights there are."""
        return sum(axis.numel() for axis in (self.row, self.column) if axis is not None)


def blocks_of(model: nn.Module) -> list[tuple[int, DynaMixerBlock]]:
    """The mixing blocks in their order, each with its stage; none for a model of another kind."""
    if not isinstance(model, DynaMixer):
        return []
    return [(i, layer.mixer) for i, stage in enumerate(model.stages) for layer in stage.blocks]


@torch.inference_mode()
def observe(
    model: DynaMixer, picture: Tensor, wanted: frozenset[int] | None = None
) -> tuple[Tensor, list[BlockMixing]]:
    """Run the model on one picture [1, 3, height, width] and take the matrices of the blocks `wanted` (None: of all).

    Returns:
        The logits [1, classes], which are the model's own, and what was taken, in the order of the blocks.
    """
    taken: list[BlockMixing] = []
    scaled: list[tuple[int, int]] = []  # the picture's size before the stem: `enlarge` may change it
    handles = [
        model.patch_embed.register_forward_pre_hook(lambda _, inputs: scaled.append(tuple(inputs[0].shape[-2:])))
    ]

    def watch(stage: int, block: DynaMixerBlock) -> None:
        step = model.feature_info[stage]["reduction"]
        weights: list[Tensor] = []

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            height, width = scaled[0]
            column = block.row if block.shared else block.column
            taken.append(
                BlockMixing(
                    stage=stage,
                    grid=(x.shape[1], x.shape[2]),
                    cell=(step / height, step / width),
                    row=_matrices(block.row, x),
                    column=_matrices(column, x.transpose(1, 2).contiguous()),
                    branches=None,
                )
            )

        def reweighted(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
            weights.append(logits)

        def after(*_: object) -> None:
            if weights:
                taken[-1] = replace(taken[-1], branches=_branches(block, weights.pop()))

        handles.extend([block.register_forward_pre_hook(before), block.register_forward_hook(after)])
        if block.reweight is not None:
            handles.append(block.reweight.register_forward_hook(reweighted))

    for number, (stage, block) in enumerate(blocks_of(model)):
        if wanted is None or number in wanted:
            watch(stage, block)
    try:
        logits: Tensor = model(picture)
    finally:
        for handle in handles:
            handle.remove()
    return logits, taken


def _matrices(mixer: AxisMixer | None, x: Tensor) -> Tensor | None:
    """From x [1, lines, K, C] -> [lines, S, K, K] in float32 on the CPU; one line where all share them."""
    if mixer is None:
        return None
    made = mixer.matrices_for(x).float().cpu()
    return made[None] if made.dim() == 3 else made[0]


def _branches(block: DynaMixerBlock, logits: Tensor) -> dict[str, float]:
    has = {"column": block.shared or block.column is not None, "row": block.row is not None}
    names = [name for name, there in has.items() if there] + (["channel"] if block.channel is not None else [])
    shares = logits.float().unflatten(-1, (-1, len(names))).softmax(-1).mean((0, 1)).tolist()
    return dict(zip(names, shares, strict=True))


class Average:
    """The mean of what several pictures mix with."""

    def __init__(self) -> None:
        self.pictures = 0
        self._sums: list[BlockMixing] = []

    def add(self, blocks: list[BlockMixing]) -> None:
        """Count one picture more; all have to be of one size."""
        self.pictures += 1
        if not self._sums:
            self._sums = [
                replace(
                    b,
                    row=None if b.row is None else b.row.clone(),
                    column=None if b.column is None else b.column.clone(),
                )
                for b in blocks
            ]
            return
        for i, (total, block) in enumerate(zip(self._sums, blocks, strict=True)):
            for kept, more in ((total.row, block.row), (total.column, block.column)):
                if kept is not None and more is not None:
                    kept.add_(more)
            if total.branches is not None and block.branches is not None:
                branches = {name: share + block.branches[name] for name, share in total.branches.items()}
                self._sums[i] = replace(total, branches=branches)

    def mean(self) -> list[BlockMixing]:
        """The average so far."""
        n = self.pictures
        return [
            replace(
                b,
                row=None if b.row is None else b.row / n,
                column=None if b.column is None else b.column / n,
                branches=None if b.branches is None else {name: share / n for name, share in b.branches.items()},
            )
            for b in self._sums
        ]


def count_numbers(model: DynaMixer, size: tuple[int, int]) -> list[int]:
    """How many weights each block has for a picture of a size, counted without running anything."""
    if model.enlarge:
        height, width = size
        native_h, native_w = model.img_size
        size = (
            max(height, native_h, -(-height * native_w // width)),
            max(width, native_w, -(-width * native_h // height)),
        )
    counts = []
    for stage, block in blocks_of(model):
        step = model.feature_info[stage]["reduction"]
        height, width = (math.ceil(side / step) for side in size)
        column = block.row if block.shared else block.column
        total = 0
        for mixer, lines, tokens in ((block.row, height, width), (column, width, height)):
            if mixer is not None:
                total += (1 if mixer.generator == "static" else lines) * mixer.segments * tokens * tokens
        counts.append(total)
    return counts
