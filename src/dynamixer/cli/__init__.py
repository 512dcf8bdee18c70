"""The command line: thin over the Python functions. stdout carries results, stderr everything else.

A file holds a command, `common` what they share, and this one the group and what becomes of errors and signals.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from dynamixer.cli.bench import bench
from dynamixer.cli.common import EXIT_CODES, FAILED, INTERRUPTED, TERMINATED, USER_MISTAKE
from dynamixer.cli.data import data
from dynamixer.cli.evaluate import evaluate
from dynamixer.cli.explain import explain
from dynamixer.cli.export import export
from dynamixer.cli.models import models
from dynamixer.cli.predict import predict
from dynamixer.cli.push import push
from dynamixer.cli.reproduce import reproduce
from dynamixer.cli.serve import serve
from dynamixer.cli.train import train


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dynamixer")
def cli() -> None:
    """DynaMixer: vision MLPs that decide from the picture how to mix it.

    \b
    A first run, on the pictures that ship with the package (minutes on a CPU):
      dynamixer train fashion_nano --out runs/first
      dynamixer eval runs/first --data fashion-mnist-mini
      dynamixer predict photo.png --model runs/first
    """


for command in (train, evaluate, predict, explain, serve, export, push, bench, models, data, reproduce):
    cli.add_command(command)


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)


def _guarded(command: Callable[[], Any]) -> int:  # noqa: PLR0911 - one for each kind of end
    """Run a command and turn what can go wrong into one sentence on stderr and an exit code."""
    from dynamixer.errors import RunError, UserError  # noqa: PLC0415
    from dynamixer.files import reason  # noqa: PLC0415

    try:
        command()
    except click.ClickException as error:
        error.show(sys.stderr)
        return error.exit_code
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return USER_MISTAKE
    except RunError as error:
        click.echo(f"error: {error}", err=True)
        return FAILED
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        click.echo(f"error: {reason(error)}{f' ({error.filename})' if error.filename else ''}.", err=True)
        return USER_MISTAKE if error.errno == errno.ENAMETOOLONG else FAILED
    except MemoryError as error:
        click.echo(f"error: there is not enough memory: {error}", err=True)
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; what was written before stays.", err=True)
        return INTERRUPTED
    except RuntimeError as error:
        memory = "smaller batches or pictures need less; in training also accumulate=2 and grad_checkpointing=true"
        known = {"out of memory": memory, "allocate memory": memory,
                 "DataLoader worker": "fewer workers need less memory"}  # fmt: skip
        advice = [hint for words, hint in known.items() if words in str(error)]
        if not advice:
            raise
        click.echo(f"error: {str(error).splitlines()[0]} ({advice[0]}).", err=True)
        return FAILED
    return 0


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_guarded(lambda: cli.main(args, prog_name="dynamixer", standalone_mode=False)))
