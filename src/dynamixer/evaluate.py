"""How well a model classifies labelled pictures."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dynamixer.data.loading import Batch, EvaluationPictures, batches, evaluation_loader, held_out_of, readable
from dynamixer.data.sources import Source, open_data
from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError
from dynamixer.files import check_picture_path, whole_file
from dynamixer.logs import log
from dynamixer.models.checkpoint import Checkpoint, check_classifier, load
from dynamixer.precision import bf16_products
from dynamixer.progress import progress

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BINS = 15
WRONG = 24

Wrong = tuple[int, int, int, float]  # number of the picture, true class, predicted class, probability of the latter


@dataclass(frozen=True)
class Metrics:
    """Accuracy over a set of pictures; top1, top5 and ece in percent, loss the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int
    confusion: np.ndarray  # [true class, predicted class], counts
    ece: float  # expected calibration error: mean distance of accuracy and confidence, bin by bin
    bins: np.ndarray  # [BINS, 3]: pictures, sum of confidences, hits, by equal steps of the confidence from 0 to 1
    wrong: tuple[Wrong, ...]  # the most confidently wrong pictures, worst first

    def summary(self) -> dict[str, Any]:
        """The figures without the arrays."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "ece": self.ece, "images": self.images}


class Tally:
    """What is counted over batches: numbers and arrays alone, so that processes can send each other theirs."""

    def __init__(self, classes: int):
        self.loss, self.top1, self.top5 = 0.0, 0, 0
        self.confusion = np.zeros((classes, classes), dtype=np.int64)
        self.bins = np.zeros((BINS, 3))
        self.wrong: tuple[Wrong, ...] = ()

    @property
    def images(self) -> int:
        """Pictures counted so far."""
        return int(self.confusion.sum())

    def add(self, logits: Tensor, labels: Tensor, numbers: Sequence[int]) -> None:
        """Count a batch: logits [B, classes], labels [B] and the pictures' positions in the evaluated set."""
        if len(numbers) != len(labels):
            raise AssertionError(f"{len(labels)} pictures came for {len(numbers)} numbers.")
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        hits = logits.topk(min(5, len(self.confusion)), dim=1).indices == labels[:, None]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(1).sum())
        true, predicted = labels.cpu().numpy(), logits.argmax(1).cpu().numpy()
        np.add.at(self.confusion, (true, predicted), 1)
        # A model that overflowed says nothing with any confidence.
        confidence = logits.softmax(1).amax(1).nan_to_num(0).double().cpu().numpy()
        rows = np.stack([np.ones(len(true)), confidence, true == predicted], axis=1)
        np.add.at(self.bins, np.minimum((confidence * BINS).astype(int), BINS - 1), rows)
        self._keep(
            (int(numbers[i]), int(true[i]), int(predicted[i]), float(confidence[i]))
            for i in np.flatnonzero(true != predicted).tolist()
        )

    def _keep(self, wrong: Iterable[Wrong]) -> None:
        self.wrong = tuple(sorted([*self.wrong, *wrong], key=lambda one: (-one[3], one[0]))[:WRONG])

    @classmethod
    def merged(cls, parts: Sequence["Tally"]) -> "Tally":
        """The tally of all pictures from tallies of parts of them."""
        whole = cls(len(parts[0].confusion))
        for part in parts:
            whole.loss += part.loss
            whole.top1 += part.top1
            whole.top5 += part.top5
            whole.confusion += part.confusion
            whole.bins += part.bins
            whole._keep(part.wrong)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tally":
        """Back from `to_dict`, as JSON gives it."""
        made = cls(len(values["confusion"]))
        made.loss, made.top1, made.top5 = values["loss"], values["top1"], values["top5"]
        made.confusion, made.bins = np.array(values["confusion"], dtype=np.int64), np.array(values["bins"])
        made._keep(tuple(one) for one in values["wrong"])
        return made

    def metrics(self) -> Metrics:
        """The figures of what was counted: at least one picture."""
        images = self.images
        ece = 100 * float(np.abs(self.bins[:, 2] - self.bins[:, 1]).sum()) / images  # counts cancel in each bin
        return Metrics(
            top1=100 * self.top1 / images,
            top5=100 * self.top5 / images,
            loss=self.loss / images,
            images=images,
            confusion=self.confusion,
            ece=ece,
            bins=self.bins,
            wrong=self.wrong,
        )


@torch.inference_mode()
def tally(
    model: nn.Module,
    loader: DataLoader[Batch],
    *,
    device: torch.device,
    images: int,
    classes: int,
    precision: str = "fp32",
    title: str = "evaluating",
    numbers: Sequence[int] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tally | None:
    """Run a model over labelled batches and count.

    Args:
        model: the model; pictures are given to it in the precision of its parameters.
        loader: the batches.
        device: where the model is.
        images: how many pictures the loader gives.
        classes: how many the model knows.
        precision: bf16 and fp16 are automatic mixed precision; fp64 expects a model in fp64.
        title: what the bar says.
        numbers: positions of the loader's pictures in the evaluated set, in order; by default 0, 1, ...
        stop: asked after every batch; once it says yes, there is no tally.
    """
    model.eval()
    counted, numbers = Tally(classes), range(images) if numbers is None else numbers
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with progress(title, images) as meter:
        for batch, target, _ in batches(loader):
            pictures, labels = batch.to(device, dtype), target.to(device)
            kind = AUTOCAST.get(precision, torch.bfloat16)
            with bf16_products(device, precision), torch.autocast(device.type, kind, enabled=precision in AUTOCAST):
                logits = model(pictures)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            counted.add(logits, labels, numbers[meter.done : meter.done + len(labels)])
            meter.advance(len(labels), top1=100 * counted.top1 / (meter.done + len(labels)))
            if stop is not None and stop():
                return None
    if counted.images != images:
        raise AssertionError(f"{images} pictures were asked for and {counted.images} came.")
    return counted


def measure(
    model: nn.Module,
    loader: DataLoader[Batch],
    *,
    device: torch.device,
    images: int,
    classes: int,
    precision: str = "fp32",
    title: str = "evaluating",
    numbers: Sequence[int] | None = None,
) -> Metrics:
    """The figures of a model over labelled batches; see `tally`."""
    counted = tally(
        model,
        loader,
        device=device,
        images=images,
        classes=classes,
        precision=precision,
        title=title,
        numbers=numbers,
    )
    if counted is None:
        raise AssertionError("nothing asks the tally to stop")
    return counted.metrics()


def match_classes(source: Source, checkpoint: Checkpoint) -> Source:
    """The source with its labels numbered as the model numbers its classes.

    Raises:
        UserError: the data has classes that the model does not know.
    """
    if source.classes == checkpoint.classes:
        return source
    unknown = [name for name in source.classes if name not in checkpoint.classes]
    if unknown:
        raise UserError(
            f"{source.name} has {len(unknown)} classes that {checkpoint.path} was not trained on, such as {unknown[0]!r}; "
            f"the model knows {', '.join(checkpoint.classes[:5])}{', ...' if len(checkpoint.classes) > 5 else ''}."
        )
    source.renumber(checkpoint.classes)
    return source


def _to_measure(data: str | Path, split: str | None, checkpoint: Checkpoint) -> tuple[str, Source, np.ndarray]:
    """What to call the pictures that are measured, their source and their numbers in it."""
    used, source = open_data(data).for_evaluation(split)
    numbers = np.arange(len(source))
    if (held_out := held_out_of(source, checkpoint.trained)) is not None:
        others = f"{len(source) - len(held_out):,} of the {len(source):,} pictures of {source.name}"
        if split is None and len(held_out):
            used, numbers = "held-out", held_out
            log(f"left out, because the model was trained on them: {others} (--split train measures all)")
        else:
            log(f"the model was trained on {others}: on new ones it is less accurate")
    return used, match_classes(source, checkpoint), numbers


def _without_bad(source: Source, numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The numbers of the pictures that can be read, and a sentence for each other one."""
    numbers, unread = readable(source, numbers)
    for sentence in unread:
        log(f"measured without it: {sentence}")
    if not len(numbers):
        raise UserError(f"none of the pictures of {source.name} can be read.")
    return numbers, unread


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    on_bad_image: str = "stop",
    fast: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a trained model on a data set.

    Args:
        model: a run folder or a checkpoint.
        data: what `open_data` takes.
        split: train, val or test; by default the first that there is of test, val, train. Of data without other splits than
            those pictures that the model was trained on, only those that were held out ("held-out").
        size: picture size in pixels, if not the one trained at.
        batch_size: pictures at a time.
        workers: processes that decode.
        device: auto, cpu, cuda, mps or xpu.
        precision: fp32; bf16 or fp16 for automatic mixed precision; fp64.
        on_bad_image: "stop" at a picture that cannot be read, or "skip": name it and measure without it.
        fast: run the quickest way on this machine's processor, which is made once (docs/speed.md); fp32 or bf16.
        out: a PNG to write the confusion matrix to.

    Returns:
        model, data, split, size, top1 and top5 (percent), loss, ece (expected calibration error, percent), images, skipped.

    Raises:
        UserError: no such model or data, classes that do not match, or a precision that the device does not have.
    """
    if precision not in PRECISIONS or batch_size < 1:
        raise UserError(
            f"precision={precision} is one of {', '.join(PRECISIONS)}, and batch_size={batch_size} above 0."
        )
    if on_bad_image not in ("stop", "skip"):
        raise UserError(f"unknown on_bad_image {on_bad_image!r}: it is stop or skip.")
    if out is not None:
        check_picture_path(Path(out))
    where = resolve_device(device)
    if precision == "fp64" and where.type == "mps":
        raise UserError("Apple's GPUs have no fp64: give device=cpu, or another precision.")
    checkpoint = load(model, device=where)
    check_classifier(checkpoint)
    if precision == "fp64":
        checkpoint.model.double()
    used, source, numbers = _to_measure(data, split, checkpoint)
    preprocessing = checkpoint.at(size)
    unread: list[str] = []
    if on_bad_image == "skip":
        numbers, unread = _without_bad(source, numbers)
    loader = evaluation_loader(EvaluationPictures(source, preprocessing, numbers), batch_size, workers)
    network: nn.Module = checkpoint.model
    if fast:
        from dynamixer.speed.fast import FastModel, Precision  # noqa: PLC0415 - seldom wanted

        if precision not in ("fp32", "bf16"):
            raise UserError(f"--fast computes in fp32 or bf16, not in {precision}.")
        kind: Precision = "fp32" if precision == "fp32" else "bf16"
        size_px = preprocessing.size
        network = FastModel(network, size_px, images=len(numbers), batch=batch_size, device=where, precision=kind)
        precision = "fp32"  # it takes and gives that
    metrics = measure(
        network,
        loader,
        device=where,
        images=len(numbers),
        classes=len(checkpoint.classes),
        precision=precision,
    )
    found = {
        "model": str(checkpoint.path),
        "data": source.name,
        "split": used,
        "size": list(preprocessing.size),
        **metrics.summary(),
        "skipped": len(unread),
    }
    if out is not None:
        from dynamixer.plots import confusion_picture  # noqa: PLC0415 - matplotlib takes a second to import

        try:
            with whole_file(Path(out)) as temporary:
                confusion_picture(metrics.confusion, checkpoint.classes).savefig(temporary, format="png")
        except RunError as error:
            error.found = found
            raise
    return found
