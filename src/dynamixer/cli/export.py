"""`dynamixer export`."""

from pathlib import Path
from typing import Any

import click

from dynamixer.cli.common import EXIT_CODES, json_option, print_result, size_option


@click.command(epilog=EXIT_CODES)
@click.argument("model")
@click.option(
    "--format",
    type=click.Choice(["onnx", "openvino", "pt2", "hub"]),
    default="onnx",
    show_default=True,
    help="ONNX; OpenVINO (.xml and .bin); torch.export; or a folder as timm and Hugging Face read it.",
)
@click.option(
    "--out", metavar="OUT", type=click.Path(path_type=Path), help="File or folder  [default: the model's name here]"
)
@click.option(
    "--dynamic",
    type=click.Choice(["none", "batch", "all"]),
    help="What may differ from call to call; all: batch, height and width.  [default: batch]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="The one batch size of --dynamic none.  [default: 1]")
@size_option
@click.option(
    "--data",
    metavar="PATH",
    multiple=True,
    help="Pictures to compare on; may be repeated. With --int8 also to calibrate on; one labelled data set gives the "
    "accuracies too.  [default: some that ship]",
)
@click.option("--int8", is_flag=True, help="Linear layers in eight bits, calibrated on --data (openvino).")
@json_option
def export(model: str, format: str, out: Path | None, as_json: bool, data: tuple[str, ...], **options: Any) -> None:
    """Write MODEL (run folder, checkpoint, hf-hub:OWNER/NAME, or a name whose weights ship) for other runtimes.

    \b
      dynamixer export runs/first                                        first.onnx, any batch size
      dynamixer export runs/first --dynamic all --data photos/           any picture size too
      dynamixer export runs/first --format openvino --int8 --data photos/
      dynamixer export runs/first --format hub --out folder              config.json, model.safetensors, README.md

    After writing, the file is run on real pictures: it is kept if its logits are within 1e-4 of the model's and every picture has
    the same top-1 (int8: 98.5 % of 1,000 pictures, or of all if there are fewer). Class names and preprocessing are in its
    metadata, under "dynamixer".
    """
    from dynamixer.errors import UserError  # noqa: PLC0415

    given = {key: value for key, value in options.items() if value not in (None, False)}
    if format == "hub":
        from dynamixer.hub import write_folder  # noqa: PLC0415

        if given or data:
            raise UserError(f"--{next(iter(given), 'data').replace('_', '-')} has no meaning for --format hub.")
        folder = write_folder(model, out)
        print_result(as_json, {"folder": str(folder), "files": sorted(p.name for p in folder.iterdir())}, str(folder))
        return
    from dynamixer.export import export as run  # noqa: PLC0415

    done = run(model, format, out, data=data or None, **given)
    found = done.agreement
    text = f"{', '.join(map(str, done.files))}  {done.bytes / 1e6:,.1f} MB\n{found.pictures:,} pictures: {found}"
    print_result(as_json, done.to_dict(), text)
