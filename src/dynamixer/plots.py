"""Pictures of a run: its curves, what it takes for what and how surely, a sheet of predictions."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

INK, TRAIN, HELD = "#222222", "#2563a8", "#c2571a"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def short(name: str, length: int = 28) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def curves_picture(rows: Sequence[dict[str, Any]], title: str, training: str = "augmented") -> Figure:
    """Loss and accuracy by epoch, from the rows of metrics.csv; `training` says what is special about the training figures."""
    figure = _figure(9, 3.6)
    epochs = [row["epoch"] for row in rows]
    parts = (("loss", "cross-entropy (nats)", "loss"), ("top1", "top-1 accuracy (%)", "accuracy"))
    for axes, (key, label, name) in zip(figure.subplots(1, 2), parts, strict=True):
        for prefix, colour, who in (("train", TRAIN, f"training ({training})"), ("val", HELD, "held out")):
            values = [row.get(f"{prefix}_{key}") for row in rows]
            if all(value is not None for value in values):
                axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=who)
        axes.set(xlabel="epoch", ylabel=label, title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, color=INK, parse_math=False)
    return figure


def confusion_picture(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix [true, predicted], each row in percent of its class."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n, classes = len(classes), [short(name) for name in classes]
    side = min(14.0, 3.2 + 0.55 * n)
    figure = _figure(side, side * 0.9)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if n <= 40:
        axes.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(n), classes, parse_math=False)
    if n <= 20:
        for i, j in np.ndindex(n, n):
            if counts[i, j]:
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if share[i, j] > 55 else INK)  # fmt: skip
    accuracy = 100 * np.trace(counts) / max(1, counts.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.1f} % of {counts.sum():,} pictures right; rows in %")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class (%)")
    return figure


def prediction_sheet(pictures: Sequence[tuple[Image.Image, str, Sequence[tuple[str, float]]]]) -> Figure:
    """Each picture with its title and its most likely classes as bars: (picture, title, [(class, probability)])."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _figure(3.2 * columns, 3.8 * rows)
    cells = figure.subfigures(rows, columns, squeeze=False, wspace=0.06, hspace=0.06).flat
    for cell, (picture, title, top) in zip(cells, pictures, strict=False):
        axes, bars = cell.subplots(2, 1, height_ratios=[2.6, 1])
        axes.imshow(picture, interpolation="nearest" if max(picture.size) < 100 else "antialiased")
        axes.set_title(title if len(title) < 28 else f"…{title[-26:]}", fontsize=9, color=INK, parse_math=False)
        axes.axis("off")
        names, shares = [name for name, _ in top[:3]][::-1], [100 * p for _, p in top[:3]][::-1]
        bars.barh(range(len(names)), shares, color=TRAIN)
        bars.set_yticks(range(len(names)), names, parse_math=False)
        for i, share in enumerate(shares):
            inside = share > 70
            bars.text(share + (-2 if inside else 2), i, f"{share:.0f} %", va="center", ha="right" if inside else "left",
                      fontsize=7, color="white" if inside else INK)  # fmt: skip
        bars.set_xlim(0, 100)
        bars.tick_params(labelsize=8, length=0)
        bars.set_xticks([])
        bars.spines[:].set_visible(False)
    return figure


def reliability_picture(bins: np.ndarray, ece: float) -> Figure:
    """How far confidence can be believed: accuracy by confidence, and how often each confidence occurs.

    Args:
        bins: [bins, 3], pictures, sum of confidences and hits, by equal steps of the confidence from 0 to 1.
        ece: expected calibration error in percent.
    """
    figure = _figure(5.6, 6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    count, width = bins[:, 0], 100 / len(bins)
    held = count > 0
    middle = (np.flatnonzero(held) + 0.5) * width
    confidence, accuracy = 100 * bins[held, 1:].T / count[held]
    upper.bar(middle, accuracy, 0.92 * width, color=TRAIN, label="accuracy")
    upper.bar(middle, confidence - accuracy, 0.84 * width, bottom=accuracy, color="#f6d9c6", hatch="////", alpha=0.85,
              edgecolor=HELD, linewidth=0.8, label="gap to the mean confidence")  # fmt: skip
    upper.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1, label="as sure as right")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    upper.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8.5, columnspacing=1.2)
    figure.suptitle(f"expected calibration error {ece:.1f} %", color=INK)
    lower.bar((np.arange(len(bins)) + 0.5) * width, 100 * count / max(1, count.sum()), 0.92 * width, color="#8a8f98")
    lower.set(xlabel="confidence: probability of the predicted class (%)", ylabel="pictures (%)")
    lower.set_ylim(0, max(1, *lower.get_ylim()))
    for axes in (upper, lower):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def confused_sheet(pictures: Sequence[tuple[Image.Image, str, str, float]]) -> Figure:
    """The most confidently wrong pictures, at most 24: (picture, true class, predicted class, its probability)."""
    if not pictures:
        return _sentence("No picture was taken for another class.")
    shown = pictures[:24]
    captions = [_caption(true, taken, probability) for _, true, taken, probability in shown]
    columns = min(6, len(shown)) if len(shown) != 4 else 2
    rows = -(-len(shown) // columns)
    # Inches, not constrained layout, which forgets that titles move with pictures of another shape.
    cell, gap, text = 1.85, 0.15, 0.1 + 0.145 * max(caption.count("\n") + 1 for caption in captions)
    width, height = gap + columns * (cell + gap), gap + rows * (cell + text + gap)
    figure = _figure(width, height)
    figure.set_layout_engine("none")
    for i, ((picture, *_), caption) in enumerate(zip(shown, captions, strict=True)):
        left, top = gap + i % columns * (cell + gap), height - gap - i // columns * (cell + text + gap)
        axes = figure.add_axes((left / width, (top - cell) / height, cell / width, cell / height), anchor="S")
        axes.imshow(picture, cmap="gray", interpolation="nearest" if max(picture.size) < 100 else "antialiased")
        axes.axis("off")
        figure.text((left + cell / 2) / width, (top - cell - 0.07) / height, caption, fontsize=8, color=INK,
                    ha="center", va="top", parse_math=False)  # fmt: skip
    return figure


def _caption(true: str, taken: str, probability: float, letters: int = 26) -> str:
    """What was taken for what and how surely: in one line where it fits, else the true class stands above."""
    # A non-breaking space keeps the percentage together, and 100 % is not said of 99.7 %.
    percent = f"{min(99, int(100 * probability)) if probability < 1 else 100}\N{NO-BREAK SPACE}%"
    parts = [_short(true, 2 * letters - 8), f"taken for {_short(taken, 2 * letters - 18)}, {percent}"]
    whole = " ".join(parts)
    return whole if len(whole) <= letters else "\n".join(textwrap.fill(part, letters) for part in parts)


def confused_pairs_picture(confusion: np.ndarray, classes: Sequence[str], top: int = 15) -> Figure:
    """The most frequent confusions as bars, from the counts [true class, predicted class]."""
    wrong = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:top]
    pairs = [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    pairs = [pair for pair in pairs if pair[2]]
    if not pairs:
        return _sentence("No picture was taken for another class.")
    figure = _figure(8, 1.3 + 0.3 * len(pairs))
    axes = figure.subplots()
    counts = [count for *_, count in pairs]
    axes.bar_label(axes.barh(range(len(pairs)), counts, color=HELD), fmt="{:,.0f}", padding=3, fontsize=9, color=INK)
    names = [f"{_short(classes[i], 30)} → {_short(classes[j], 30)}" for i, j, _ in pairs]
    axes.set_yticks(range(len(pairs)), names, parse_math=False)
    axes.set(xlim=(0, 1.1 * max(counts)), ylim=(len(pairs) - 0.4, -0.6), xlabel="pictures")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("most frequent confusions: true → predicted", color=INK, fontsize=12)
    return figure


def _sentence(text: str) -> Figure:
    figure = _figure(5.6, 1.4)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=INK, fontsize=12)
    return figure


def _short(name: str, length: int) -> str:
    """A name of at most `length` characters, the middle left out."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half].rstrip()}…{name[-half:].lstrip()}"
