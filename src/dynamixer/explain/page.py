"""The page of one picture: which pictures are drawn, what is said under them, and the files."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dynamixer.data.preprocess import MAX_SIDE, Preprocessing
from dynamixer.explain import pictures as draw
from dynamixer.explain.average import Average
from dynamixer.explain.matrices import AXES, BlockMixing, Explanation
from dynamixer.explain.receptive import Receptive, in_words
from dynamixer.files import whole_file
from dynamixer.plots import prediction_sheet
from dynamixer.predict import Guess
from dynamixer.training.report import write_report

WRITTEN = re.compile(r"(picture|receptive|branches|entropy|dynamic|(token|matrices)-\d+)\.png")
REPORT = "report.html"
SHOWN = 512  # pixels at least of the photograph's shorter side, for people


@dataclass(frozen=True)
class Findings:
    """What there is to draw of one picture."""

    title: str
    photo: draw.Photo
    top: tuple[Guess, ...]
    token: tuple[int, int]  # on the first grid
    seen: Explanation
    flow: Receptive
    average: Average | None


class Drawn(NamedTuple):
    """A picture with what is said of it."""

    name: str  # of the file, without .png
    heading: str
    caption: str
    figure: Figure


def place(token: tuple[int, int], seen: Explanation, mixing: BlockMixing) -> tuple[int, int]:
    """The token of a block at the place of a token of the first grid."""
    merged = seen.token_side(mixing) // seen.token_side(seen.blocks[0])
    return token[0] // merged, token[1] // merged


def photo_of(picture: Image.Image, preprocessing: Preprocessing, size: tuple[int, int]) -> draw.Photo:
    """The crop that the network sees, at a resolution for people; `size` is what the stem read, in pixels."""
    times = max(1, min(-(-SHOWN // min(preprocessing.size)), MAX_SIDE // max(preprocessing.size)))
    larger = (preprocessing.size[0] * times, preprocessing.size[1] * times)
    plain = replace(preprocessing, size=larger, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return draw.Photo(to_pil_image(plain(picture).clamp(0, 1)), size)


def notes(seen: Explanation) -> list[str]:
    """What has to be known of a model to read its pictures: sentences, none for the paper's own kind."""
    first = seen.blocks[0]
    said = []
    if not first.content:
        said.append(
            "generator=static: the matrices are trained and have no content, they are the same for every picture."
        )
    if not first.softmax:
        said.append(
            "This model has no softmax: weights may be negative (blue) and need not sum to 1. Entropy and rollout take them "
            "without their signs, brought to a sum of 1."
        )
    said += [f"This model has no {branch} branch." for branch in (*AXES, "channel") if branch not in first.branches]
    if first.branch_weights is None:
        said.append("This model sums its branches (reweight=False): they have no weights to show.")
    return said


def drawn(found: Findings, chosen: Sequence[int]) -> Iterator[Drawn]:
    """Each picture, one at a time; the matrices of the chosen blocks."""
    seen, first, last = found.seen, found.seen.blocks[0], found.seen.blocks[-1]
    guesses = [(guess.label, guess.probability) for guess in found.top]
    sheet = prediction_sheet([(found.photo.picture, found.title, guesses)])
    yield Drawn("picture", "The picture", " ".join(["What the network sees, and its answer.", *notes(seen)]), sheet)
    sides = seen.token_side(last), seen.token_side(first)
    flow = draw.receptive_picture(found.photo, found.flow, *sides)
    yield Drawn("receptive", "From where the token's value comes", _agreement(found.flow), flow)
    for number in chosen:
        yield from _block(found, seen.blocks[number])
    if first.branch_weights is not None:
        caption = (
            "How much of each block comes along columns, along rows and from the token itself: the reweighting for this picture, "
            "mean over channels. Lines span the middle 80 % of channels, the dashed line is an even share."
        )
        yield Drawn("branches", "Weights of the branches", caption, draw.branches_picture(seen))
    caption = "Entropy of the weights over that of even ones, mean over lines; a dot is a segment. 0: one token, 1: all alike."
    yield Drawn("entropy", "How widely tokens read", caption, draw.entropy_picture(seen))
    if found.average is not None:
        caption = (
            "Left: of what distinguishes the matrices from plain averaging, the part that changes from picture to picture; the "
            "rest is a fixed pattern. Right: how far a weight usually moves (its standard deviation), in units of an even weight."
        )
        yield Drawn("dynamic", "What changes with the picture", caption, draw.dynamic_picture(found.average))


def _block(found: Findings, mixing: BlockMixing) -> Iterator[Drawn]:
    at, side, number = place(found.token, found.seen, mixing), found.seen.token_side(mixing), mixing.block
    signs = "" if mixing.softmax else " Red weights add, blue ones subtract."
    same = "" if mixing.content else " Trained: the same for every picture."
    caption = (
        f"From where token {at[0]},{at[1]} (framed) reads in its row and its column, segment by segment.{signs}{same}"
    )
    overlay = draw.token_picture(found.photo, mixing, at, side)
    yield Drawn(f"token-{number:02}", f"Block {number} on the picture", caption, overlay)
    caption = (
        "The matrices of that token's row and column. Down: the token that is written; across: the tokens that it reads; "
        f"framed: the token above.{signs}{same}"
    )
    yield Drawn(f"matrices-{number:02}", f"Block {number} as matrices", caption, draw.matrices_picture(mixing, at))


def _agreement(flow: Receptive) -> str:
    even = f"{in_words(flow.even_correlation)} with even weights in place of the matrices"
    return (
        f"Rank correlation of rollout and gradient: {in_words(flow.rank_correlation)} ({even}). {flow.left_out} "
        "The gradient has all of the network in it."
    )


def write_page(
    folder: Path,
    found: Findings,
    chosen: Sequence[int],
    rows: Sequence[Mapping[str, object]],
    config: Mapping[str, Any],
) -> list[str]:
    """Write the pictures and report.html in the place of earlier ones; returns the files, the report last.

    Raises:
        RunError: a file could not be written.
    """
    pictures: dict[Path, bytes] = {}
    figures = []
    for name, heading, caption, figure in drawn(found, chosen):
        with io.BytesIO() as buffer, warnings.catch_warnings():
            # A class name in a script that the font lacks is drawn as boxes.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(buffer, format="png")
            pictures[folder / f"{name}.png"] = buffer.getvalue()
        figures.append((heading, caption, pictures[folder / f"{name}.png"]))
    summary: dict[str, object] = {}
    if found.top:
        best = found.top[0]
        summary |= {"most likely class": best.label, "its probability": f"{100 * best.probability:.1f} %"}
    summary["token (row, column)"] = "{}, {}".format(*found.token)
    summary["rank correlation of rollout and gradient"] = in_words(found.flow.rank_correlation)
    report = folder / REPORT
    again = report.exists()
    title = f"How {found.title} is mixed"
    try:
        for path, png in pictures.items():
            with whole_file(path) as temporary:
                temporary.write_bytes(png)
        write_report(report, title=title, summary=summary, config=config, rows=rows, figures=figures, table="Blocks")
    except BaseException:
        for path in pictures if not again else ():  # without the report they would pass for somebody else's
            path.unlink(missing_ok=True)
        raise
    for path in folder.iterdir():
        if WRITTEN.fullmatch(path.name) and path not in pictures:  # of the picture that was explained here before
            path.unlink()
    return [*map(str, pictures), str(report)]
