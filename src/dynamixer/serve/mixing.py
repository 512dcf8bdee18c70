"""What `dynamixer.explain` takes from a model, as the API writes it.

Letters: H W grid of tokens, S segments, K tokens in a line.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dynamixer.explain.average import BlockAverage
from dynamixer.explain.matrices import AXES, Axis, BlockMixing, look


@dataclass(frozen=True)
class Layout:
    """What is the same of one block for every picture of a size."""

    stage: int
    grid: tuple[int, int]
    cell: tuple[float, float]  # height and width of a token as shares of the picture's; the last may reach beyond it
    segments: int
    content: bool  # else the matrices are the same for every line and picture, and one line is written
    weights: int  # numbers in its matrices


def layouts(model: nn.Module, images: Tensor) -> list[Layout]:
    """Of every block of a DynaMixer, from a pass of pictures of the size, in which no matrices are made."""
    seen = look(model, images, axes=(), weights=False)
    found = []
    for block in seen.blocks:
        (height, width), side = block.grid, seen.token_side(block)
        lines = {"row": height if block.content else 1, "column": width if block.content else 1}
        tokens = {"row": width, "column": height}
        weights = sum(lines[axis] * block.segments * tokens[axis] ** 2 for axis in AXES if axis in block.branches)
        stage = int(block.name.split(".")[1])  # stages.1.blocks.0
        cell = side / seen.size[0], side / seen.size[1]
        found.append(Layout(stage, block.grid, cell, block.segments, block.content, weights))
    return found


def written(blocks: Sequence[BlockMixing | BlockAverage], known: Sequence[Layout], encoding: str) -> dict[str, Any]:
    """The matrices of one picture (the first), or of an average, as JSON can hold them: in base64 or as lists."""
    described = []
    for block in blocks:
        layout, weights = known[block.block], block.branch_weights
        about: dict[str, Any] = {"block": block.block, "stage": layout.stage, "grid": layout.grid, "cell": layout.cell}
        about["branches"] = None
        if weights is not None:  # [1, C, branches], or a mean without the pictures' axis
            shares = weights.float().flatten(0, -2).mean(0).tolist()
            about["branches"] = dict(zip(block.branches, shares, strict=True))
        for axis in AXES:
            matrices = _matrices(block, axis)
            lines = slice(None) if layout.content else slice(1)
            about[axis] = None if matrices is None else _encoded(matrices[lines].float().cpu(), encoding)
        described.append(about)
    return {"encoding": encoding, "axes": ["line", "segment", "output", "input"], "blocks": described}


def _matrices(block: BlockMixing | BlockAverage, axis: Axis) -> Tensor | None:
    """[lines, S, K, K]."""
    if isinstance(block, BlockAverage):
        average = block.of(axis)
        return None if average is None else average.mean
    matrices = block.matrices(axis)
    return None if matrices is None else matrices[0]


def _encoded(matrices: Tensor, encoding: str) -> dict[str, Any]:
    if encoding == "lists":
        return {"shape": list(matrices.shape), "data": matrices.tolist()}
    values = matrices.numpy().astype("<f4" if encoding == "float32" else "<f2")
    return {"shape": list(matrices.shape), "data": base64.b64encode(values.tobytes()).decode()}
