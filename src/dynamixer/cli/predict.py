"""`dynamixer predict`."""

import sys
from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import EXIT_CODES, USER_MISTAKE, device_option, json_option, model_help, print_result


@click.command(epilog=EXIT_CODES)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--model", metavar="MODEL", help=model_help)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes for each picture.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--sheet", metavar="PNG", type=click.Path(path_type=Path), help="Draw the pictures and classes in one PNG."
)
@device_option
@json_option
def predict(paths: tuple[str, ...], model: str | None, as_json: bool, **options: Any) -> None:
    """Classify pictures: files, or folders that are searched through.

    \b
      dynamixer predict cat.jpg dog.png --model runs/first
      dynamixer predict holiday/ --model runs/first --sheet sheet.png

    A picture that cannot be read is reported, does not stop the others, and makes the exit code 2.
    """
    from dynamixer.errors import UserError  # noqa: PLC0415
    from dynamixer.logs import log  # noqa: PLC0415
    from dynamixer.predict import predict as run  # noqa: PLC0415

    if model is None:
        raise UserError("no weights ship with this version yet: train a model (dynamixer train) and give --model RUN.")
    found = run(paths, model, **options)
    lines = []
    for result in found.results:
        guesses = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in result.top)
        lines.append(f"{result.path}: {guesses}")
    print_result(as_json, found.to_dict(), "\n".join(lines))
    for error in found.errors:
        log(f"error: {error}")
    if found.errors:
        sys.exit(USER_MISTAKE)
