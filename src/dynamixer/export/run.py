"""`dynamixer.export`: write, read back, compare, keep or not."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dynamixer.errors import RunError, UserError, did_you_mean, first_line
from dynamixer.export.check import Agreement, apart, compare, real_pictures, tensors
from dynamixer.export.formats import (
    RUNNERS,
    SUFFIXES,
    WRITERS,
    Runner,
    check_libraries,
    need,
    save_openvino,
    trace,
)
from dynamixer.export.int8 import IN_FP32, quantise
from dynamixer.files import check_place, reason
from dynamixer.logs import log
from dynamixer.models.checkpoint import Checkpoint, load
from dynamixer.models.download import called

FORMATS = tuple(WRITERS)
DYNAMIC = ("none", "batch", "all")
TOLERANCE = 1e-4  # of logits in fp32
INT8_SHARE = 98.5  # percent of pictures on which int8 names the same class first
COMPARED, INT8_COMPARED, CALIBRATED = 64, 1000, 300  # pictures


@dataclass(frozen=True)
class Exported:
    """What was written, and how its answers compare with the model's."""

    files: tuple[Path, ...]
    format: str
    dynamic: str
    int8: bool
    bytes: int
    agreement: Agreement
    in_fp32: str | None = None  # with int8: what is left in fp32

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        about = {**asdict(self), "files": [str(file) for file in self.files]}
        return {**about, "agreement": {**about["agreement"], "share": self.agreement.share}}


def export(
    model: str | Path,
    format: str = "onnx",
    out: str | Path | None = None,
    *,
    dynamic: str = "batch",
    batch_size: int = 1,
    size: int | tuple[int, int] | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    int8: bool = False,
) -> Exported:
    """Write a trained model for other runtimes, run the file on real pictures, and keep it if it says what the model says.

    Kept is a file whose logits differ by at most 1e-4 and whose likeliest class is the same for every picture; with `int8`
    one that names the same class first for at least 98.5 % of the pictures, with ever more of the model left in fp32 until one
    does. Class names and preprocessing are in its metadata,
    one JSON object under the key "dynamixer".

    Args:
        model: a run folder, a checkpoint or hf-hub:OWNER/NAME.
        format: "onnx"; "openvino", an .xml with the weights in a .bin beside it; "pt2", torch.export's own.
        out: the file to write; by default the model's name in the current folder.
        dynamic: what may differ from call to call: "none", "batch", or "all" for the batch and the picture's sides too.
        batch_size: the one batch size of "none".
        size: picture size in pixels of "none" and "batch", if not the model's own.
        data: pictures to compare on, as `predict_many` takes them; those that ship by default.
        int8: quantise the linear layers ("openvino" only), calibrated on `data`. A labelled data set, as `evaluate` takes it, is
            calibrated on by its training split, compared on by the other, and gives the accuracies too.

    Raises:
        UserError: what was asked for does not go together, or a library is missing.
        RunError: the file says something else than the model (it is not kept), or it cannot be written.
    """
    data = [data] if isinstance(data, str | Path) else data
    _check(format, dynamic, batch_size, size, int8, data)
    checkpoint = load(model)
    preprocessing = checkpoint.at(size)
    checkpoint = replace(checkpoint, preprocessing=preprocessing)
    path = Path(out) if out is not None else Path(f"{called(checkpoint.path)}{SUFFIXES[format]}")
    if path.suffix != SUFFIXES[format] or path.is_dir():
        raise UserError(f"{path} is not a name for {format}: it has to end in {SUFFIXES[format]} and not be a folder.")
    check_place(path)
    weights = path.with_suffix(".bin")
    if format == "openvino" and weights.exists() and not path.exists():
        raise UserError(f"{weights} would be overwritten, and no {path.name} is beside it: give --out another name.")
    about = metadata(checkpoint, dynamic, batch_size, int8)
    calibration, lot = None, None
    if int8 and data:
        calibration, lot = apart(data, checkpoint, compared=INT8_COMPARED, calibrated=CALIBRATED)
        if len(lot.numbers) < INT8_COMPARED:
            log(
                f"warning: compared on {len(lot.numbers):,} pictures where {INT8_COMPARED:,} would be surer: give more --data"
            )
    fixed = batch_size if dynamic == "none" else None
    comparison = partial(
        compare,
        checkpoint.model,
        lot=lot or real_pictures(data, COMPARED),
        preprocessing=preprocessing,
        batches=[fixed] if fixed else [1, 2, 16],
        sizes=_sizes(preprocessing.size, dynamic),
        whole=fixed,
    )
    log(f"tracing and writing {format}")
    program = trace(checkpoint.model, (fixed or 1, len(preprocessing.mean), *preprocessing.size), dynamic)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            stage = Path(folder) / path.name
            files = WRITERS[format](program, stage, about)
            in_fp32 = None
            if calibration is not None:
                batches = [*tensors(calibration, preprocessing, [fixed or 1])]
                whole = [batch for batch in batches if len(batch) == (fixed or 1)]
                agreement, in_fp32 = _quantise(stage, about, whole, comparison)
            else:
                agreement = comparison(RUNNERS[format](stage)[0])
            _judge(agreement, path, int8)
            kept = _keep(files, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}.") from None
    except (UserError, RunError, MemoryError):
        raise
    except Exception as error:  # of the libraries' many kinds; a full disk is a RuntimeError of torch's
        raise RunError(f"{path} could not be made: {first_line(error).rstrip('.')}.") from None
    return Exported(kept, format, dynamic, int8, sum(file.stat().st_size for file in kept), agreement, in_fp32)


def metadata(checkpoint: Checkpoint, dynamic: str, batch_size: int, int8: bool) -> dict[str, Any]:
    """What a program needs to use the file: input, preprocessing and classes; and where it came from."""
    height, width = checkpoint.preprocessing.size
    sides: list[int | str] = ["height", "width"] if dynamic == "all" else [height, width]
    return {
        "format": 1,
        "dynamixer": version("dynamixer"),
        "model": checkpoint.name,
        "model_args": checkpoint.args,
        "input": ["batch" if dynamic != "none" else batch_size, len(checkpoint.preprocessing.mean), *sides],
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "classes": list(checkpoint.classes),
        "precision": "int8" if int8 else "fp32",
        "trained": checkpoint.trained,
    }


def _check(
    format: str,
    dynamic: str,
    batch_size: int,
    size: Any,
    int8: bool,
    data: Sequence[str | Path] | None,
) -> None:
    for name, value, known in (("format", format, FORMATS), ("dynamic", dynamic, DYNAMIC)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}: {did_you_mean(str(value), known)}")
    if batch_size < 1 or (batch_size > 1 and dynamic != "none"):
        raise UserError(f"batch_size={batch_size} is that of dynamic=none, 1 or more.")
    if size is not None and dynamic == "all":
        raise UserError("with dynamic=all the file takes every size: leave size out.")
    if int8 and format != "openvino":
        raise UserError("int8 is made by OpenVINO: give format=openvino.")
    check_libraries(format, int8)
    if int8 and not data:
        raise UserError("int8 is calibrated on pictures like those that it will see: give some (--data).")


def _sizes(native: tuple[int, int], dynamic: str) -> list[tuple[int, int]]:
    """The model's size and, where all is dynamic, smaller, larger, other shapes, whole patches or not, and the first again."""
    height, width = native
    if dynamic != "all":
        return [native]
    return [native, (height * 5 // 8, width * 5 // 8), (height * 3 // 2, width), (height - 1, width * 2 + 3), native]


def _quantise(
    stage: Path, about: dict[str, Any], calibration: list[np.ndarray], comparison: Callable[[Runner], Agreement]
) -> tuple[Agreement, str]:
    """Replace the written fp32 files by the first int8 ones that agree on enough pictures, or by the last.

    Raises:
        UserError: there is nothing to calibrate on.
    """
    if not calibration:
        raise UserError("int8 is calibrated on whole batches, and there are fewer pictures than one has: give more.")
    log(f"calibrating on {sum(map(len, calibration)):,} pictures")
    made = stage.with_name("int8.xml")
    for in_fp32, names_of in IN_FP32.items():
        written = need("openvino", "openvino").Core().read_model(stage)
        save_openvino(quantise(written, calibration, in_fp32=names_of), made, about)
        agreement = comparison(RUNNERS["openvino"](made)[0])
        log(f"int8 with {in_fp32} in fp32: {agreement}")
        if agreement.share >= INT8_SHARE:
            break
    for suffix in (".xml", ".bin"):
        os.replace(made.with_suffix(suffix), stage.with_suffix(suffix))
    return agreement, in_fp32


def _judge(found: Agreement, path: Path, int8: bool) -> None:
    """Refuse a file that says something else.

    Raises:
        RunError: with the figures.
    """
    said = f"the same top-1 for {found.same_top1} of {found.pictures} pictures, largest difference {found.max_difference:.2g}"
    good = (
        found.share >= INT8_SHARE if int8 else found.same_top1 == found.pictures and found.max_difference <= TOLERANCE
    )
    if not good:
        asked = f"{INT8_SHARE} % of them" if int8 else f"all of them, and {TOLERANCE:g}"
        raise RunError(f"{path} was not kept: {said}; asked for are {asked}.")


def _keep(files: list[Path], path: Path) -> tuple[Path, ...]:
    """Move the files to their place, the one that is opened by name last: it never stands beside another's weights."""
    places = [path.with_suffix(file.suffix) for file in files]
    if len(files) > 1:
        path.unlink(missing_ok=True)
    for file, place in reversed([*zip(files, places, strict=True)]):
        with file.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(file, place)
    return tuple(places)
