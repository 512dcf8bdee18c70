"""What the commands share: options, exit codes, and how a result is printed."""

import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from dynamixer.errors import RunError
from dynamixer.files import in_utf8
from dynamixer.logs import log
from dynamixer.models.shipped import DEFAULT, names, pretrained_cfg

T = TypeVar("T")
USER_MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked for, 130 / 143 stopped by SIGINT / SIGTERM."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, mps or xpu."
)


class PictureSize(click.ParamType[int | tuple[int, int]]):
    """A picture size in pixels: one number for both sides, or height and width as in 96x160."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        """The number, or (height, width)."""
        if not isinstance(value, str):
            return value  # a default
        sides = [int(side) for side in value.split("x") if re.fullmatch(r"[1-9][0-9]{0,5}", side)]
        if len(sides) != value.count("x") + 1 or len(sides) > 2:
            self.fail(f"{value!r} is no size in pixels, such as 160, or 96x160 for height and width.", param, ctx)
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])


size_option = click.option(
    "--size",
    type=PictureSize(),
    metavar="PX|HxW",
    help="Picture size in pixels, such as 160, or 96x160 (height, width)  [default: the one trained at]",
)
fast_option = click.option(
    "--fast", is_flag=True, help="Run the quickest way on this machine's processor; the first time takes a minute."
)


def is_given(name: str) -> bool:
    """Whether an option of the running command was written down."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _named(context: click.Context, parameter: click.Parameter, model: str) -> str:
    """Say which model answers where none was named."""
    default = context.get_parameter_source(str(parameter.name)) is ParameterSource.DEFAULT
    if default and not context.params.get("hub"):
        known = ", ".join(pretrained_cfg(model)["label_names"])
        log(f"model: {model}, whose weights ship, which knows {known} (--model names another)")
    return model


model_option = click.option(
    "--model",
    metavar="MODEL",
    callback=_named,
    default=DEFAULT,
    show_default=f"{DEFAULT}, which tells ten kinds of things apart",
    help=f"Run folder, .safetensors checkpoint, hf-hub:OWNER/NAME, or a name whose weights ship: {', '.join(names())}.",
)


def result_of(work: Callable[[], T]) -> tuple[T, RunError | None]:
    """What a command found, and the error if all that failed was to write its picture: raised when the result is printed."""
    try:
        return work(), None
    except RunError as error:
        if error.found is None:
            raise
        return error.found, error


def print_result(as_json: bool, value: dict[str, Any], text: str) -> None:
    """The result of a command on stdout: one JSON object, in which a number that is none is null, or text."""
    click.echo(json.dumps(_numbers(value), allow_nan=False) if as_json else in_utf8(text))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
