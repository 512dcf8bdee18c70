"""What a step minimises: the loss, mixed pictures, a teacher. timm's tasks do the work."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from dynamixer.errors import RunError, UserError
from dynamixer.logs import log
from dynamixer.models.checkpoint import create_model, in_order, load
from dynamixer.models.download import HUB
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


class Distillation(LogitDistillationTask):
    """Timm's, with the divergence in at least fp32: in bf16 it is lost in rounding once the student is near its teacher."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 - timm's name
        """The loss of pictures [B, 3, height, width] with the student's normalisation, and the student's logits."""
        logits = self.trainable_module(input)
        with torch.no_grad():
            taught = self.teacher(
                self.teacher.normalize_input(input, self.student_mean, self.student_std), return_features=False
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        mine, theirs = ((one.to(wide) / self.temperature).log_softmax(-1) for one in (logits, taught))
        divergence = F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * self.temperature**2
        task = self.criterion(logits, target)
        loss = self.task_loss_weight * task + self.distill_loss_weight * divergence
        return {"loss": loss, "output": logits, "task_loss": task, "kd_loss": divergence}


def digest_of_teacher(task: TrainingTask) -> str | None:
    """What a resumed run has to find again; None without a teacher."""
    if not isinstance(task, Distillation):
        return None
    digest = hashlib.sha256()
    for name, value in task.teacher.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    return Distillation(
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
    if Path(name).exists() or shipped(name) or name.startswith(HUB):
        checkpoint = load(name)
        teacher: nn.Module = checkpoint.model
        known: Sequence[str] = checkpoint.classes
        if checkpoint.preprocessing.size not in sizes:
            own, asked = (f"{height}x{width}" for height, width in (checkpoint.preprocessing.size, sizes[0]))
            log(f"warning: the teacher {name} was trained at {own} and is asked at {asked}, where it may know less")
    else:
        try:
            teacher = create_model(name, pretrained=True)
        except UserError as error:
            raise UserError(
                f"teacher={name}: there is no such run folder or checkpoint, and no model with weights ({error})."
            ) from None
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
