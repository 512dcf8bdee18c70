"""`dynamixer train`."""

import dataclasses
import time
from pathlib import Path

import click

from dynamixer.cli.common import EXIT_CODES, json_option, print_result


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


@click.command(cls=_TrainCommand)
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
    from dynamixer.native import keep_memory  # noqa: PLC0415
    from dynamixer.training.resolve import resolve, show  # noqa: PLC0415
    from dynamixer.training.world import is_main, launched  # noqa: PLC0415

    recipe, *words_left = words if words and "=" not in words[0] else ("", *words)
    if not words and data is None and config is None:
        recipe = "fashion_nano"
    resolved, origins = resolve(recipe, file=config, data=data, words=words_left)
    if print_config:
        values = {key: {"value": value, "from": origins[key]} for key, value in resolved.to_dict().items()}
        print_result(as_json, values, show(resolved, origins))
        return
    if out is None:
        if launched():
            raise UserError("several processes need one run folder: give --out RUN.")
        stem = Path(resolved.data).resolve().name if Path(resolved.data).exists() else resolved.data.replace("/", "-")
        out = Path("runs") / f"{resolved.model or 'finetuned'}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    keep_memory()
    with quiet(not is_main()):
        log(f"recipe: {recipe or 'none, the defaults of every key'}")
        result = training.train(resolved, out, resume=resume)
    if not is_main():
        return
    summary = f"best epoch {result.best_epoch}" + (
        "" if result.top1 is None else f", {result.top1:.2f} % of held-out pictures"
    )
    pictures = ", ".join(map(str, [*sorted(result.run.glob("*.png")), result.run / "report.html"]))
    print_result(as_json, result.to_dict(), f"{summary}\nrun folder: {result.run}\npictures:   {pictures}")
