"""What changes with the picture: means and variances of the matrices over many pictures.

Letters: B images, S segments, K tokens in a line.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamixer.errors import UserError
from dynamixer.explain.matrices import AXES, Axis, BlockMixing, look


@dataclass(frozen=True)
class AxisAverage:
    """The matrices of one axis of one block over many pictures."""

    mean: Tensor  # [lines, S, K, K], float32
    variance: float  # of a weight over pictures, averaged over all weights
    change: float  # the root of it, over 1/K: how far a weight usually moves, in units of an even weight
    dynamic: float  # 0 to 1: the part of what matrices differ from plain averaging that changes with the picture
    entropy: float  # mean over pictures, lines and segments, 0 to 1 (BlockMixing.entropy)


@dataclass(frozen=True)
class BlockAverage:
    """One block over many pictures."""

    block: int
    name: str
    grid: tuple[int, int]
    row: AxisAverage | None
    column: AxisAverage | None
    branches: tuple[str, ...]
    branch_weights: Tensor | None  # mean over pictures, [C, branches]

    def of(self, axis: Axis) -> AxisAverage | None:
        """That of one axis."""
        return self.row if axis == "row" else self.column


@dataclass(frozen=True)
class Average:
    """The mixing of many pictures."""

    pictures: int
    blocks: tuple[BlockAverage, ...]


class _Moments:
    """Mean and sum of squared distances from it, merged batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """A batch [B, ...]."""
        values = values.detach().cpu().double()
        n, mean = len(values), values.mean(0)
        apart = mean - self.mean
        total = self.count + n
        self.squares = self.squares + (values - mean).square().sum(0) + apart.square() * (self.count * n / total)
        self.mean = self.mean + apart * (n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Over what was added, as an estimate for all that might be: without bias, of two or more."""
        return self.squares / (self.count - 1)


class _Block:
    def __init__(self, first: BlockMixing):
        self.first = first
        self.matrices: dict[Axis, _Moments] = {axis: _Moments() for axis in AXES if first.matrices(axis) is not None}
        self.entropies: dict[Axis, _Moments] = {axis: _Moments() for axis in self.matrices}
        self.weights = _Moments() if first.branch_weights is not None else None

    def add(self, mixing: BlockMixing) -> None:
        for axis, moments in self.matrices.items():
            matrices, entropy = mixing.matrices(axis), mixing.entropy(axis)
            assert matrices is not None
            assert entropy is not None
            moments.add(matrices)
            self.entropies[axis].add(entropy)
        if self.weights is not None and mixing.branch_weights is not None:
            self.weights.add(mixing.branch_weights)

    def result(self) -> BlockAverage:
        axes = {axis: self._axis(axis) for axis in self.matrices}
        first = self.first
        return BlockAverage(
            block=first.block,
            name=first.name,
            grid=first.grid,
            row=axes.get("row"),
            column=axes.get("column"),
            branches=first.branches,
            branch_weights=None if self.weights is None else self.weights.mean.float(),
        )

    def _axis(self, axis: Axis) -> AxisAverage:
        moments = self.matrices[axis]
        mean, variance = moments.mean, float(moments.variance.mean())
        if not self.first.content:  # of the same matrices, what arithmetic leaves is no variance
            variance = 0.0
        fixed = float((mean - mean.mean(-1, keepdim=True)).square().mean())
        return AxisAverage(
            mean=mean.float(),
            variance=variance,
            change=variance**0.5 * mean.shape[-1],
            dynamic=min(1.0, variance / (variance * (1 - 1 / moments.count) + fixed)) if variance else 0.0,
            entropy=float(self.entropies[axis].mean.mean()),
        )


def average(
    model: nn.Module, batches: Iterable[Tensor], *, blocks: Sequence[int] | None = None, weights: bool = True
) -> Average:
    """The matrices of each block over pictures, and how much they change from one picture to the next.

    With P a weight, m its mean over pictures and r the mean of m over its matrix's row, the mean of (P - r)^2 over pictures
    is var(P) + (m - r)^2. Both terms are averaged over all weights, and `dynamic` is the first as a part of the sum, as an
    estimate for all pictures that might be: of N pictures the variance is divided by N - 1. It is 0 for
    matrices that no picture changes, 1 where they have nothing in common but averaging. Matrices that are nearly even can be
    dynamic by this and do little: `change` tells.

    Args:
        model: as for `mixing_matrices`.
        batches: pictures as the model reads them, [B, 3, height, width], all of one size; two or more together.
        blocks: which, counted from 0; all if None.
        weights: also the weights of the branches.

    Raises:
        UserError: fewer than two pictures, or pictures of several sizes.
    """
    kept: dict[int, _Block] = {}
    count = 0
    size: tuple[int, ...] = ()
    for images in batches:
        if size and tuple(images.shape[-2:]) != size:
            raise UserError(f"pictures of {size} and of {tuple(images.shape[-2:])} pixels have no common matrices.")
        size, count = tuple(images.shape[-2:]), count + len(images)
        for mixing in look(model, images, blocks=blocks, weights=weights).blocks if len(images) else ():
            kept.setdefault(mixing.block, _Block(mixing)).add(mixing)
    if count < 2:
        raise UserError(
            f"what changes from picture to picture needs two or more; there {'is' if count else 'are'} {count}."
        )
    return Average(count, tuple(block.result() for block in kept.values()))
