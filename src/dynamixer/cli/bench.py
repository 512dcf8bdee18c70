"""`dynamixer bench`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import EXIT_CODES, is_given, json_option, print_result

IDLE = {  # what is measured by nothing there, as options are called
    "parts": ("rounds", "fast", "compile", "ways", "peers"),
    "scale": ("rounds", "fast", "compile", "ways", "peers", "train", "train_batch", "size"),
}


@click.command(epilog=EXIT_CODES)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures at a time.")
@click.option("--train-batch", type=click.IntRange(min=1), help="Pictures in a training step [default: as --batch].")
@click.option("--size", type=click.IntRange(min=1), help="Picture size in pixels [default: each model's own].")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Calls of each variant, in turn."
)
@click.option("--train/--no-train", default=True, show_default=True, help="Time a training step too.")
@click.option("--fast/--no-fast", default=True, show_default=True, help="Time the optimised model too.")
@click.option("--compile", is_flag=True, help="Time torch.compile too, which takes minutes to be ready.")
@click.option("--ways", is_flag=True, help="Time OpenVINO and int8 too, beside --fast.")
@click.option("--peers", is_flag=True, help="Time training with static matrices and without the softmax too.")
@click.option(
    "--scale", is_flag=True, help="Cost against picture size (1x to 4x its own; 224 to 1024) and batch instead."
)
@click.option("--parts", is_flag=True, help="Where the time of the C++ kernels goes, operation by operation, instead.")
@click.option("--roofline", metavar="PNG", type=click.Path(path_type=Path), help="Draw the machine's limits.")
@click.option("--out", metavar="JSON", type=click.Path(path_type=Path), help="Write the figures to a file.")
@json_option
def bench(
    models: tuple[str, ...],
    as_json: bool,
    out: Path | None,
    roofline: Path | None,
    scale: bool,
    parts: bool,
    **plan: Any,
) -> None:
    """Measure how fast models are on this machine's processor: ours, or any model of timm.

    \b
      dynamixer bench                                       dynamixer_tiny
      dynamixer bench dynamixer_s resnet50 --batch 8 --roofline roofline.png
      dynamixer bench dynamixer_nano --batch 256 --peers
      dynamixer bench dynamixer_s --scale
      dynamixer bench dynamixer_s --precision bf16 --parts

    The variants of a model take turns, so that a noisy machine is equally noisy to all (models follow each other); medians and
    quartiles are given. Variants:

    \b
      plain     the model step by step as the paper states it (ours only): the baseline
      eager     the model as it is: the baseline of others
      kernel    with the C++ kernels, as training with kernel=auto (ours only)
      compiled  plain and eager with torch.compile, in inference with frozen weights (--compile)
      fast      as `dynamixer predict --fast` runs it: the kernels with packed weights, or OpenVINO

    A variant whose answers are not the model's is named and not timed. The ceiling is what the machine reaches with nothing but
    the model's matrix products.
    """
    from dynamixer.errors import UserError  # noqa: PLC0415
    from dynamixer.files import check_picture_path, write_text  # noqa: PLC0415
    from dynamixer.native import keep_memory  # noqa: PLC0415
    from dynamixer.speed import bench as speed  # noqa: PLC0415
    from dynamixer.speed import report  # noqa: PLC0415

    if sum((scale, parts, roofline is not None)) > 1:
        raise UserError("--scale, --parts and --roofline are three things to do: give one of them.")
    instead = "scale" if scale else "parts" if parts else ""
    if idle := [f"--{name.replace('_', '-')}" for name in IDLE.get(instead, ()) if is_given(name)]:
        raise UserError(f"--{instead} has no use for {' and '.join(idle)}: leave it out.")
    for name, needed in (("ways", "fast"), ("peers", "train"), ("train_batch", "train")):
        if is_given(name) and not plan[needed]:
            raise UserError(f"--{name.replace('_', '-')} has no use for --no-{needed}: leave one of them out.")
    if roofline is not None:
        check_picture_path(roofline)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"{out} cannot be written: --out names a file in a folder that exists.")
    keep_memory()  # as training does, for all variants alike
    names = models or ("dynamixer_tiny",)
    if scale:
        found = speed.scale(names, speed.Plan(**plan))
        text = report.scale_table(found)
    elif parts:
        from dynamixer.speed.parts import parts as profiled  # noqa: PLC0415

        found = profiled(names, speed.Plan(**plan))
        text = report.parts_table(found)
    else:
        found = speed.bench(names, speed.Plan(**plan))
        text = report.table(found)
    found["about"]["command"] = shlex.join(["dynamixer", *sys.argv[1:]])
    print_result(as_json, found, text)
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n")
    if roofline is not None:
        report.roofline(found, roofline)
