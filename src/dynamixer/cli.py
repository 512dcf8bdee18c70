"""The command line: thin over the Python functions. stdout carries results, stderr everything else."""

import contextlib
import dataclasses
import errno
import fnmatch
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

USER_MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked for, 130 / 143 stopped by SIGINT / SIGTERM."
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, mps or xpu."
)
model_help = "Run folder, or a .safetensors checkpoint from one."


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


def _train_help() -> str:
    from dynamixer.training import RECIPES, TrainConfig  # noqa: PLC0415 - torch takes seconds to import
    from dynamixer.training.recipes import ABLATIONS  # noqa: PLC0415

    lines = ["\b", "Recipes:"]
    lines += [f"  {name:16} {(f.__doc__ or '').splitlines()[0].split(': `')[0]}" for name, f in RECIPES.items()]
    lines += [
        f"  {'ablate:ROW':16} imagenet_s with a row of the paper's ablations; ablate:ROW:RECIPE changes another recipe"
    ]
    lines += [
        f"  {'':16} ROW is one of {', '.join(list(ABLATIONS)[:7])},",
        f"  {'':16} {', '.join(list(ABLATIONS)[7:])}",
    ]
    lines += ["", "\b", "Keys (recipes set some of them; shown are the defaults):"]
    for item in dataclasses.fields(TrainConfig):
        if item.name == "model_args":
            lines.append(f"  {'model.OPTION':36} {item.metadata['help'].split('; ')[1]}")
            continue
        default = "none" if item.default is None else item.default if item.default != () else "[]"
        lines.append(
            f"  {f'{item.name}={str(default).lower() if item.default is False else default}':36} {item.metadata['help']}"
        )
    return "\n".join(lines)


class _TrainCommand(click.Command):
    """Its help lists recipes and keys from the code, which is imported only for that."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.epilog = f"{_train_help()}\n\n{EXIT_CODES}"
        super().format_epilog(ctx, formatter)


@cli.command(cls=_TrainCommand)
@click.argument("words", nargs=-1, metavar="[RECIPE] [KEY=VALUE]...")
@click.option("--data", metavar="D", help="Folder of class folders, Parquet or tar files, or data set name.")
@click.option("--out", metavar="RUN", type=click.Path(path_type=Path), help="Run folder: new, or one to go on with.")
@click.option(
    "--config", metavar="YAML", type=click.Path(path_type=Path), help="File of keys, such as RUN/config.yaml."
)
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Go on with the run in --out if its configuration is the same, or never.",
)
@click.option("--print-config", is_flag=True, help="Show every value and where it came from, and train nothing.")
@json_option
def train(
    words: tuple[str, ...],
    data: str | None,
    out: Path | None,
    config: Path | None,
    resume: str,
    print_config: bool,
    as_json: bool,
) -> None:
    """Train a model and leave a run folder with config, metrics, pictures, report, checkpoints and weights.

    \b
      dynamixer train                                      the demo recipe, fashion_nano
      dynamixer train cifar10_nano --data train.parquet epochs=3 seed=1 --out runs/cifar
      dynamixer train cifar10_nano --data train.parquet epochs=3 seed=1 --out runs/cifar      again: goes on after a stop
      dynamixer train --data flowers/ model=dynamixer_tiny size=112 model.softmax=false
      dynamixer train finetune weights=runs/cifar --data flowers/
      torchrun --nproc-per-node 2 -m dynamixer train cifar10_nano --data train.parquet --out runs/two

    Without a recipe every key has the default shown below; `dynamixer train` alone runs fashion_nano.

    --data takes a folder with one folder of pictures for each class (or with train/ and val/ folders of such), Parquet
    files in the Hugging Face image layout, WebDataset .tar shards, hf:NAME for a data set of the Hugging Face hub,
    fashion-mnist-mini, which ships, or a torchvision name, which is downloaded.
    """
    from dynamixer import training  # noqa: PLC0415
    from dynamixer.errors import UserError  # noqa: PLC0415
    from dynamixer.logs import log, quiet  # noqa: PLC0415
    from dynamixer.training.resolve import resolve, show  # noqa: PLC0415
    from dynamixer.training.world import is_main, launched  # noqa: PLC0415

    recipe, *words_left = words if words and "=" not in words[0] else ("", *words)
    if not words and data is None and config is None:
        recipe = "fashion_nano"
    resolved, origins = resolve(recipe, file=config, data=data, words=words_left)
    if print_config:
        values = {key: {"value": value, "from": origins[key]} for key, value in resolved.to_dict().items()}
        _print(as_json, values, show(resolved, origins))
        return
    if out is None:
        if launched():
            raise UserError("several processes need one run folder: give --out RUN.")
        stem = Path(resolved.data).resolve().name if Path(resolved.data).exists() else resolved.data.replace("/", "-")
        out = Path("runs") / f"{resolved.model or 'finetuned'}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    with quiet(not is_main()):
        log(f"recipe: {recipe or 'none, the defaults of every key'}")
        result = training.train(resolved, out, resume=resume)
    if not is_main():
        return
    summary = f"best epoch {result.best_epoch}" + (
        "" if result.top1 is None else f", {result.top1:.2f} % of held-out pictures"
    )
    pictures = ", ".join(map(str, [*sorted(result.run.glob("*.png")), result.run / "report.html"]))
    _print(as_json, result.to_dict(), f"{summary}\nrun folder: {result.run}\npictures:   {pictures}")


@cli.group(epilog=EXIT_CODES)
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
    _print(as_json, report.to_dict(), report.to_text())
    if report.errors:
        sys.exit(FAILED)


@cli.command(name="eval", epilog=EXIT_CODES)
@click.argument("model")
@click.option("--data", metavar="D", required=True, help="Folder, Parquet or tar files, or data set name.")
@click.option("--split", metavar="SPLIT", help="train, val or test [default: the first there is of test, val, train].")
@click.option("--size", type=click.IntRange(min=1), help="Picture size in pixels [default: the one trained at].")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16", "fp64"]), default="fp32", show_default=True)
@click.option(
    "--on-bad-image",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Stop at a picture that cannot be read, or name it and measure without it.",
)
@click.option("--out", metavar="PNG", type=click.Path(path_type=Path), help="Write the confusion matrix to a picture.")
@device_option
@json_option
def evaluate(model: str, data: str, as_json: bool, **options: Any) -> None:
    """Measure the accuracy of MODEL, a run folder or checkpoint, on labelled pictures.

    \b
      dynamixer eval runs/first --data fashion-mnist-mini
      dynamixer eval runs/first --data photos/ --size 160 --out confusion.png
    """
    from dynamixer.evaluate import evaluate as run  # noqa: PLC0415

    result = run(model, data, **options)
    skipped = f"{result['skipped']} skipped, " if result["skipped"] else ""
    text = (
        f"top-1 {result['top1']:.2f} %   top-5 {result['top5']:.2f} %   loss {result['loss']:.4f}   "
        f"calibration error {result['ece']:.2f} %   {result['images']:,} pictures, {skipped}"
        f"{'all' if result['split'] == 'all' else result['split'] + ' split'} of {data}"
    )
    _print(as_json, result, text)


@cli.command(epilog=EXIT_CODES)
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
    _print(as_json, found.to_dict(), "\n".join(lines))
    for error in found.errors:
        log(f"error: {error}")
    if found.errors:
        sys.exit(USER_MISTAKE)


@cli.command(epilog=EXIT_CODES)
@click.argument("pattern", default="*")
@json_option
def models(pattern: str, as_json: bool) -> None:
    """List the models with their size and work, those of plug-ins included; PATTERN such as '*_s' chooses."""
    import timm  # noqa: PLC0415

    import dynamixer  # noqa: PLC0415
    from dynamixer.errors import UserError, did_you_mean  # noqa: PLC0415
    from dynamixer.models import count  # noqa: PLC0415
    from dynamixer.models.checkpoint import create_model  # noqa: PLC0415

    known = [*timm.list_models(module="dynamixer"), *dynamixer.plugin_models]
    names = sorted(set(fnmatch.filter(known, pattern)))
    if not names:
        raise UserError(f"no model matches {pattern!r}: {did_you_mean(pattern, known)}")
    rows = []
    for name in names:
        model = create_model(name, device="meta")
        parameters, multiply_adds = count(model)
        size = model.default_cfg["input_size"][1]  # type: ignore[index]
        about = (timm.model_entrypoint(name).__doc__ or "").splitlines()[0]
        rows.append(
            {"model": name, "parameters": parameters, "multiply_adds": multiply_adds, "size": size, "about": about}
        )
    rows.sort(key=lambda row: row["parameters"])
    head = f"{'model':16}{'parameters':>12}{'multiply-adds':>16}{'pixels':>8}  about"
    text = [f"{r['model']:16}{r['parameters']:12,}{r['multiply_adds']:16,}{r['size']:8}  {r['about']}" for r in rows]
    _print(as_json, {"models": rows}, "\n".join([head, *text]))


def _print(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value) if as_json else text)


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
        known = {"out of memory": "a smaller batch_size, accumulate=2 or grad_checkpointing=true needs less",
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
