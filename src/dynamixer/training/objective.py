"""What a step minimises: the loss, mixed pictures, a teacher. timm's tasks do the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.errors import RunError, UserError
from dynamixer.models.checkpoint import create_model, in_order, load
from dynamixer.models.shipped import shipped
from dynamixer.speed.kernel import kernel_if_any
from dynamixer.training.config import TrainConfig


class CrossEntropy(nn.Module):
    """Mean cross-entropy in nats of logits [B, classes] against labels [B] or shares [B, classes], in at least fp32."""

    def __init__(self, smoothing: float):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(
            wide, target.to(wide.dtype) if target.ndim == 2 else target, label_smoothing=self.smoothing
        )


def make_task(
    config: TrainConfig,
    model: nn.Module,
    classes: tuple[str, ...],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
) -> TrainingTask:
    """The model with its loss, and with a teacher if the configuration names one.

    Raises:
        UserError: the teacher does not tell the same classes apart, or does not take pictures of one of the sizes.
    """
    criterion = CrossEntropy(0.0 if mixes(config) else config.label_smoothing)  # Mixup smooths the shares itself
    options: dict[str, Any] = {"device": device, "dtype": dtype_of(config), "verbose": False}
    if config.teacher is None:
        return ClassificationTask(model, criterion, **options)
    teacher = _teacher(config.teacher, classes, sizes).to(device, dtype_of(config))
    if config.kernel != "off" and device.type == "cpu" and config.precision != "fp64":
        kernel_if_any(teacher)
    return LogitDistillationTask(
        model,
        teacher,
        criterion,
        distill_loss_weight=config.distill,
        task_loss_weight=1 - config.distill,
        temperature=config.temperature,
        **options,
    )


def mixes(config: TrainConfig) -> bool:
    """Whether pictures are mixed."""
    return bool(config.mixup or config.cutmix)


def make_mixup(config: TrainConfig, classes: int) -> Mixup | None:
    """Timm's mixup and CutMix of a batch, or None."""
    if not mixes(config):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def dtype_of(config: TrainConfig) -> torch.dtype:
    """The dtype of weights and pictures; bf16 and fp16 are left to autocast."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def _teacher(name: str, classes: tuple[str, ...], sizes: Sequence[tuple[int, int]]) -> nn.Module:
    if Path(name).exists() or shipped(name):
        checkpoint = load(name)
        teacher: nn.Module = checkpoint.model
        known: Sequence[str] = checkpoint.classes
    else:
        try:
            teacher = create_model(name, pretrained=True)
        except UserError:
            raise
        except Exception as error:  # whatever the hub, the network or the file does
            raise RunError(f"the weights of the teacher {name} could not be had: {error}") from None
        known = (getattr(teacher, "pretrained_cfg", None) or {}).get("label_names") or ()  # timm's own have none
        if not known and getattr(teacher, "num_classes", None) == len(classes):
            known = classes
    if not in_order(teacher, known, classes):
        raise UserError(f"the teacher {name} knows other classes than the data: distillation needs the same ones.")
    for size in {*sizes}:
        try:
            with torch.no_grad():
                teacher.eval()(torch.zeros(1, 3, *size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"the teacher {name} does not take pictures of {size[0]}x{size[1]}: {error}") from None
    return teacher
