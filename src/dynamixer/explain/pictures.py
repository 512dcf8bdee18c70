"""Pictures of the mixing: matrices, a token's weights on the photograph, and what blocks do by depth.

One set of colours everywhere: rows are blue, columns orange, the channel branch grey. Weights that may be negative (no softmax)
are drawn from red, positive, over white to blue, negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from dynamixer.explain.average import Average, BlockAverage
from dynamixer.explain.matrices import AXES, Axis, BlockMixing, Explanation
from dynamixer.explain.receptive import Receptive, in_words
from dynamixer.plots import HELD, INK, TRAIN, _figure

COLOURS = {"row": TRAIN, "column": HELD, "channel": "#8a8f98"}
SIGNED, FLOW = "RdBu_r", "#6d28d9"
SIDE = {"row": -1, "column": 1}  # of a block's number, where both stand side by side
ACROSS = {"row": 1, "column": 0}  # which side of a grid (H, W) is the length of a line


@dataclass(frozen=True)
class Photo:
    """The picture as the network sees it, cropped, at a resolution for people, and how large the network takes it to be."""

    picture: Image.Image
    size: tuple[int, int]  # (height, width) in pixels that the stem read

    def draw(self, axes: Axes, *, pale: bool = True) -> None:
        """Put it on axes whose unit is a pixel of the stem; pale and grey, as a ground for colours."""
        shown: Any = self.picture
        if pale:
            shown = 0.6 + 0.4 * np.asarray(self.picture.convert("L")) / 255
        height, width = self.size
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="antialiased")
        axes.axis("off")

    def overlay(self, axes: Axes, rgba: np.ndarray, side: int) -> None:
        """Colours [H, W, 4] of the tokens of a grid, `side` pixels each."""
        height, width = rgba.shape[:2]
        axes.imshow(rgba, extent=(0, width * side, height * side, 0), interpolation="nearest")
        axes.set(xlim=(0, self.size[1]), ylim=(self.size[0], 0))

    def mark(self, axes: Axes, token: tuple[int, int], side: int) -> None:
        """A frame around one token."""
        corner = token[1] * side, token[0] * side
        width, height = (min(side, self.size[i] - corner[1 - i]) for i in (1, 0))
        for colour, line in (("white", 3.0), (INK, 1.4)):
            axes.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line, clip_on=False)
            )


def matrices_picture(mixing: BlockMixing, token: tuple[int, int]) -> Figure:
    """The matrices of the token's row and of its column, one panel for each segment: the output token reads along a line."""
    axes_there = [axis for axis in AXES if mixing.matrices(axis) is not None]
    across = min(8, mixing.segments)
    rows = -(-mixing.segments // across)
    figure = _figure(1.1 + 1.35 * across, (0.55 + 1.5 * rows) * len(axes_there) + 0.35)
    parts = figure.subfigures(len(axes_there), 1, squeeze=False, hspace=0.04)[:, 0]
    for part, axis in zip(parts, axes_there, strict=True):
        line = token[1 - ACROSS[axis]]
        matrices = _line(mixing, axis, line)
        colours = _scale(axis, float(np.abs(matrices).max()), mixing.softmax)
        cells = part.subplots(rows, across, squeeze=False)
        for s, cell in enumerate(cells.flat):
            cell.axis("on" if s < len(matrices) else "off")
            if s >= len(matrices):
                continue
            cell.imshow(matrices[s], cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
            cell.set_title(f"segment {s}", fontsize=8, color=INK, pad=3)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_color("#c9ccd1")
            at, length = token[ACROSS[axis]], mixing.grid[ACROSS[axis]]
            cell.add_patch(
                Rectangle((-0.5, at - 0.5), length, 1, fill=False, edgecolor=INK, linewidth=1, clip_on=False)
            )
        cells[0, 0].set(xlabel="reads token", ylabel="output token")
        for text in (cells[0, 0].xaxis.label, cells[0, 0].yaxis.label):
            text.set_fontsize(8)
        _bar(part, colours, cells, mixing.softmax)
        part.suptitle(f"{axis} {line}: {mixing.grid[ACROSS[axis]]} tokens", fontsize=10, color=COLOURS[axis])
    figure.suptitle(_title(mixing), color=INK, fontsize=12)
    return figure


def token_picture(photo: Photo, mixing: BlockMixing, token: tuple[int, int], side: int) -> Figure:
    """From where one token reads along its row and its column, on the photograph, one panel for each segment."""
    columns = min(4, mixing.segments)
    rows = -(-mixing.segments // columns)
    height, width = photo.size
    cell_w, cell_h = (2.3, 2.3 * height / width) if height <= width else (2.3 * width / height, 2.3)
    taken = {
        axis: _line(mixing, axis, token[1 - ACROSS[axis]])[:, token[ACROSS[axis]]]
        for axis in AXES
        if mixing.matrices(axis) is not None
    }  # [S, K]
    most = max(float(np.abs(weights).max()) for weights in taken.values())
    scales = {axis: (weights, _scale(axis, most, mixing.softmax)) for axis, weights in taken.items()}
    bars = list(scales.items()) if mixing.softmax else list(scales.items())[:1]
    figure = _figure(cell_w * columns + 0.85 * len(bars), 0.5 + (cell_h + 0.25) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for s, panel in enumerate(panels.flat):
        if s >= mixing.segments:
            panel.axis("off")
            continue
        photo.draw(panel)
        for axis, (weights, colours) in scales.items():
            cells = np.zeros((*mixing.grid, 4))
            cells[(token[0], slice(None)) if axis == "row" else (slice(None), token[1])] = _rgba(weights[s], colours)
            photo.overlay(panel, cells, side)
        photo.mark(panel, token, side)
        panel.set_title(f"segment {s}", fontsize=8, color=INK, pad=3)
    for axis, (_, colours) in bars:
        _bar(figure, colours, panels, mixing.softmax, axis)
    figure.suptitle(f"{_title(mixing)}: from where token {token[0]},{token[1]} reads", color=INK, fontsize=12)
    return figure


def receptive_picture(photo: Photo, found: Receptive, side: int, first_side: int) -> Figure:
    """From where a token's value comes: the photograph, the rollout and the gradient."""
    height, width = photo.size
    cell_w, cell_h = (3.1, 3.1 * height / width) if height <= width else (3.1 * width / height, 3.1)
    figure = _figure(0.4 + 3 * cell_w, 0.7 + cell_h)
    panels = figure.subplots(1, 3)
    photo.draw(panels[0], pale=False)
    panels[0].set_title("the picture as the network sees it", fontsize=9, color=INK)
    agreement = f"rank correlation {in_words(found.rank_correlation)}"
    for panel, values, name in (
        (panels[1], found.rollout, "rollout of the mixing"),
        (panels[2], found.gradient, f"gradient ({agreement})"),
    ):
        photo.draw(panel)
        weights = values.cpu().numpy()
        photo.overlay(panel, _rgba(weights, _scale("row", float(weights.max()), True, FLOW)), first_side)
        panel.set_title(name, fontsize=9, color=INK)
    for panel in panels:
        photo.mark(panel, found.token, side)
    figure.suptitle(
        f"from where token {found.token[0]},{found.token[1]} after block {found.block} comes", color=INK, fontsize=12
    )
    return figure


def entropy_picture(seen: Explanation) -> Figure:
    """How widely each block's tokens read, by depth: the mean over lines and segments, and the segments as dots."""
    figure = _figure(8, 3.4)
    axes = figure.subplots()
    for axis in AXES:
        offset = SIDE[axis] * 0.12
        there = [(b.block + offset, e[0].cpu().numpy()) for b in seen.blocks if (e := b.entropy(axis)) is not None]
        if there:
            means = [segments.mean() for _, segments in there]
            axes.plot([x for x, _ in there], means, color=COLOURS[axis], marker="o", markersize=5, label=axis)
            for x, segments in there:
                axes.plot(
                    np.full(len(segments), x), segments, ".", color=COLOURS[axis], alpha=0.35, markersize=5, zorder=1
                )
    axes.set(ylabel="entropy (1: reads all tokens alike)", ylim=(0, 1.03))
    _by_depth(axes, seen.blocks)
    return figure


def branches_picture(seen: Explanation) -> Figure:
    """The weights of the branches by depth: bars from the mean over channels, lines for the middle 80 % of channels."""
    figure = _figure(8, 3.4)
    axes = figure.subplots()
    weighted = [
        (b.block, b.branch_weights[0].float().cpu().numpy()) for b in seen.blocks if b.branch_weights is not None
    ]
    names = seen.blocks[0].branches
    for i, name in enumerate(names):
        places = [block + 0.26 * (i - (len(names) - 1) / 2) for block, _ in weighted]
        axes.bar(places, [w[:, i].mean() for _, w in weighted], 0.24, color=COLOURS[name], label=name)
        low, high = (np.array([np.quantile(w[:, i], q) for _, w in weighted]) for q in (0.1, 0.9))
        axes.vlines(places, low, high, color=INK, linewidth=1)
    axes.axhline(1 / len(names), color=INK, linewidth=0.8, linestyle="--", alpha=0.5)
    axes.set(ylabel="weight of the branch", ylim=(0, 1))
    _by_depth(axes, seen.blocks)
    return figure


def dynamic_picture(found: Average) -> Figure:
    """How much matrices change with the picture, by depth: as a part of their structure, and in units of an even weight."""
    figure = _figure(9, 3.6)
    shares, changes = figure.subplots(1, 2)
    for axis in AXES:
        offset = SIDE[axis] * 0.19
        there = [(b.block + offset, a) for b in found.blocks if (a := b.of(axis)) is not None]
        if not there:
            continue
        places = [x for x, _ in there]
        shares.bar(places, [100 * a.dynamic for _, a in there], 0.36, color=COLOURS[axis], label=axis)
        changes.bar(places, [a.change for _, a in there], 0.36, color=COLOURS[axis], label=axis)
    shares.set(ylabel="changes with the picture (%)", ylim=(0, 100))
    changes.set(ylabel="usual change of a weight\n(1: an even weight)")
    for axes in (shares, changes):
        _by_depth(axes, found.blocks)
    figure.suptitle(f"over {found.pictures:,} pictures", color=INK, fontsize=11)
    return figure


def _line(mixing: BlockMixing, axis: Axis, line: int) -> np.ndarray:
    """The matrices [S, K, K] of one line of the first picture."""
    matrices = mixing.matrices(axis)
    assert matrices is not None
    found: Tensor = matrices[0, line]
    return found.float().cpu().numpy()


def _scale(axis: str, most: float, softmax: bool, colour: str = "") -> ScalarMappable:
    """Colours for weights from 0, or without the softmax from -most, to `most`."""
    most = max(most, 1e-12)
    if not softmax:
        return ScalarMappable(Normalize(-most, most), SIGNED)
    dark = np.array(to_rgb(colour or COLOURS[axis]))
    steps: Any = [(0, "white"), (0.6, dark), (1, 0.45 * dark)]
    return ScalarMappable(Normalize(0, most), LinearSegmentedColormap.from_list(axis, steps))


def _rgba(weights: np.ndarray, colours: ScalarMappable) -> np.ndarray:
    """Colours that are clearer where the weight is smaller, so that the photograph shows."""
    rgba = np.array(colours.to_rgba(weights))
    rgba[..., 3] = 0.92 * np.clip(np.abs(weights) / colours.norm.vmax, 0, 1) ** 0.6
    return rgba


def _bar(figure: Any, colours: ScalarMappable, panels: Any, softmax: bool, axis: str = "") -> None:
    label = f"weight in the {axis}" if axis and softmax else "weight" if softmax else "weight (negative: blue)"
    bar = figure.colorbar(colours, ax=panels, shrink=0.85, aspect=32, fraction=0.02, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _title(mixing: BlockMixing) -> str:
    same = "" if mixing.content else ", the same for every picture"
    return f"block {mixing.block}{same}"


def _by_depth(axes: Axes, blocks: Sequence[BlockMixing | BlockAverage]) -> None:
    """Blocks along the x axis, a line where the grid changes, and the grids' sizes above."""
    start = 0
    for i, block in enumerate(blocks):
        if i + 1 == len(blocks) or blocks[i + 1].grid != block.grid:
            middle = (blocks[start].block + block.block) / 2
            text = f"{block.grid[0]}x{block.grid[1]} tokens"
            axes.text(
                middle, 1.02, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color="#666d78"
            )
            if i + 1 < len(blocks):
                axes.axvline(block.block + 0.5, color="#666d78", linewidth=0.8, linestyle=":")
            start = i + 1
    numbers = [block.block for block in blocks]
    axes.set(xlabel="block", xlim=(min(numbers) - 0.6, max(numbers) + 0.6), xticks=numbers[:: -(-len(numbers) // 24)])
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=3, borderaxespad=0)
