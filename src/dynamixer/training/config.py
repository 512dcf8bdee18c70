"""What a training run depends on: one frozen dataclass, and `key=value` words that change it."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
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
    "pretrained": "training starts from fresh weights",
    "checkpoint_path": "training starts from fresh weights",
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that changes the result of a run; `dynamixer train --help` explains the keys from here."""

    data: str = field(default="fashion-mnist-mini", metadata={"help": "folder, Parquet file or data set name"})
    model: str = field(default="dynamixer_nano", metadata={"help": "any model name of `dynamixer models` or of timm"})
    model_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of the model; on the command line model.softmax=false and so on"},
    )
    size: int | None = field(default=None, metadata={"help": "picture size in pixels (default: the model's own)"})
    sizes: tuple[int, ...] = field(
        default=(), metadata={"help": "train with mixed sizes, one drawn for each batch, such as [48,64,80,96]"}
    )
    epochs: int = field(default=10, metadata={"help": "passes over the training pictures"})
    batch_size: int = field(default=128, metadata={"help": "pictures in a step"})
    lr: float = field(default=1e-3, metadata={"help": "highest learning rate"})
    min_lr: float = field(default=1e-5, metadata={"help": "learning rate at the end of the cosine"})
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs of linear warm-up"})
    opt: str = field(default="adamw", metadata={"help": "an optimiser of timm"})
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of matrices and kernels"})
    clip_grad: float | None = field(default=1.0, metadata={"help": "largest gradient norm, or none"})
    label_smoothing: float = field(default=0.1, metadata={"help": "share of each target spread over all classes"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth of the last layer"})
    crop: str = field(default="rrc", metadata={"help": "rrc (random resized crop), pad (padded crop) or none"})
    scale: float = field(default=0.35, metadata={"help": "rrc: smallest share of the picture"})
    hflip: float = field(default=0.5, metadata={"help": "chance of a horizontal flip"})
    color_jitter: float = field(default=0.0, metadata={"help": "strength of colour jitter"})
    auto_augment: str | None = field(default=None, metadata={"help": "timm's policy, such as rand-m9-mstd0.5-inc1"})
    random_erasing: float = field(default=0.0, metadata={"help": "chance that a rectangle is erased"})
    holdout: float = field(
        default=0.1, metadata={"help": "share of the training pictures held out where the data has no val split"}
    )
    limit_train: int | None = field(default=None, metadata={"help": "use that many training pictures only"})
    precision: str = field(default="fp32", metadata={"help": "fp32, or bf16 for automatic mixed precision"})
    seed: int = field(default=0, metadata={"help": "of weights, order and augmentation"})
    workers: int = field(default=0, metadata={"help": "processes that decode; the result is the same for any number"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, mps or xpu"})

    def __post_init__(self) -> None:  # noqa: PLR0912 - one branch for each kind of value
        """Refuse values that cannot work.

        Raises:
            UserError: which one, and what it may be.
        """
        for key, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} has to be a finite number.")
        positive = (
            "epochs",
            "batch_size",
            "lr",
            *(("clip_grad",) if self.clip_grad is not None else ()),
            *(("size",) if self.size is not None else ()),
        )
        for key in positive:
            if not getattr(self, key) > 0:
                raise UserError(f"{key}={getattr(self, key)} has to be above 0.")
        if self.limit_train is not None and self.limit_train < 1:
            raise UserError(f"limit_train={self.limit_train} has to be above 0.")
        for key in ("label_smoothing", "drop_path", "holdout"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} has to be at least 0 and below 1.")
        for key in ("hflip", "random_erasing"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}={getattr(self, key)} is a chance: between 0 and 1.")
        if not 0 < self.scale <= 1:
            raise UserError(f"scale={self.scale} is a share of the picture: above 0 and at most 1.")
        for key in ("workers", "warmup_epochs", "weight_decay", "min_lr", "seed"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)} has to be at least 0.")
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} has to be below 2**63.")
        for key, instead in RESERVED.items():
            if key in self.model_args:
                raise UserError(f"model.{key} cannot be set: {instead}.")
        if any(size < 1 for size in self.sizes):
            raise UserError(f"sizes={list(self.sizes)} are picture sizes in pixels: above 0.")
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown precision {self.precision!r}: it is {' or '.join(PRECISIONS)}.")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0 and self.epochs > 1:
            raise UserError(f"warmup_epochs={self.warmup_epochs} leaves nothing of {self.epochs} epochs.")
        self.augmentation()

    def augmentation(self) -> Augmentation:
        """What training does to a picture."""
        keys = ("crop", "scale", "hflip", "color_jitter", "auto_augment", "random_erasing")
        return Augmentation(**{key: getattr(self, key) for key in keys})

    def to_yaml(self) -> str:
        """As config.yaml of a run folder holds it."""
        values = dataclasses.asdict(self) | {"sizes": list(self.sizes)}
        return yaml.safe_dump(values, sort_keys=False)

    def with_words(self, words: Iterable[str]) -> "TrainConfig":
        """A copy changed by words such as `epochs=3`, `sizes=[48,64]` or `model.softmax=false`.

        Raises:
            UserError: no such key ("did you mean"), or a value of another type.
        """
        changes: dict[str, Any] = {}
        model_args = dict(self.model_args)
        for word in words:
            key, equals, text = word.partition("=")
            if not equals or not key:
                raise UserError(f"{word!r} is not a key=value word.")
            if key.startswith(MODEL_PREFIX):
                model_args[key.removeprefix(MODEL_PREFIX)] = _plain(key, text)
            else:
                changes[key] = _typed(key, text)
        return dataclasses.replace(self, **changes, model_args=model_args)


_TYPES = typing.get_type_hints(TrainConfig)


def _plain(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"{key}={text} cannot be read: a number, true, false, a word or a [list] is expected."
        ) from None


def _typed(key: str, text: str) -> Any:
    """The value of a key from its text, of the type that the key has."""
    if key not in _TYPES or key == "model_args":
        raise UserError(f"unknown key {key!r}: {did_you_mean(key, set(_TYPES) - {'model_args'})}")
    wanted = _TYPES[key]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    kind = next(option for option in options if option is not type(None))
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        value = _plain(key, text)  # what is left is a tuple of whole numbers
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in numbers):
            raise ValueError
        return tuple(numbers)
    except ValueError:
        names = {int: "a whole number", float: "a number"}
        raise UserError(f"{key}={text} is not {names.get(kind, 'a list of whole numbers such as [48,64]')}.") from None
