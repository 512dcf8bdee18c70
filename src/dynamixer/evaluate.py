"""How well a model classifies labelled pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dynamixer.data.loading import EvaluationPictures, batches, evaluation_loader
from dynamixer.data.sources import Source, open_data
from dynamixer.device import resolve_device
from dynamixer.errors import UserError
from dynamixer.files import check_picture_path, whole_file
from dynamixer.models.checkpoint import Checkpoint, load
from dynamixer.progress import progress

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Metrics:
    """Accuracy over a set of pictures; top1 and top5 in percent, loss the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int
    confusion: np.ndarray  # [true class, predicted class], counts

    def summary(self) -> dict[str, Any]:
        """The figures without the matrix."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.images}


@torch.inference_mode()
def measure(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, int]],
    *,
    device: torch.device,
    images: int,
    classes: int,
    precision: str = "fp32",
    title: str = "evaluating",
) -> Metrics:
    """Run a model over labelled batches."""
    model.eval()
    loss, top1, top5 = 0.0, 0, 0
    confusion = np.zeros((classes, classes), dtype=np.int64)
    with progress(title, images) as meter:
        for batch, target in batches(loader):
            pictures, labels = batch.to(device), target.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(pictures)
            logits = logits.float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(1).sum())
            np.add.at(confusion, (labels.cpu().numpy(), logits.argmax(1).cpu().numpy()), 1)
            meter.advance(len(labels), top1=100 * top1 / (meter.done + len(labels)))
    if int(confusion.sum()) != images:
        raise AssertionError(f"{images} pictures were asked for and {confusion.sum()} came.")
    return Metrics(100 * top1 / images, 100 * top5 / images, loss / images, images, confusion)


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
    source.labels = np.array([checkpoint.classes.index(name) for name in source.classes])[source.labels]
    source.classes = checkpoint.classes
    return source


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
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a trained model on a data set.

    Args:
        model: a run folder or a checkpoint.
        data: what `open_data` takes.
        split: train, val or test; by default the first that there is of test, val, train.
        size: picture size in pixels, if not the one trained at.
        batch_size: pictures at a time.
        workers: processes that decode.
        device: auto, cpu, cuda, mps or xpu.
        precision: fp32, or bf16 for automatic mixed precision.
        out: a PNG to write the confusion matrix to.

    Returns:
        model, data, split, size, top1 and top5 (percent), loss, images.

    Raises:
        UserError: no such model or data, or classes that do not match.
    """
    if precision not in PRECISIONS or batch_size < 1:
        raise UserError(
            f"precision={precision} is one of {', '.join(PRECISIONS)}, and batch_size={batch_size} above 0."
        )
    if out is not None:
        check_picture_path(Path(out))
    where = resolve_device(device)
    checkpoint = load(model, device=where)
    used, source = open_data(data).for_evaluation(split)
    source = match_classes(source, checkpoint)
    preprocessing = checkpoint.preprocessing.at(size) if size is not None else checkpoint.preprocessing
    loader = evaluation_loader(EvaluationPictures(source, preprocessing), batch_size, workers)
    metrics = measure(
        checkpoint.model,
        loader,
        device=where,
        images=len(source),
        classes=len(checkpoint.classes),
        precision=precision,
    )
    if out is not None:
        from dynamixer.plots import confusion_picture  # noqa: PLC0415 - matplotlib takes a second to import

        with whole_file(Path(out)) as temporary:
            confusion_picture(metrics.confusion, checkpoint.classes).savefig(temporary, format="png")
    return {
        "model": str(checkpoint.path),
        "data": source.name,
        "split": used,
        "size": list(preprocessing.size),
        **metrics.summary(),
    }
