"""What a training run depends on: one frozen dataclass, and the checks of its values."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

import yaml

from dynamixer.data.preprocess import Augmentation
from dynamixer.errors import UserError, did_you_mean
from dynamixer.evaluate import PRECISIONS

MODEL_PREFIX = "model."
RESERVED = {
    "num_classes": "the data says how many classes there are",
    "in_chans": "pictures are read in colour",
    "img_size": "size=... does that, for the pictures too",
    "drop_path_rate": "drop_path=... does that",
    "pretrained": "weights=... starts from trained weights",
    "checkpoint_path": "weights=... starts from trained weights",
}


def _key(default: Any, meaning: str, *, free: bool = False) -> Any:
    """A key with its meaning; a free one may differ when a run is resumed, since the result does not depend on it."""
    metadata = {"help": meaning, "free": free}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that changes the result of a run; `dynamixer train --help` explains the keys from here."""

    data: str = _key("fashion-mnist-mini", "folder, Parquet file, tar shards or data set name")
    model: str = _key("dynamixer_nano", "any model name of `dynamixer models` or of timm")
    model_args: dict[str, Any] = _key({}, "options of the model; on the command line model.softmax=false and so on")
    weights: str | None = _key(
        None, "start from a run folder, checkpoint, or name whose weights ship (recipe finetune)"
    )
    freeze: str | None = _key(None, "parameters that stay as they are: a pattern of names, such as *.generate.*")
    size: int | None = _key(None, "picture size in pixels (default: the model's own)")
    sizes: tuple[int, ...] = _key((), "train with mixed sizes, one drawn for each batch, such as [48,64,80,96]")
    epochs: int = _key(10, "passes over the training pictures")
    batch_size: int = _key(128, "pictures in a step, over all processes and accumulated parts")
    accumulate: int = _key(1, "parts that a process computes one after the other, to save memory")
    opt: str = _key("adamw", "an optimiser of timm")
    lr: float = _key(1e-3, "highest learning rate")
    min_lr: float = _key(1e-5, "learning rate at the end of the cosine")
    warmup_lr: float | None = _key(None, "learning rate that the warm-up starts from (default: lr / 100)")
    warmup_epochs: float = _key(
        1.0, "epochs of linear warm-up, for which the cosine does not wait; 1 or more are none of one epoch"
    )
    cooldown_epochs: int = _key(0, "epochs at min_lr, the last ones")
    layer_decay: float | None = _key(None, "factor of the learning rate from each layer to the one before it")
    weight_decay: float = _key(0.05, "weight decay of matrices and kernels")
    clip_grad: float | None = _key(1.0, "largest gradient norm, or none")
    label_smoothing: float = _key(0.1, "share of each target spread over all classes")
    drop_path: float = _key(0.0, "stochastic depth of the last layer")
    mixup: float = _key(0.0, "alpha of mixup (mixed pictures), 0 for none")
    cutmix: float = _key(0.0, "alpha of CutMix (pasted rectangles), 0 for none")
    ema: float | None = _key(None, "decay of averaged weights, such as 0.9999; they are then evaluated and kept")
    ema_warmup: bool = _key(False, "average over fewer steps at first: a decay of at most 1 - (1 + step)^(-2/3)")
    teacher: str | None = _key(None, "distil from this run folder, checkpoint or timm model with weights")
    distill: float = _key(0.5, "share of the teacher in the loss")
    temperature: float = _key(1.0, "of the teacher's and the student's softmax")
    crop: str = _key("rrc", "rrc (random resized crop), pad (padded crop) or none")
    scale: float = _key(0.35, "rrc: smallest share of the picture")
    hflip: float = _key(0.5, "chance of a horizontal flip")
    color_jitter: float = _key(0.0, "strength of colour jitter")
    auto_augment: str | None = _key(None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    random_erasing: float = _key(0.0, "chance that a rectangle is erased")
    repeats: int = _key(1, "repeated augmentation: times that a picture comes in a row")
    holdout: float = _key(0.1, "share of the training pictures held out where the data has no val split")
    limit_train: int | None = _key(None, "use that many training pictures only")
    on_bad_image: str = _key("stop", "a picture that cannot be read: stop with its name, or skip, count and name it")
    patience: int = _key(0, "stop after that many epochs without a better one, 0 for never")
    precision: str = _key("fp32", "fp32, bf16 or fp16 for automatic mixed precision, fp64 for checks")
    kernel: str = _key("off", "C++ kernels for the layers on processors: off, auto (where they can be built) or on")
    compile: bool = _key(False, "compile the model (minutes at the start, faster afterwards)")
    grad_checkpointing: bool = _key(False, "recompute activations in the backward pass, to save memory")
    parallel: str = _key("ddp", "with torchrun: ddp, or fsdp2 to shard weights and optimiser")
    seed: int = _key(0, "of weights, order and augmentation")
    workers: int = _key(0, "processes that decode; the result is the same for any number", free=True)
    checkpoint_every: int = _key(200, "steps from checkpoint to checkpoint; each epoch ends with one too", free=True)
    track: str = _key("auto", "auto (TensorBoard if installed), none, or tensorboard,wandb,mlflow,trackio", free=True)
    device: str = _key("auto", "auto, cpu, cuda, mps or xpu", free=True)

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: which one, and what it may be.
        """
        for key, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} has to be a finite number.")
            for keys, fits, limits in _LIMITS:
                if key in keys and value is not None and not fits(value):
                    raise UserError(f"{key}={value} {limits}.")
            if key in _CHOICES and value not in _CHOICES[key]:
                raise UserError(f"unknown {key} {value!r}: it is one of {', '.join(_CHOICES[key])}.")
        for key, instead in RESERVED.items():
            if key in self.model_args:
                raise UserError(f"model.{key} cannot be set: {instead}.")
        if any(size < 1 for size in self.sizes):
            raise UserError(f"sizes={list(self.sizes)} are picture sizes in pixels: above 0.")
        self._agreed()
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts."
            )
        self.augmentation()

    def _agreed(self) -> None:
        """Refuse keys that leave others nothing to do."""
        for key in ("min_lr", "warmup_lr"):
            if (value := getattr(self, key)) is not None and value > self.lr:
                raise UserError(
                    f"{key}={value} is above lr={self.lr}, the highest learning rate: give a lower {key} too."
                )
        if self.color_jitter and self.auto_augment:
            raise UserError(
                "color_jitter beside auto_augment has no effect: a policy has colours of its own. Give one of them."
            )
        if self.ema_warmup and self.ema is None:
            raise UserError("ema_warmup is of averaged weights: give ema, their decay, such as ema=0.999.")
        if self.warmup_lr is not None and not self.warmup:
            raise UserError(f"warmup_lr={self.warmup_lr} is of no use without warmup_epochs.")
        if self.teacher is None and (self.distill, self.temperature) != (0.5, 1.0):
            raise UserError("distill and temperature are of no use without a teacher.")
        if self.warmup + self.cooldown_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs} and cooldown_epochs={self.cooldown_epochs} leave nothing of "
                f"{self.epochs} epochs."
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up as they are used: a single epoch has none, but for a part of it."""
        return self.warmup_epochs if self.epochs > 1 or self.warmup_epochs < 1 else 0.0

    def augmentation(self) -> Augmentation:
        """What training does to a picture."""
        keys = ("crop", "scale", "hflip", "color_jitter", "auto_augment", "random_erasing")
        return Augmentation(**{key: getattr(self, key) for key in keys})

    def to_dict(self) -> dict[str, Any]:
        """Every key and its value, as YAML and JSON can hold them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def to_yaml(self) -> str:
        """As config.yaml of a run folder holds it, and as `--config` reads it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def with_values(self, values: dict[str, Any]) -> "TrainConfig":
        """A copy changed by values as YAML gives them; keys such as `model.softmax` set options of the model.

        Raises:
            UserError: no such key ("did you mean"), or a value of another type.
        """
        changes: dict[str, Any] = {}
        args = dict(self.model_args)
        for key, value in values.items():
            if key == "model_args":
                args |= options_of(value)
            elif str(key).startswith(MODEL_PREFIX):
                args[key.removeprefix(MODEL_PREFIX)] = value
            else:
                changes[key] = _typed(str(key), value)
        return dataclasses.replace(self, **changes, model_args=args)

    def with_words(self, words: typing.Iterable[str]) -> "TrainConfig":
        """A copy changed by words such as `epochs=3`, `sizes=[48,64]` or `model.softmax=false`."""
        return self.with_values(values_of(words))

    def differences(self, other: "TrainConfig") -> list[str]:
        """The keys that change the result and differ, each with this value and the other one."""
        here, there = (yaml.safe_load(config.to_yaml()) for config in (self, other))  # as files hold them
        return [
            f"{f.name} ({here[f.name]} here, {there[f.name]} there)"
            for f in dataclasses.fields(self)
            if not f.metadata["free"] and here[f.name] != there[f.name]
        ]


_CHOICES = {
    "kernel": ("auto", "on", "off"),
    "precision": PRECISIONS,
    "on_bad_image": ("stop", "skip"),
    "parallel": ("ddp", "fsdp2"),
}
_LIMITS: tuple[tuple[tuple[str, ...], typing.Callable[[Any], bool], str], ...] = (
    (
        (
            "epochs", "batch_size", "accumulate", "lr", "clip_grad", "size", "limit_train", "repeats", "temperature",
            "checkpoint_every",
        ),
        lambda v: v > 0,
        "has to be above 0",
    ),
    (("label_smoothing", "drop_path", "holdout"), lambda v: 0 <= v < 1, "has to be at least 0 and below 1"),
    (("ema",), lambda v: 0 < v < 1, "is a decay: above 0 and below 1"),
    (("layer_decay",), lambda v: 0 < v <= 1, "is a factor: above 0 and at most 1"),
    (("hflip", "random_erasing"), lambda v: 0 <= v <= 1, "is a chance: between 0 and 1"),
    (("distill",), lambda v: 0 <= v <= 1, "is a share: between 0 and 1"),
    (("scale",), lambda v: 0 < v <= 1, "is a share of the picture: above 0 and at most 1"),
    (
        (
            "workers", "warmup_epochs", "cooldown_epochs", "weight_decay", "min_lr", "warmup_lr", "seed", "patience", "mixup",
            "cutmix", "color_jitter",
        ),
        lambda v: v >= 0,
        "has to be at least 0",
    ),
    (("lr", "min_lr", "warmup_lr", "weight_decay"), lambda v: v <= 1e9, "is too large: at most 1e9"),
    (("color_jitter",), lambda v: v <= 100, "is too strong: at most 100"),
    (("seed",), lambda v: v < 2**63, "has to be below 2**63"),
)  # fmt: skip
_TYPES = typing.get_type_hints(TrainConfig)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def values_of(words: typing.Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` words, as YAML reads them; of a key that comes twice, the later one.

    Raises:
        UserError: a word without an equals sign, or one that YAML cannot read.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not a key=value word; the name of a recipe comes before all of them.")
        try:
            values[key] = text if _TYPES.get(key) in (str, str | None) and text != "none" else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # a ValueError for a date that does not exist
            raise UserError(f"{word} cannot be read: a number, true, false, a word or a [list] is expected.") from None
    return values


def options_of(value: Any) -> dict[str, Any]:
    """What stands under model_args."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(
            f"model_args={value} are no options: give each as model.NAME=VALUE, or in a file below model_args."
        )
    return value


def _typed(key: str, value: Any) -> Any:
    """A value of the type that the key has."""
    if key not in _TYPES or key == "model_args":
        raise UserError(
            f"unknown key {key!r}: {did_you_mean(key, set(_TYPES) - {'model_args'}, 'dynamixer train --help')}"
        )
    wanted = _TYPES[key]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(None) in options and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-3 for a word
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind in (int, bool, str):
        if type(value) is kind:
            return value
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
    else:
        numbers = value if isinstance(value, list | tuple) else [value]
        if all(type(number) is int for number in numbers):
            return tuple(numbers)
    raise UserError(f"{key}={value} is not {_WORDS.get(kind, 'a list of whole numbers such as [48,64]')}.")
