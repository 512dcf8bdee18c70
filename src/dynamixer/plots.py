"""Pictures of a run: loss and accuracy curves, confusion matrix, a sheet of predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK, TRAIN, HELD = "#222222", "#2563a8", "#c2571a"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def curves_picture(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss and accuracy by epoch, from the rows of metrics.csv."""
    figure = _figure(9, 3.6)
    epochs = [row["epoch"] for row in rows]
    parts = (("loss", "cross-entropy (nats)", "loss"), ("top1", "top-1 accuracy (%)", "accuracy"))
    for axes, (key, label, name) in zip(figure.subplots(1, 2), parts, strict=True):
        for prefix, colour, who in (("train", TRAIN, "training, augmented"), ("val", HELD, "held out")):
            values = [row.get(f"{prefix}_{key}") for row in rows]
            if all(value is not None for value in values):
                axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=who)
        axes.set(xlabel="epoch", ylabel=label, title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, color=INK)
    return figure


def confusion_picture(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix [true, predicted], each row in percent of its class."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(classes)
    side = min(14.0, 3.2 + 0.55 * n)
    figure = _figure(side, side * 0.9)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if n <= 40:
        axes.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), classes)
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
        axes.set_title(title if len(title) < 28 else f"…{title[-26:]}", fontsize=9, color=INK)
        axes.axis("off")
        names, shares = [name for name, _ in top[:3]][::-1], [100 * p for _, p in top[:3]][::-1]
        bars.barh(names, shares, color=TRAIN)
        for i, share in enumerate(shares):
            inside = share > 70
            bars.text(share + (-2 if inside else 2), i, f"{share:.0f} %", va="center", ha="right" if inside else "left",
                      fontsize=7, color="white" if inside else INK)  # fmt: skip
        bars.set_xlim(0, 100)
        bars.tick_params(labelsize=8, length=0)
        bars.set_xticks([])
        bars.spines[:].set_visible(False)
    return figure
