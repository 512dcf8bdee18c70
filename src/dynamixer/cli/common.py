"""What the commands share: options, exit codes, and how a result is printed."""

import json
from typing import Any

import click

USER_MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked for, 130 / 143 stopped by SIGINT / SIGTERM."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, mps or xpu."
)
fast_option = click.option(
    "--fast", is_flag=True, help="Run the quickest way on this machine's processor; the first time takes a minute."
)
model_help = "Run folder, or a .safetensors checkpoint from one."


def print_result(as_json: bool, value: dict[str, Any], text: str) -> None:
    """The result of a command on stdout: one JSON object, or text."""
    click.echo(json.dumps(value) if as_json else text)
