"""What is measured of a finished run's last weights: everything that would be lost with its folder."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamixer.data.loading import EvaluationPictures, evaluation_loader
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import Source, open_data
from dynamixer.errors import UserError
from dynamixer.evaluate import match_classes, measure
from dynamixer.explain import average, mixing_matrices
from dynamixer.explain.matrices import AXES
from dynamixer.files import write_text
from dynamixer.models.checkpoint import Checkpoint, load
from dynamixer.speed.kernel import kernel_if_any
from dynamixer.study.rows import MAIN, PEERS, ROWS, SEEDS, TABLES, Run

SIZES = (24, 28, 36, 40, 48)  # beside the native 32
PICTURES = 300  # over which matrices are compared
SHOWN, SEGMENTS = 2, 2  # pictures and segments whose matrices are kept
SEVERITIES = range(1, 6)
KINDS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "gaussian_blur", "snow", "frost", "fog", "brightness", "contrast", "saturate", "elastic_transform", "pixelate",
    "jpeg_compression", "spatter",
)  # fmt: skip
BATCH = 50


def parts_of(run: Run, *, corrupted: bool) -> list[str]:
    """What is measured of a run: names of `results.COLUMNS`."""
    first = run.seed < SEEDS and run.share == 100
    small, row = first and run.dataset == "cifar10", ROWS[run.row]
    wanted = {
        "runs": True,
        "sizes": small and run.row in MAIN,
        "depth": first and run.row in TABLES[1].rows and (not small or row.model.get("generator") != "static"),
        "matrices": first and run.dataset == "imagenette" and run.seed == 0,
        "corrupted": small and run.row in MAIN + PEERS and corrupted,
    }
    return [part for part, is_wanted in wanted.items() if is_wanted]


def check_corrupted(folder: Path) -> None:
    """Refuse a folder that lacks a file.

    Raises:
        UserError: which one.
    """
    for kind in KINDS:
        for severity in SEVERITIES:
            if not (folder / f"{kind}-{severity}.parquet").is_file():
                raise UserError(
                    f"{folder} has no {kind}-{severity}.parquet: benchmarks/corrupt.py makes such a folder of corrupted pictures."
                )


def measure_run(
    weights: Path, test: str, parts: list[str], corrupted: Path | None, precision: str = "fp32"
) -> dict[str, list[dict[str, Any]]]:
    """Read the test pictures with a run's last weights.

    Args:
        weights: the checkpoint.
        test: what `open_data` takes; the first split that there is of test, val and train.
        parts: names of `results.COLUMNS`.
        corrupted: the folder of corrupted pictures, KIND-SEVERITY.parquet.
        precision: of all but matrices, which are in fp32: the run's own.

    Returns:
        Lines of each part, as in its table; `runs` has the columns that are measured here.
    """
    checkpoint = load(weights)
    found: dict[str, list[dict[str, Any]]] = {}
    if "depth" in parts:
        found["depth"] = _depth(checkpoint, test)
    if "matrices" in parts:
        found["matrices"] = _matrices(checkpoint, test)
    kernel_if_any(checkpoint.model)
    if "runs" in parts:
        top1, loss = _accuracy(checkpoint, test, precision)
        size = sum(p.numel() for p in checkpoint.model.parameters())
        found["runs"] = [{"parameters": size, "test_top1": top1, "test_loss": loss}]
    if "sizes" in parts:
        found["sizes"] = [{"size": size, "top1": _accuracy(checkpoint, test, precision, size)[0]} for size in SIZES]
    if "corrupted" in parts and corrupted is not None:
        found["corrupted"] = [
            {"kind": kind, "severity": severity, "error": round(100 - top1, 3)}
            for kind in KINDS
            for severity in SEVERITIES
            for top1, _ in [_accuracy(checkpoint, str(corrupted / f"{kind}-{severity}.parquet"), precision)]
        ]
    return found


def _accuracy(checkpoint: Checkpoint, test: str, precision: str, size: int | None = None) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy."""
    _, source = open_data(test).for_evaluation()
    source = match_classes(source, checkpoint)
    preprocessing = checkpoint.preprocessing.at(size)
    loader = evaluation_loader(EvaluationPictures(source, preprocessing), BATCH, 0)
    classes, title = len(checkpoint.classes), f"{Path(test).name}{f' at {size} px' if size else ''}"
    found = measure(
        checkpoint.model,
        loader,
        device=torch.device("cpu"),
        images=len(source),
        classes=classes,
        precision=precision,
        title=title,
    )
    return round(found.top1, 3), round(found.loss, 5)


def _depth(checkpoint: Checkpoint, test: str) -> list[dict[str, Any]]:
    """How much the matrices of each block change with the picture: evenly spread test pictures."""
    blocks = average(checkpoint.model, _batches(test, checkpoint.preprocessing), weights=False).blocks
    return [
        {
            "block": block.block,
            "axis": axis,
            **{name: round(getattr(mixed, name), 5) for name in ("dynamic", "change", "entropy")},
        }
        for block in blocks
        for axis in AXES
        if (mixed := block.of(axis)) is not None
    ]


def _matrices(checkpoint: Checkpoint, test: str) -> list[dict[str, Any]]:
    """Those of the middle row of the last block on the first grid: their mean over test pictures, and those of some pictures.

    `weights` are K x K numbers, output token by output token; `picture` says of which test picture, by its number.
    """
    batches, model = _batches(test, checkpoint.preprocessing), checkpoint.model
    shown = next(_batches(test, checkpoint.preprocessing, SHOWN))
    grids = [mixing.grid for mixing in mixing_matrices(model, shown[:1])]
    block, line = grids.count(grids[0]) - 1, grids[0][0] // 2
    mean = average(model, batches, blocks=[block], weights=False).blocks[0].row
    each = mixing_matrices(model, shown, blocks=[block], axes=["row"])[0].row
    assert mean is not None
    assert each is not None
    numbers = _numbers(open_data(test).for_evaluation()[1], SHOWN)
    names = ["mean", *(f"picture {number}" for number in numbers)]
    every = dict(zip(names, (mean.mean[line], *each[:, line]), strict=True))
    return [
        {
            "block": block,
            "line": line,
            "segment": segment,
            "picture": picture,
            "weights": " ".join(f"{weight:.3g}" for weight in matrix.flatten().tolist()),
        }
        for picture, matrices in every.items()
        for segment, matrix in enumerate(matrices[:SEGMENTS])
    ]


def _batches(test: str, preprocessing: Preprocessing, count: int | None = None) -> Iterator[Tensor]:
    """So many test pictures (PICTURES), evenly spread."""
    _, source = open_data(test).for_evaluation()
    for batch in evaluation_loader(
        EvaluationPictures(source, preprocessing, _numbers(source, count or PICTURES)), BATCH, 0
    ):
        yield batch.pictures


def _numbers(source: Source, count: int) -> np.ndarray:
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)


def main(task: str) -> None:
    """Measure as a JSON object says: weights, test, parts, corrupted, precision, and `out`, where the result goes, part by part.

    Parts of the same weights that are there already, from before a stop, are left as they are.
    """
    told = json.loads(task)
    corrupted, out = Path(told["corrupted"]) if told["corrupted"] else None, Path(told["out"])
    with Path(told["weights"]).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if found.get("weights") != weights:
        found = {"weights": weights}
    for part in told["parts"]:
        if part not in found:
            found |= measure_run(Path(told["weights"]), told["test"], [part], corrupted, told["precision"])
            write_text(out, json.dumps(found))
