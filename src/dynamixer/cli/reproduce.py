"""`dynamixer reproduce`."""

from fnmatch import fnmatchcase
from pathlib import Path

import click

from dynamixer.cli.common import EXIT_CODES, json_option, print_result

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(epilog=EXIT_CODES)
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--table", type=click.IntRange(1, 6), help="Only the runs that this table needs [default: all].")
@click.option("--only", metavar="PATTERN", help="Only the runs whose names fit, such as 'cifar10-static-*'.")
@click.option(
    "--cifar10",
    metavar="D",
    default="CIFAR10",
    show_default=True,
    help="Folder with train.parquet and test.parquet; CIFAR10 is downloaded.",
)
@click.option(
    "--imagenette",
    metavar="D",
    help="Folder with train.parquet and val.parquet, or train and val; without it, not those rows.",
)
@click.option("--corrupted", metavar="FOLDER", type=FOLDER, help="Corrupted test pictures, from benchmarks/corrupt.py.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=140, show_default=True, help="Then stop, with checkpoints."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Runs side by side [default: the number of cores].")
@click.option("--work", type=FOLDER, default=Path("runs/study"), show_default=True, help="Run folders and logs.")
@click.option(
    "--results",
    type=FOLDER,
    default=Path("benchmarks/results/study"),
    show_default=True,
    help="The tables of results: small CSV files.",
)
@click.option("--times", is_flag=True, help="Time a training step of every row instead, in turn.")
@click.option(
    "--pages", metavar="DOCS", type=FOLDER, help="Write DOCS/evidence.md and its plots from the results instead."
)
@click.option("--summary", is_flag=True, help="Print the tables of the results, of whatever training, instead.")
@json_option
def reproduce(
    words: tuple[str, ...],
    table: int | None,
    only: str | None,
    results: Path,
    jobs: int | None,
    times: bool,
    pages: Path | None,
    summary: bool,
    cifar10: str,
    imagenette: str | None,
    corrupted: Path | None,
    work: Path,
    as_json: bool,
    minutes: float,
) -> None:
    """Run the study of docs/evidence.md: train and measure what is not in the results yet.

    \b
      dynamixer reproduce --cifar10 cifar10 --imagenette imagenette128 --minutes 140
      dynamixer reproduce --cifar10 cifar10 --imagenette imagenette128 --minutes 140      again: goes on
      dynamixer reproduce --cifar10 cifar10 --table 2
      dynamixer reproduce --imagenette imagenette128 --times
      dynamixer reproduce --pages docs
      dynamixer reproduce --cifar10 cifar10 epochs=30 --work runs/long --results long
      dynamixer reproduce --summary --results long

    The runs are a queue: `dynamixer train` on a folder of its own for each, several side by side, then its last weights
    read the test pictures once. When the time is over, what runs is stopped with a checkpoint, and the same command goes on
    later. A kill at any moment loses nothing. A run that fails is named, and the others go on.

    KEY=VALUE are keys of `dynamixer train` over the study's own, for all runs alike. That is another protocol, and wants
    another --work and --results: results of two protocols are never mixed.
    """
    from dynamixer.errors import RunError, UserError  # noqa: PLC0415
    from dynamixer.study.results import Results  # noqa: PLC0415

    if sum((pages is not None, times, summary)) > 1:
        raise UserError("--pages, --times and --summary are things to do: give one of them.")
    if (pages is not None or times or summary) and (words or table is not None or only is not None):
        raise UserError("KEY=VALUE, --table and --only are of runs: --pages, --times and --summary take none of them.")
    if (summary or pages is not None) and not (results / "runs.csv").is_file():
        raise UserError(f"{results} has no results (runs.csv): give the --results that runs were made with.")
    if summary:
        from dynamixer.study.pages import summary as summarised  # noqa: PLC0415

        text = summarised(Results(results))
        print_result(as_json, {"summary": text}, text)
        return
    if pages is not None:
        from dynamixer.study.pages import write_page  # noqa: PLC0415

        written = [str(path) for path in write_page(pages, Results(results))]
        print_result(as_json, {"written": written}, "\n".join(written))
        return
    from dynamixer.study import queue  # noqa: PLC0415 - torch takes seconds to import
    from dynamixer.study.jobs import place_of  # noqa: PLC0415
    from dynamixer.study.rows import runs  # noqa: PLC0415

    side_by_side = jobs or queue.cores()
    if times:
        from dynamixer.study.times import step_times  # noqa: PLC0415

        threads, found = max(1, queue.cores() // side_by_side), Results(results)
        for dataset in ("cifar10", *(["imagenette"] if imagenette else [])):
            found.add_times(step_times(dataset, threads=threads))
        lines = [
            f"{v['dataset']:10}  {v['row']:20}  {v['milliseconds']:8.1f} ms  {v['ratio']:.2f}x" for v in found.times
        ]
        print_result(as_json, {"times": found.times}, "\n".join(lines))
        return
    wanted = [run for run in runs(table) if fnmatchcase(str(run), only or "*")]
    if not wanted:
        raise UserError(
            f"--only {only} fits no run{'' if table is None else ' of this table'}: they are called like {runs(table)[0]}."
        )
    asked = any(run.dataset == "cifar10" for run in wanted)  # else nothing is to be downloaded
    place = place_of({"cifar10": cifar10 if asked else None, "imagenette": imagenette}, work, corrupted)
    outcome = queue.study(place, results, wanted, minutes=minutes, side_by_side=side_by_side, words=words)
    print_result(as_json, outcome.to_dict(), outcome.text())
    if outcome.failed:
        raise RunError(f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}.")
