"""The plots of docs/evidence.md. Each PNG says in its metadata what was drawn, so that it is known whether it is of today."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from dynamixer.files import whole_file
from dynamixer.study.statistics import Difference, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = "Description"
LOOK = 1  # to be raised when plots are to be drawn anew from the same figures
COLOURS = ("#2563a8", "#c2571a", "#2f855a", "#7b3fa0", "#b7950b", "#0e7490", "#9b2c4b", "#5b6470", "#8a5a2b")
INK = "#222222"
Series = Mapping[str, Mapping[float, Sequence[float]]]  # by label: values of the seeds at each place


@dataclass(frozen=True)
class Bar:
    """A row of a comparison."""

    label: str
    tops: tuple[float, ...]
    difference: Difference | None
    paper: float | None


@dataclass(frozen=True)
class Picture:
    """A plot, drawn only when it is written."""

    caption: str
    data: str  # all that is drawn, as text
    draw: "Callable[[], Figure]"

    @property
    def digest(self) -> str:
        """Of what is drawn."""
        return hashlib.sha256(f"{LOOK}\n{self.caption}\n{self.data}".encode()).hexdigest()[:16]


def comparison(title: str, bars: Sequence[Bar]) -> Picture:
    """Accuracies with their seeds, and differences to the base row beside the paper's."""
    return Picture(
        f"{title}: accuracy of each seed, mean and standard deviation; difference with its 95 % interval, and the published one",
        repr(bars),
        lambda: _comparison(title, bars),
    )


def series(title: str, x: str, y: str, values: Series) -> Picture:
    """Lines with the standard deviation over seeds."""
    data = {label: {place: tuple(v) for place, v in line.items()} for label, line in values.items()}
    several = any(len(seeds) > 1 for line in data.values() for seeds in line.values())
    caption = f"{title}: {'mean and standard deviation over seeds' if several else 'one seed'}"
    return Picture(caption, f"{x} {y} {data}", lambda: _series(title, x, y, data))


def matrices(title: str, found: Mapping[str, Mapping[str, tuple[float, ...]]]) -> Picture:
    """Mixing matrices, [output token, input token] as one tuple each, by row and then by what stands above a column."""
    return Picture(
        f"{title}: red for positive weights, blue for negative ones", repr(found), lambda: _matrices(title, found)
    )


def write_pictures(folder: Path, pictures: Mapping[str, Picture]) -> list[Path]:
    """Write those that are not there as they should be, whole or not at all."""
    written = []
    for name, picture in pictures.items():
        path = folder / name
        if drawn(path) != picture.digest:
            with whole_file(path) as temporary:
                picture.draw().savefig(temporary, format="png", metadata={KEY: picture.digest})
            written.append(path)
    return written


def drawn(path: Path) -> str | None:
    """The digest of what a PNG shows, or None where there is none."""
    try:
        with Image.open(path) as picture:
            return str(picture.info.get(KEY))
    except (OSError, UnidentifiedImageError):
        return None


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - matplotlib takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _comparison(title: str, bars: Sequence[Bar]) -> "Figure":
    figure = _figure(9.5, 1.5 + 0.36 * len(bars))
    figure.set_layout_engine("constrained", w_pad=0.15)  # inches; a number below the end of an axis is as wide as this
    left, right = figure.subplots(1, 2, sharey=True)
    for place, bar in enumerate(bars):
        if bar.tops:
            found = spread(bar.tops)
            left.plot(bar.tops, [place] * len(bar.tops), "o", color=COLOURS[0], alpha=0.35, markersize=4)
            left.errorbar(found.mean, place, xerr=found.deviation, fmt="D", color=COLOURS[0], capsize=3, markersize=5)
        if (d := bar.difference) is not None:
            error = None if d.low is None or d.high is None else [[d.mean - d.low], [d.high - d.mean]]
            right.errorbar(d.mean, place, xerr=error, fmt="D", color=COLOURS[0], capsize=3, markersize=5)
            if bar.paper is not None:
                right.plot(bar.paper, place, "o", mfc="none", color=COLOURS[1], markersize=8)
    left.set_yticks(range(len(bars)), [bar.label if bar.tops else f"{bar.label} (not run)" for bar in bars])
    left.set_ylim(len(bars) - 0.5, -0.5)
    left.set(xlabel="top-1 of the test pictures (%)")
    right.axvline(0, color=INK, linewidth=1)
    right.set(xlabel="difference to the base row (points)")
    right.errorbar([], [], xerr=[], fmt="D", color=COLOURS[0], capsize=3, label="here, 95 % interval")
    right.plot([], [], "o", mfc="none", color=COLOURS[1], markersize=8, label="published, ImageNet")
    figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=2, fontsize=9)
    for axes in (left, right):
        _plain(axes)
    figure.suptitle(title, color=INK)
    return figure


def _matrices(title: str, found: Mapping[str, Mapping[str, tuple[float, ...]]]) -> "Figure":
    across = max(map(len, found.values()))
    figure = _figure(1.2 + 1.25 * across, 0.7 + 1.5 * len(found))
    for line, (label, row) in zip(figure.subplots(len(found), across, squeeze=False), found.items(), strict=True):
        for axes, (name, weights) in zip(line, row.items(), strict=True):
            side = math.isqrt(len(weights))
            most = max(map(abs, weights))
            axes.imshow([weights[i * side : (i + 1) * side] for i in range(side)], cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_title(f"{name}\n{most * side:.1f}x", fontsize=7, color=INK, pad=3)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7, color=INK)
    figure.supxlabel("reads token", fontsize=8)
    figure.supylabel("output token", fontsize=8)
    figure.suptitle(title, color=INK, fontsize=11)
    return figure


def _series(title: str, x: str, y: str, values: Series) -> "Figure":
    figure = _figure(9.0, 4.2)
    axes = figure.subplots()
    places = sorted({place for line in values.values() for place in line})
    apart = 0.02 * (places[-1] - places[0]) / max(1, len(values))  # so that error bars do not hide each other
    for number, (label, line) in enumerate(values.items()):
        found = {place: spread(line[place]) for place in sorted(line)}
        axes.errorbar(
            [place + apart * (number - (len(values) - 1) / 2) for place in found],
            [one.mean for one in found.values()],
            yerr=[math.nan if one.deviation is None else one.deviation for one in found.values()],
            color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number < len(COLOURS) else "--",
            marker="o",
            markersize=4,
            capsize=3,
            label=label,
        )
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.set_xticks(places)
    _plain(axes)
    figure.legend(frameon=False, loc="outside right center", fontsize=9)
    return figure
