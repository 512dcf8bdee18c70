"""`dynamixer explain`."""

from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import (
    EXIT_CODES,
    device_option,
    is_given,
    json_option,
    model_option,
    print_result,
    size_option,
)


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    def __init__(self, name: str, count: int | None = None):
        self.name, self.count = name, count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers of "5,9"."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(word) for word in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or self.count not in (None, len(numbers)):
            what = f"{self.count} whole numbers" if self.count else "whole numbers"
            self.fail(f"{value!r} is not {what} with commas between them, such as 5,9.", param, ctx)
        return numbers


@click.command(epilog=EXIT_CODES)
@click.argument("image")
@model_option
@click.option(
    "--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Where to write [default: explain-IMAGE]."
)
@click.option(
    "--token",
    metavar="ROW,COLUMN",
    type=_Numbers("token", 2),
    help="The token to follow, on the first grid, counted from 0 [default: the middle].",
)
@click.option(
    "--blocks",
    metavar="N,N,...",
    type=_Numbers("blocks"),
    help="Whose matrices to draw, counted from 0, -1 the last [default: the first, a middle one, the last].",
)
@click.option(
    "--pictures",
    metavar="D",
    help="Folder of pictures, or any data that `dynamixer eval` takes, over which to measure how much the mixing changes.",
)
@click.option("--limit", type=click.IntRange(min=2), default=256, show_default=True, help="At most so many of them.")
@size_option
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@device_option
@json_option
def explain(image: str, model: str, as_json: bool, **options: Any) -> None:
    """Show how a model mixes IMAGE: pictures and a page, report.html, that holds them all.

    \b
      dynamixer explain photo.jpg
      dynamixer explain photo.jpg --model runs/first
      dynamixer explain photo.jpg --model runs/first --token 5,9 --blocks 0,3,-1
      dynamixer explain photo.jpg --model runs/first --pictures holiday/ --out mixing

    \b
    picture.png         the picture and its most likely classes
    receptive.png       from where the token's value comes, by rollout of the mixing and by the gradient
    token-NN.png        from where the token reads in its row and column in block NN, on the photograph, each segment
    matrices-NN.png     the matrices of that row and column as heat maps
    branches.png        weights of the row, column and channel branches by depth
    entropy.png         how widely tokens read, by depth
    dynamic.png         with --pictures: how much the matrices of each block change with the picture

    Models without the softmax have negative weights: they are blue, positive ones red.
    """
    from dynamixer.errors import UserError  # noqa: PLC0415
    from dynamixer.explain.report import explain as run  # noqa: PLC0415

    if not options["pictures"] and (idle := [key for key in ("limit", "batch_size") if is_given(key)]):
        raise UserError(f"--{idle[0].replace('_', '-')} says how --pictures are read: give those too, or leave it out.")
    found = run(image, model, **options)
    print_result(as_json, found.to_dict(), _text(found))


def _text(found: Any) -> str:
    ranks = ["-" if (r := found.receptive[f"{kind}_correlation"]) is None else f"{r:.2f}" for kind in ("rank", "even")]
    lines = [
        f"{found.image}: {', '.join(f'{guess.label} {100 * guess.probability:.1f} %' for guess in found.top)}",
        f"token {found.token[0]},{found.token[1]}: rank correlation of rollout and gradient {ranks[0]}, "
        f"{ranks[1]} with even weights in place of the matrices",
        *found.notes,
        *_table(found.blocks),
    ]
    if found.pictures:
        lines.append(f"measured over {found.pictures:,} pictures, {len(found.skipped)} could not be read")
    return "\n".join([*lines, f"pictures: {', '.join(found.files[:-1])}", f"report:   {found.files[-1]}"])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """The figures of the blocks; "entropy_row" stands as "entropy" over "row"."""
    keys = [key for key in rows[0] if "_" in key and not key.startswith("variance")]
    lines = [
        "block   grid" + "".join(f"{key.split('_')[0]:>9}" for key in keys),
        " " * 12 + "".join(f"{key.split('_')[1]:>9}" for key in keys),
    ]
    for row in rows:
        cells = (f"{'-' if row[key] is None else f'{row[key]:.2f}':>9}" for key in keys)
        lines.append(f"{row['block']:5}{row['grid']:>7}{''.join(cells)}")
    return lines
