"""`dynamixer serve`."""

import os
from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import device_option, fast_option, json_option, model_option, print_result

TOKEN = "DYNAMIXER_TOKEN"


@click.command(
    epilog="Exit codes: 0 stopped by SIGTERM or SIGINT once it listened, after the requests that were taken in were answered; "
    "1 it could not listen; 2 a mistake in what was asked for; 130 / 143 stopped by SIGINT / SIGTERM before it listened."
)
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--samples", metavar="FOLDER", type=click.Path(path_type=Path),
    help="Pictures to offer on the page and to average over [default: pictures that ship].",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures the model takes at once."
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Requests inside; more are answered 429.",
)
@click.option(
    "--max-bytes", type=click.IntRange(min=1), default=16 * 2**20, show_default=True, help="Of a request's body."
)
@click.option(
    "--max-pixels", type=click.IntRange(1, 178_956_970), default=40_000_000, show_default=True, help="Of a picture."
)
@click.option(
    "--allow-host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="Name under which requests may come, behind a proxy for one; others are then refused.",
)
@click.option(
    "--token-file", metavar="FILE", type=click.Path(path_type=Path),
    help=f"File with the bearer token that is asked for [default: the variable {TOKEN}; none, if it is not set].",
)  # fmt: skip
@fast_option
@device_option
@json_option
def serve(model: str, token_file: Path | None, device: str, as_json: bool, **options: Any) -> None:
    """Open a page that shows how a trained model mixes, and a JSON API beside it.

    \b
      dynamixer serve
      dynamixer serve --model runs/first
      dynamixer serve --model runs/photos --samples holiday/ --port 9000
      curl -F image=@cat.jpg http://127.0.0.1:8000/v1/predict

    Only this machine reaches it unless --host says otherwise. /openapi.json describes the API, /readyz says when it
    may be used, /metrics is for Prometheus. Ctrl-C or SIGTERM ends it. --json prints {"address": ...} once it listens.
    """
    from dynamixer.errors import UserError, install  # noqa: PLC0415
    from dynamixer.files import reason  # noqa: PLC0415

    try:
        from dynamixer.serve import Settings  # noqa: PLC0415
        from dynamixer.serve import serve as run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: {install('serve')}") from None
    token = os.environ.get(TOKEN)
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{token_file} cannot be read as a token: {why}.") from None
    settings = Settings(token=token, **options)
    run(model, settings, device=device, ready=lambda address: print_result(as_json, {"address": address}, address))
