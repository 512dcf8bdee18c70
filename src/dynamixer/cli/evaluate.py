"""`dynamixer eval`."""

from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import (
    EXIT_CODES,
    device_option,
    fast_option,
    json_option,
    print_result,
    result_of,
    size_option,
)

WHICH = {"all": "all", "held-out": "held out"}  # a split's name otherwise


@click.command(name="eval", epilog=EXIT_CODES)
@click.argument("model")
@click.option("--data", metavar="D", required=True, help="Folder, Parquet or tar files, or data set name.")
@click.option("--split", metavar="SPLIT", help="train, val or test [default: the first there is of test, val, train].")
@size_option
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
@fast_option
@click.option("--out", metavar="PNG", type=click.Path(path_type=Path), help="Write the confusion matrix to a picture.")
@device_option
@json_option
def evaluate(model: str, data: str, as_json: bool, **options: Any) -> None:
    """Measure the accuracy of MODEL (run folder, checkpoint, hf-hub:OWNER/NAME, or a name whose weights ship).

    \b
      dynamixer eval runs/first --data fashion-mnist-mini
      dynamixer eval runs/first --data photos/ --size 160 --out confusion.png

    Where DATA has no other pictures than those that MODEL was trained on, the ones held out of its training are measured.
    """
    from dynamixer.evaluate import evaluate as run  # noqa: PLC0415

    result, unwritten = result_of(lambda: run(model, data, **options))
    skipped = f"{result['skipped']} skipped, " if result["skipped"] else ""
    text = (
        f"top-1 {result['top1']:.2f} %   top-5 {result['top5']:.2f} %   loss {result['loss']:.4f}   "
        f"calibration error {result['ece']:.2f} %   {result['images']:,} pictures, {skipped}"
        f"{WHICH.get(result['split'], result['split'] + ' split')} of {data}"
    )
    print_result(as_json, result, text)
    if unwritten:
        raise unwritten
