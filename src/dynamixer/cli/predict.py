"""`dynamixer predict`."""

import sys
from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import (
    EXIT_CODES,
    USER_MISTAKE,
    device_option,
    fast_option,
    is_given,
    json_option,
    model_option,
    print_result,
    result_of,
    size_option,
)


@click.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@model_option
@click.option("--hub", metavar="OWNER/NAME", help="The same as --model hf-hub:OWNER/NAME.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes for each picture.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@size_option
@click.option(
    "--sheet", metavar="PNG", type=click.Path(path_type=Path), help="Draw the pictures and classes in one PNG."
)
@click.option(
    "--out",
    metavar="PARQUET",
    type=click.Path(path_type=Path),
    help="Write a row for each picture to this file; started again after a stop, it goes on.",
)
@click.option("--embeddings", is_flag=True, help="With --out: also what the classifier reads of each picture.")
@click.option("--workers", type=click.IntRange(min=0), help="With --out: processes that decode.  [default: 0]")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), help="With --out: this machine or Ray Data.  [default: local]"
)
@fast_option
@device_option
@json_option
def predict(
    paths: tuple[str, ...],
    model: str,
    hub: str | None,
    out: Path | None,
    sheet: Path | None,
    as_json: bool,
    embeddings: bool,
    workers: int | None,
    engine: str | None,
    fast: bool,
    **options: Any,
) -> None:
    """Classify pictures: files, or folders that are searched through.

    \b
      dynamixer predict photo.jpg
      dynamixer predict cat.jpg dog.png --model runs/first
      dynamixer predict holiday/ --model runs/first --sheet sheet.png
      dynamixer predict photos/ --model runs/first --out preds.parquet --workers 4
      dynamixer predict 'shards/*.tar' --model runs/first --out preds.parquet --embeddings

    A picture that cannot be read is reported, does not stop the others, and makes the exit code 2.

    With --out any number of pictures is classified: files, folders, quoted patterns, Parquet files and tar shards. Each has one
    row in the file, or a line with the reason in PREDS.bad.jsonl beside it (exit code 0). Killed at any moment and started
    again with the same words, it goes on and leaves the same bytes as if nothing had happened. --engine ray spreads the work
    over the Ray cluster that RAY_ADDRESS names.
    """
    from dynamixer.errors import UserError  # noqa: PLC0415

    if hub is not None:
        if is_given("model"):
            raise UserError("--model and --hub both name a model: give one of them.")
        model = f"hf-hub:{hub}"
    if out is not None:
        if sheet is not None:
            raise UserError("--sheet draws a few pictures and --out writes many: give one of them.")
        if fast:
            raise UserError("--out promises the same bytes whenever it is resumed, --fast does not: give one of them.")
        _many(
            paths, model, out, as_json, embeddings=embeddings, workers=workers or 0, engine=engine or "local", **options
        )
        return
    if embeddings or workers is not None or engine is not None:
        raise UserError("--embeddings, --workers and --engine go with --out PREDS.parquet.")
    _few(paths, model, as_json, sheet=sheet, fast=fast, **options)


def _many(paths: tuple[str, ...], model: str, out: Path, as_json: bool, **options: Any) -> None:
    from dynamixer.many import predict_many  # noqa: PLC0415

    done = predict_many(paths, model, out, **options)
    text = f"{done.predicted:,} of {done.pictures:,} pictures: {done.out}"
    bad = f"\n{done.bad:,} that cannot be read: {done.bad_out}" if done.bad else ""
    print_result(as_json, done.to_dict(), text + bad)


def _few(paths: tuple[str, ...], model: str, as_json: bool, **options: Any) -> None:
    from dynamixer.logs import log  # noqa: PLC0415
    from dynamixer.predict import predict as run  # noqa: PLC0415

    found, unwritten = result_of(lambda: run(paths, model, **options))
    lines = []
    for result in found.results:
        guesses = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in result.top)
        lines.append(f"{result.path}: {guesses}")
    print_result(as_json, found.to_dict(), "\n".join(lines))
    for error in found.errors:
        log(f"error: {error}")
    if unwritten:
        raise unwritten
    if found.errors:
        sys.exit(USER_MISTAKE)
