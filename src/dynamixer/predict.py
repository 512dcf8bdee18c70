"""Classify picture files."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dynamixer.data.decode import SUFFIXES, BadImage, decode
from dynamixer.data.sources import files_in, named
from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError
from dynamixer.files import check_picture_path, in_utf8, whole_file
from dynamixer.logs import log
from dynamixer.models.checkpoint import check_classifier, load
from dynamixer.models.shipped import DEFAULT
from dynamixer.progress import progress


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one picture, the likeliest first."""

    path: str
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class Predictions:
    """What became of each path: a prediction, or a sentence that says why there is none."""

    model: str
    results: list[Prediction] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def probabilities(logits: Tensor) -> Tensor:
    """Logits [B, K] -> probabilities [B, K], float32 on the CPU.

    Raises:
        RunError: they are not finite.
    """
    shares = logits.float().softmax(1).cpu()
    if not shares.isfinite().all():
        raise RunError("the model answers with numbers that are not finite: its weights cannot be used.")
    return shares


def find_pictures(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that paths mean: themselves, or for a folder all pictures in it, sorted, folders within included; none hidden.

    Raises:
        UserError: a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, named([paths] if isinstance(paths, str | Path) else paths)):
        if not path.is_dir():
            found.append(path)
            continue
        inside, others = files_in(path)
        if not inside:
            raise UserError(f"{path} has no pictures ({', '.join(sorted(SUFFIXES))}).")
        if others:
            log(f"left out what is not a picture: {len(others)} in {path}, the first is {others[0]}")
        found += inside
    return found


def predict(
    paths: str | Path | Sequence[str | Path],
    model: str | Path = DEFAULT,
    *,
    top: int = 5,
    batch_size: int = 32,
    size: int | tuple[int, int] | None = None,
    device: str = "auto",
    fast: bool = False,
    sheet: str | Path | None = None,
) -> Predictions:
    """Classify pictures with a trained model.

    Args:
        paths: files and folders, or one of them.
        model: a run folder, a checkpoint, or a model whose weights ship, which dynamixer_tiny is.
        top: how many classes to give for each picture.
        batch_size: pictures at a time.
        size: picture size in pixels, or (height, width), if not the one trained at.
        device: auto, cpu, cuda, mps or xpu.
        fast: run the quickest way on this machine's processor, which is made once (docs/speed.md).
        sheet: a PNG to write the pictures to with their classes as bars (the first 24).

    Returns:
        Results in the order of the paths. A picture that cannot be read stands under errors and does not stop the rest.

    Raises:
        UserError: no such model, no paths, or a folder without pictures.
        RunError: the model's answer is not finite, or the sheet cannot be written: the results are then its `found`.
    """
    if top < 1 or batch_size < 1:
        raise UserError(f"top={top} and batch_size={batch_size} have to be above 0.")
    if sheet is not None:
        check_picture_path(Path(sheet))
    files = find_pictures(paths)
    if not files:
        raise UserError("no pictures were given: name files or folders.")
    where = resolve_device(device)
    checkpoint = load(model, device=where)
    check_classifier(checkpoint)
    preprocessing = checkpoint.at(size)
    transform = preprocessing.transform()
    network: nn.Module = checkpoint.model
    if fast:
        from dynamixer.speed.fast import FastModel  # noqa: PLC0415 - seldom wanted

        network = FastModel(network, preprocessing.size, images=len(files), batch=batch_size, device=where)
    found = Predictions(str(checkpoint.path))
    thumbnails: list[Image.Image] = []
    with progress("predicting", len(files)) as meter, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            chunk, names = [], []
            for file in files[start : start + batch_size]:
                try:
                    picture = decode(file)
                except BadImage as error:
                    found.errors.append(str(error))
                    continue
                chunk.append(transform(picture))
                names.append(str(file))
                if sheet is not None and len(thumbnails) < 24:
                    picture.thumbnail((256, 256))
                    thumbnails.append(picture)
            if chunk:
                best = probabilities(network(torch.stack(chunk).to(where))).topk(
                    min(top, len(checkpoint.classes)), dim=1
                )
                for name, shares, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
                    guesses = tuple(Guess(checkpoint.classes[i], p) for i, p in zip(indices, shares, strict=True))
                    found.results.append(Prediction(name, guesses))
            meter.advance(min(batch_size, len(files) - start))
    if sheet is not None and thumbnails:
        from dynamixer.plots import prediction_sheet  # noqa: PLC0415 - matplotlib takes a second to import

        shown = [
            (picture, in_utf8(Path(result.path).name), [(guess.label, guess.probability) for guess in result.top])
            for picture, result in zip(thumbnails, found.results, strict=False)
        ]
        try:
            with whole_file(Path(sheet)) as temporary:
                prediction_sheet(shown).savefig(temporary, format="png")
        except RunError as error:
            error.found = found
            raise
        log(f"sheet: {sheet}")
    return found
