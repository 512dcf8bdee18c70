"""`dynamixer explain` as a function: pictures, and a page that holds them, of how a model mixes one picture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dynamixer.data.base import Source
from dynamixer.data.decode import SUFFIXES, BadImage, decode
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import open_data
from dynamixer.device import resolve_device
from dynamixer.errors import UserError
from dynamixer.explain.average import Average, average
from dynamixer.explain.matrices import AXES, Explanation, blocks_of, check_blocks, look
from dynamixer.explain.page import REPORT, WRITTEN, Findings, notes, photo_of, place, write_page
from dynamixer.explain.receptive import Receptive, check_token, receptive
from dynamixer.files import check_place, in_utf8
from dynamixer.logs import log
from dynamixer.models.checkpoint import load
from dynamixer.models.dynamixer import DynaMixer
from dynamixer.models.shipped import DEFAULT
from dynamixer.predict import Guess, find_pictures, probabilities
from dynamixer.progress import progress
from dynamixer.training.report import is_report


@dataclass(frozen=True)
class Explained:
    """What `explain` found, and the files it wrote."""

    image: str
    model: str
    size: tuple[int, int]  # (height, width) in pixels that the stem read
    top: tuple[Guess, ...]
    token: tuple[int, int]  # on the first grid
    blocks: list[dict[str, Any]]  # the figures of the report's table, one entry for each block
    receptive: dict[str, Any]  # of the token after the last block; a correlation that does not exist is None
    notes: list[str]  # what has to be known to read the pictures of this model
    pictures: int  # over which `dynamic` and `change` were measured; 0 if they were not
    skipped: list[str]  # pictures that could not be read, a sentence each
    files: list[str]  # report.html is the last

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def explain(
    image: str | Path,
    model: str | Path = DEFAULT,
    *,
    out: str | Path | None = None,
    token: tuple[int, int] | None = None,
    blocks: Sequence[int] | None = None,
    pictures: str | Path | None = None,
    limit: int = 256,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> Explained:
    """Write pictures of how a model mixes one picture, and report.html, which holds them all.

    Args:
        image: the file.
        model: a run folder, a checkpoint, or a model whose weights ship, which dynamixer_tiny is.
        out: the folder to write to; explain-NAME for NAME.jpg if None.
        token: (row, column) on the first grid, each from 0; the middle if None. In a later block it is the token at that place.
        blocks: whose matrices and overlays to draw, counted from 0; the first, a middle one and the last if None.
        pictures: a folder of pictures, or a data set, over which to measure how dynamic each block is; not measured if None.
        limit: at most so many of them, evenly spread.
        size: picture size in pixels, or (height, width); the one trained at if None.
        batch_size: pictures at a time.
        device: auto, cpu, cuda, mps or xpu.

    Raises:
        UserError: no such picture or model, a model that is not a DynaMixer, a token or block that does not exist, or fewer than
            two pictures to measure over.
        RunError: a file could not be written, or the model's answer is not finite.
    """
    if limit < 2 or batch_size < 1:
        raise UserError(f"limit={limit} has to be 2 or more, and batch_size={batch_size} 1 or more.")
    folder = Path(out) if out is not None else Path(f"explain-{Path(image).stem}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --out names a folder.")
    if Path(image).resolve().parent == folder.resolve() and WRITTEN.fullmatch(Path(image).name):
        raise UserError(f"{image} would be overwritten: give --out another folder.")
    _check_folder(folder)
    check_place(folder / REPORT)
    picture = decode(image)
    others = _pictures(pictures, limit, folder) if pictures is not None else []
    where = resolve_device(device)
    checkpoint = load(model, device=where)
    network = checkpoint.model
    if not isinstance(network, DynaMixer):
        raise UserError(f"{checkpoint.name} is not a DynaMixer: it has no mixing to show.")
    depth = len(blocks_of(network))
    chosen = check_blocks(blocks if blocks is not None else (0, depth // 2, depth - 1), depth)
    preprocessing = checkpoint.at(size)

    x = preprocessing(picture)[None].to(where)
    seen = look(network, x)
    grid = seen.blocks[0].grid
    token = token if token is not None else (grid[0] // 2, grid[1] // 2)
    check_token(token, grid)
    flow = receptive(network, x, place(token, seen, seen.blocks[-1]))
    skipped: list[str] = []
    batches = _batches(others, preprocessing, batch_size, where, skipped)
    means = average(network, batches, weights=False) if others else None
    photo = photo_of(picture, preprocessing, seen.size)
    found = Findings(in_utf8(Path(image).name), photo, _top(seen, checkpoint.classes), token, seen, flow, means)
    rows = table(seen, means)
    about = {"image": str(image), "model": str(checkpoint.path), "pixels": "x".join(map(str, seen.size))}
    files = write_page(folder, found, chosen, rows, about | checkpoint.args)
    return Explained(
        image=str(image),
        model=str(checkpoint.path),
        size=seen.size,
        top=found.top,
        token=token,
        blocks=rows,
        receptive=_figures(flow),
        notes=notes(seen),
        pictures=means.pictures if means else 0,
        skipped=skipped,
        files=files,
    )


def _top(seen: Explanation, classes: Sequence[str]) -> tuple[Guess, ...]:
    best = probabilities(seen.logits)[0].topk(min(5, len(classes)))
    return tuple(Guess(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))


def table(seen: Explanation, found: Average | None) -> list[dict[str, Any]]:
    """The figures of each block: entropy, weights of the branches, and how much changes with the picture."""
    rows: list[dict[str, Any]] = []
    for mixing in seen.blocks:
        row: dict[str, Any] = {"block": mixing.block, "name": mixing.name, "grid": "x".join(map(str, mixing.grid))}
        row["segments"] = mixing.segments
        for axis in AXES:
            entropy = mixing.entropy(axis)
            row[f"entropy_{axis}"] = None if entropy is None else float(entropy.mean())
        for i, branch in enumerate(mixing.branches if mixing.branch_weights is not None else ()):
            assert mixing.branch_weights is not None
            row[f"weight_{branch}"] = float(mixing.branch_weights[0, :, i].mean())
        rows.append(row)
    for row, block in zip(rows, found.blocks if found else (), strict=False):
        for key in ("variance", "dynamic", "change"):
            row |= {f"{key}_{axis}": getattr(block.of(axis), key, None) for axis in AXES}
    return rows


def _figures(flow: Receptive) -> dict[str, Any]:
    values = {key: getattr(flow, key) for key in ("token", "block", "rank_correlation", "even_correlation", "left_out")}
    return {key: None if value != value else value for key, value in values.items()}  # nan is no JSON  # noqa: PLR0124


def _check_folder(folder: Path) -> None:
    """Refuse to write over what is not ours."""
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if "config.yaml" in there or any(name.endswith(".safetensors") for name in there):
        raise UserError(
            f"{folder} holds a trained model, whose report would be overwritten: give --out another folder."
        )
    taken = sorted(name for name in there if name == REPORT or WRITTEN.fullmatch(name))
    if taken and not is_report(folder / REPORT):
        raise UserError(f"{folder / taken[0]} would be overwritten: give --out another folder.")


def _pictures(data: str | Path, limit: int, out: Path) -> list[Callable[[], Image.Image]]:
    """Pictures to average over, each decoded when it is called for: of a data set's evaluation split, or of a folder.

    A folder with pictures of its own is one of pictures, whatever else is in it; those in `out` are left out.
    """
    root = Path(data)
    loose = root.is_dir() and any(path.suffix.lower() in SUFFIXES for path in root.iterdir())
    source = None if loose else _evaluated(data)
    if source is not None:
        every: list[Callable[[], Image.Image]] = [lambda i=i: source.picture(i) for i in range(len(source))]  # type: ignore[misc]
    else:
        files = [file for file in find_pictures([data]) if out.resolve() not in file.resolve().parents]
        every = [lambda file=file: decode(file) for file in files]  # type: ignore[misc]
    if len(every) < 2:
        raise UserError(
            f"{data} has {'one picture' if every else 'no pictures'}: what changes from picture to picture needs two or more."
        )
    some = min(limit, len(every))
    return [every[i * len(every) // some] for i in range(some)]


def _evaluated(data: str | Path) -> Source | None:
    """A data set's evaluation split, or None for a folder that is no data set."""
    try:
        return open_data(data).for_evaluation()[1]
    except UserError:
        if Path(data).is_dir():
            return None
        raise


def _batches(
    pictures: Sequence[Callable[[], Image.Image]],
    preprocessing: Preprocessing,
    batch_size: int,
    where: torch.device,
    skipped: list[str],
) -> Iterator[Tensor]:
    transform = preprocessing.transform()
    with progress("measuring what changes", len(pictures)) as meter:
        for start in range(0, len(pictures), batch_size):
            batch = []
            for opened in pictures[start : start + batch_size]:
                try:
                    batch.append(transform(opened()))
                except BadImage as error:
                    skipped.append(str(error))
                    log(f"measured without it: {error}")
            if batch:
                yield torch.stack(batch).to(where)
            meter.advance(min(batch_size, len(pictures) - start))
