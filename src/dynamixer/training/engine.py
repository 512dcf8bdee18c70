"""The training loop: timm's optimiser and schedule around any timm model, and the run folder it leaves."""

import csv
import io
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F

import dynamixer
from dynamixer.data.loading import (
    EvaluationPictures,
    TrainingPictures,
    batches,
    epoch_keys,
    evaluation_loader,
    holdout,
    training_loader,
)
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import Source, Splits, open_data
from dynamixer.device import resolve_device
from dynamixer.errors import RunError, UserError
from dynamixer.evaluate import Metrics, measure
from dynamixer.files import whole_file, write_text
from dynamixer.logs import log
from dynamixer.models.checkpoint import create_model, save_checkpoint
from dynamixer.plots import confusion_picture, curves_picture
from dynamixer.progress import progress
from dynamixer.training.config import TrainConfig


@dataclass(frozen=True)
class Result:
    """What a run came to: accuracies in percent on the held-out pictures, of the epoch that was best there."""

    run: Path
    parameters: int
    best_epoch: int
    top1: float | None
    top5: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return self.__dict__ | {"run": str(self.run)}


@dataclass
class _Data:
    train: Source
    train_indices: np.ndarray
    val: Source | None
    val_indices: np.ndarray | None


def train(config: TrainConfig, out: str | Path) -> Result:
    """Train a model and leave a run folder: config, metrics, pictures, best.safetensors and last.safetensors.

    Args:
        config: what to run; see `RECIPES` for starting points.
        out: the run folder; new or empty.

    Raises:
        UserError: a configuration, data set or folder that cannot work, before any training.
        RunError: the loss is not finite, or a file could not be written.
    """
    run = Path(out)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} exists and is not an empty folder: give another --out, or remove it.")
    device = resolve_device(config.device)
    data = _prepare(config)
    torch.manual_seed(config.seed)
    args = _model_args(config, len(data.train.classes))
    model = _build(config, args).to(device)
    engine = _Run(config, run, device, data, model, args)
    engine.check_sizes()
    return engine.go()


def _build(config: TrainConfig, args: dict[str, Any]) -> nn.Module:
    try:
        return create_model(config.model, **args)
    except UserError as error:
        if "'img_size'" not in str(error):
            raise
    del args["img_size"]  # convolutional networks take any size without being told
    return create_model(config.model, **args)


def _prepare(config: TrainConfig) -> _Data:
    splits: Splits = open_data(config.data)
    if splits.train is None:
        raise UserError(f"{config.data} has no training split.")
    indices = np.arange(len(splits.train))
    val, val_indices = splits.val, None
    if val is None and config.holdout:
        indices, val_indices = holdout(splits.train.labels, config.holdout)
        val = splits.train if len(val_indices) else None
    if config.limit_train is not None:
        indices = np.sort(np.random.default_rng(config.seed).permutation(indices)[: config.limit_train])
    if not len(indices):
        raise UserError(f"holdout={config.holdout} leaves no training pictures of {len(splits.train)}.")
    return _Data(splits.train, indices, val, val_indices)


def _model_args(config: TrainConfig, classes: int) -> dict[str, Any]:
    args: dict[str, Any] = {"num_classes": classes, **config.model_args}
    if config.size is not None:
        args["img_size"] = config.size
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    return args


class _Run:
    """One training run, epoch by epoch."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        device: torch.device,
        data: _Data,
        model: nn.Module,
        args: dict[str, Any],
    ):
        self.config, self.run, self.device, self.data = config, run, device, data
        self.model, self.args = model, args
        self.preprocessing = Preprocessing.of(model)
        if config.size is not None:
            self.preprocessing = self.preprocessing.at(config.size)
        self.sizes = [(size, size) for size in config.sizes] or [self.preprocessing.size]
        self.parameters = sum(p.numel() for p in model.parameters())
        self.pictures = TrainingPictures(data.train, self.preprocessing, config.augmentation(), config.seed)
        steps = len(self._keys(0))
        try:
            self.optimizer = create_optimizer_v2(model, config.opt, lr=config.lr, weight_decay=config.weight_decay)
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"opt={config.opt} is not an optimiser of timm: {error}") from None
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs if config.epochs > 1 else 0,
            warmup_lr=config.lr / 100,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        self.rows: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []

    def check_sizes(self) -> None:
        """Run one black picture of each size through the model, before anything is written.

        Raises:
            UserError: the model does not take such pictures.
        """
        self.model.eval()
        for size in {*self.sizes, self.preprocessing.size}:
            try:
                with torch.no_grad():
                    self.model(torch.zeros(1, 3, *size, device=self.device))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.config.model} does not take pictures of {size[0]}x{size[1]}: {error}") from None

    def _keys(self, epoch: int) -> list[list[Any]]:
        c = self.config
        return epoch_keys(self.data.train_indices, seed=c.seed, epoch=epoch, batch_size=c.batch_size, sizes=self.sizes)

    def go(self) -> Result:
        start = time.perf_counter()
        config = self.config
        val_images = 0 if self.data.val is None else len(self._val_pictures())
        log(
            f"{config.model}, {self.parameters:,} parameters, {len(self.data.train.classes)} classes; "
            f"{len(self.data.train_indices):,} training pictures, {val_images:,} held out; run folder {self.run}"
        )
        best, best_metrics = -1, None
        for epoch in range(config.epochs):
            row = self._train_epoch(epoch)
            metrics = self._validate(epoch)
            if metrics is not None:
                row |= {f"val_{key}": value for key, value in metrics.summary().items() if key != "images"}
            self.rows.append(row)
            is_best = metrics is None or best_metrics is None or metrics.top1 > best_metrics.top1
            if is_best:
                best, best_metrics = epoch, metrics
            self._write(epoch, metrics, is_best)
            self._say(row)
        if best_metrics is not None:
            self._picture("confusion.png", confusion_picture(best_metrics.confusion, self.data.train.classes))
        return Result(
            run=self.run,
            parameters=self.parameters,
            best_epoch=best + 1,
            top1=best_metrics.top1 if best_metrics else None,
            top5=best_metrics.top5 if best_metrics else None,
            seconds=time.perf_counter() - start,
        )

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        config, model = self.config, self.model
        model.train()
        keys = self._keys(epoch)
        loader = training_loader(self.pictures, keys, config.workers)
        total, correct, seen = 0.0, 0, 0
        with progress(f"epoch {epoch + 1}/{config.epochs}", sum(map(len, keys))) as meter:
            for step, (batch, target) in enumerate(batches(loader)):
                pictures, labels = batch.to(self.device), target.to(self.device)
                self.scheduler.step_update(epoch * len(keys) + step)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = model(pictures)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise RunError(
                        f"the loss became {value} in epoch {epoch + 1}, step {step + 1}: a smaller lr may help; "
                        f"{self.run} keeps the epochs before."
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if config.clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                self.optimizer.step()
                seen += len(labels)
                total += value * len(labels)
                correct += int((logits.argmax(1) == labels).sum())
                meter.advance(len(labels), loss=total / seen, top1=100 * correct / seen)
            rate = meter.rate
        self.times.append({"epoch": epoch + 1, "images_per_s": rate, "train_seconds": seen / rate})
        return {
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": total / seen,
            "train_top1": 100 * correct / seen,
        }

    def _val_pictures(self) -> EvaluationPictures:
        if self.data.val is None:
            raise AssertionError("nothing is held out")
        return EvaluationPictures(self.data.val, self.preprocessing, self.data.val_indices)

    def _validate(self, epoch: int) -> Metrics | None:
        if self.data.val is None:
            return None
        pictures = self._val_pictures()
        return measure(
            self.model,
            evaluation_loader(pictures, 2 * self.config.batch_size, self.config.workers),
            device=self.device,
            images=len(pictures),
            classes=len(self.data.train.classes),
            precision=self.config.precision,
            title=f"held out {epoch + 1}/{self.config.epochs}",
        )

    def _write(self, epoch: int, metrics: Metrics | None, is_best: bool) -> None:
        """All that an epoch leaves, the weights first, so that metrics.csv never speaks of weights that are not there."""
        trained = {
            "data": self.config.data,
            "epoch": epoch + 1,
            "epochs": self.config.epochs,
            "seed": self.config.seed,
            "held_out": metrics.summary() if metrics else None,
        }
        if epoch == 0:  # a run that fails before leaves no folder behind
            write_text(self.run / "config.yaml", self.config.to_yaml())
            write_text(self.run / "environment.json", json.dumps(_environment(self.device), indent=2) + "\n")
        for name in ["last.safetensors", *(["best.safetensors"] if is_best else [])]:
            save_checkpoint(
                self.run / name,
                self.model,
                name=self.config.model,
                args=self.args,
                classes=self.data.train.classes,
                preprocessing=self.preprocessing,
                trained=trained,
            )
        write_text(self.run / "metrics.csv", _csv(self.rows))
        write_text(self.run / "timing.csv", _csv(self.times))
        self._picture("curves.png", curves_picture(self.rows, f"{self.config.model} on {self.config.data}"))

    def _picture(self, name: str, figure: Any) -> None:
        with whole_file(self.run / name) as temporary:
            figure.savefig(temporary, format="png")

    def _say(self, row: dict[str, Any]) -> None:
        held = f"  held out {row['val_top1']:.2f} % (loss {row['val_loss']:.3f})" if "val_top1" in row else ""
        log(
            f"epoch {row['epoch']}/{self.config.epochs}  loss {row['train_loss']:.3f}  training {row['train_top1']:.2f} %"
            f"{held}  {self.times[-1]['images_per_s']:.0f} images/s"
        )


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "dynamixer": dynamixer.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
