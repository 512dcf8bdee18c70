"""`dynamixer data ...`."""

import sys
from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import EXIT_CODES, FAILED, json_option, print_result


@click.group(epilog=EXIT_CODES)
def data() -> None:
    """Look after data sets.

    \b
      dynamixer data verify photos/        check every picture before hours are spent on training
    """


@data.command(epilog=EXIT_CODES.replace("0 done, 1", "0 done and no errors found, 1 errors were found or"))
@click.argument("path")
@click.option(
    "--out",
    metavar="JSONL",
    type=click.Path(path_type=Path),
    help="The manifest [default: <data name>-manifest.jsonl in this folder].",
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@json_option
def verify(path: str, as_json: bool, **options: Any) -> None:
    """Read and decode every picture of PATH and say what is wrong.

    \b
      dynamixer data verify photos/
      dynamixer data verify 'shards/train-*.tar' --workers 8 --out train.jsonl
      dynamixer data verify hf:owner/name --json

    PATH is all that `dynamixer train --data` takes, or a folder in which pictures lie loose.

    \b
    Errors: unreadable, empty, not-a-picture, truncated, absurd-size, in-two-splits (train and test share a picture).
    Notes:  duplicate, wrong-suffix, cmyk, 16-bit, palette, animated, exif-rotated, not-used (no picture by its name).

    The manifest has a line of JSON for each picture: split, name, class, sha256, bytes, format, mode, width, height and
    findings.
    """
    from dynamixer.data.verify import verify as run  # noqa: PLC0415

    report = run(path, **options)
    print_result(as_json, report.to_dict(), report.to_text())
    if report.errors:
        sys.exit(FAILED)
