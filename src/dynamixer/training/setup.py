"""What a run needs before its first step: data, a model, an optimiser and its schedule, all checked."""

import inspect
import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from torch import nn

from dynamixer.data.loading import (
    Batch,
    EpochKeys,
    RunKeys,
    TrainingPictures,
    batches,
    digest_of,
    holdout,
    readable,
    training_loader,
)
from dynamixer.data.preprocess import Preprocessing
from dynamixer.data.sources import Source, Splits, open_data
from dynamixer.errors import UserError
from dynamixer.files import is_leftover, reason
from dynamixer.logs import log
from dynamixer.models.about import is_class_name, is_option
from dynamixer.models.checkpoint import create_model, in_order, load
from dynamixer.training.config import TrainConfig
from dynamixer.training.world import World


@dataclass
class Data:
    """The pictures of a run: sources, and which of their numbers are trained on and held out."""

    train: Source
    train_indices: np.ndarray
    val: Source | None
    val_indices: np.ndarray | None
    holdout: float  # the share of each class that was asked to be held out where there is no val split
    unread: tuple[str, ...] = ()  # sentences about held-out pictures, with on_bad_image=skip

    @cached_property
    def train_split(self) -> dict[str, Any]:
        """What tells these pictures again, and the share of them that is held out (`data.loading.held_out_of`)."""
        share = self.holdout if self.val is self.train else 0.0
        return {"digest": digest_of((self.train, np.arange(len(self.train)))), "holdout": share}

    def fingerprint(self) -> str:
        """A digest of classes, labels, the pictures' names and who is held out: what a resumed run has to find again."""
        return digest_of((self.train, self.train_indices), (self.val, self.val_indices))


def prepare_data(config: TrainConfig) -> Data:
    """Open the data and hold pictures out where there is no val split."""
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
    if val is None and config.patience:
        raise UserError(f"patience={config.patience} needs held-out pictures to be patient about: set holdout.")
    unread: list[str] = []
    if val is not None:
        val_indices = np.arange(len(val)) if val_indices is None else val_indices
        if config.on_bad_image == "skip":
            val_indices, unread = readable(val, val_indices)
            for sentence in unread:
                log(f"held out without it: {sentence}")
            if not len(val_indices):
                raise UserError(f"none of the pictures held out of {config.data} can be read.")
    return Data(splits.train, indices, val, val_indices, config.holdout, tuple(unread))


@dataclass
class Network:
    """A model ready to train, and what a checkpoint says of it."""

    model: nn.Module
    name: str
    args: dict[str, Any]
    preprocessing: Preprocessing
    sizes: list[tuple[int, int]]  # that training draws from


def build_network(config: TrainConfig, classes: Sequence[str]) -> Network:
    """The model, fresh or with the weights that `config.weights` names, for these classes and the picture size."""
    if not config.model and config.weights is None:
        raise UserError(
            "the recipe finetune starts from trained weights: give weights=RUN, a run folder or checkpoint."
        )
    if config.weights is None:
        args: dict[str, Any] = {"num_classes": len(classes), **config.model_args}
        if config.size is not None:
            args["img_size"] = config.size
        if config.drop_path:
            args["drop_path_rate"] = config.drop_path
        for key, value in args.items():
            if not is_option(key, value):
                raise UserError(
                    f"model.{key}={value} cannot be set: the weights could not be read again. Options are numbers, words, "
                    "true, false and lists of these, and none that lead to files or to another kind of model."
                )
        model, name, preprocessing = _build(config, args), config.model, None
    else:
        model, name, args, preprocessing = _from_weights(config, config.weights, classes)
    preprocessing = preprocessing or Preprocessing.of(model)
    if config.size is not None:
        preprocessing = preprocessing.at(config.size)
    if config.grad_checkpointing:
        network: Any = model
        try:
            network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(f"{name} has no gradient checkpointing: leave grad_checkpointing out.") from None
    if config.freeze is not None:
        _freeze(model, name, config.freeze)
    return Network(model, name, args, preprocessing, [(s, s) for s in config.sizes] or [preprocessing.size])


def _freeze(model: nn.Module, name: str, pattern: str) -> None:
    """Leave the parameters whose names fit the pattern out of training."""
    every = dict(model.named_parameters())
    frozen = [key for key in every if fnmatchcase(key, pattern)]
    if not frozen:
        raise UserError(
            f"freeze={pattern} fits no parameter of {name}: their names are like {list(every)[len(every) // 2]}."
        )
    if len(frozen) == len(every):
        raise UserError(f"freeze={pattern} fits every parameter of {name}, which leaves nothing to train.")
    for key in frozen:
        every[key].requires_grad_(False)
    log(f"frozen: {sum(every[key].numel() for key in frozen):,} parameters in {len(frozen)} tensors that fit {pattern}")


def _build(config: TrainConfig, args: dict[str, Any]) -> nn.Module:
    try:
        return create_model(config.model, **args)
    except UserError as error:
        if "'img_size'" not in str(error):
            raise
    del args["img_size"]  # convolutional networks take any size without being told
    return create_model(config.model, **args)


def _from_weights(
    config: TrainConfig, weights: str, classes: Sequence[str]
) -> tuple[nn.Module, str, dict[str, Any], Preprocessing]:
    checkpoint = load(weights)
    if config.model not in ("", checkpoint.name):
        raise UserError(
            f"weights={weights} are of {checkpoint.name}, and model={config.model} is another: leave model empty (model=) "
            "or use the recipe finetune."
        )
    if config.model_args:
        raise UserError(
            f"weights={weights} bring their options along: leave model.{next(iter(config.model_args))} out."
        )
    args = checkpoint.args | {"num_classes": len(classes)}
    args.pop("drop_path_rate", None)  # the recipe's to say
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    model: Any = create_model(checkpoint.name, **(args | {"num_classes": len(checkpoint.classes)}))
    model.load_state_dict(checkpoint.model.state_dict())
    read = {"mean": checkpoint.preprocessing.mean, "std": checkpoint.preprocessing.std}
    model.pretrained_cfg = (
        getattr(model, "pretrained_cfg", None) or {}
    ) | read  # what a teacher is told of the pictures
    log(
        f"weights: {checkpoint.path}, {checkpoint.name} for {len(checkpoint.classes)} classes at {checkpoint.preprocessing.size}"
    )
    if not in_order(model, checkpoint.classes, classes):
        log(f"the classifier is made anew: the {len(classes)} classes are others than those of the weights")
        model.reset_classifier(len(classes))
    other_size = config.size is not None and checkpoint.preprocessing.size != (config.size, config.size)
    if other_size and hasattr(model, "set_input_size"):
        model.set_input_size((config.size, config.size))
        args["img_size"] = config.size
        log(f"the mixing is resampled for pictures of {config.size} px")
    return model, checkpoint.name, args, checkpoint.preprocessing


def check_classes(classes: Sequence[str]) -> None:
    """Refuse names that a file of weights could not hold, before any training.

    Raises:
        UserError: which one.
    """
    if odd := next((name for name in classes if not is_class_name(name)), None):
        raise UserError(
            f"a class is named {odd[:100]!r}, which cannot be written down: up to 500 letters without control characters, "
            "in UTF-8, are needed. Give it another name."
        )


def check_same(about: dict[str, Any], data: str, teacher: str | None, config: TrainConfig, run: Path) -> None:
    """Refuse to go on from a checkpoint of other pictures or another teacher; `about` is what it says of itself."""
    if about["data"] != data:
        raise UserError(
            f"{config.data} does not hold the pictures that {run} was begun with: give another --out to train on what is "
            "there now."
        )
    if about.get("teacher", teacher) != teacher:
        raise UserError(
            f"the teacher {config.teacher} is not the one that {run} was begun with: bring that one back, or give another --out."
        )


class Course:
    """The order of a run: how many steps an epoch has, which pictures each takes, at which learning rate."""

    def __init__(self, config: TrainConfig, data: Data, network: Network, world: World):
        self.config, self.indices, self.sizes = config, data.train_indices, network.sizes
        self.steps = len(self.keys(0))
        self.slices = config.accumulate * world.size
        self.mine = range(world.rank, self.slices, world.size)
        part = min(config.batch_size, len(self.indices)) / self.slices
        if config.batch_size % self.slices or part < 1:
            raise UserError(
                f"batch_size={config.batch_size} and {len(self.indices)} pictures cannot be cut into {self.slices} equal parts "
                f"({world.size} processes, accumulate={config.accumulate})."
            )
        if (config.mixup or config.cutmix) and int(part) % 2:
            raise UserError(f"mixup and cutmix pair pictures: a part of the batch has to be even, not {int(part)}.")
        self.pictures = TrainingPictures(
            data.train,
            network.preprocessing,
            config.augmentation(),
            config.seed,
            sizes=network.sizes,
            skip_bad=config.on_bad_image == "skip",
        )

    def keys(self, epoch: int) -> EpochKeys:
        """The batches of an epoch."""
        c = self.config
        return EpochKeys(
            self.indices, seed=c.seed, epoch=epoch, batch_size=c.batch_size, sizes=self.sizes, repeats=c.repeats
        )

    def batches(self, first: int) -> Generator[Batch]:
        """The parts of this process of every step of the run from step `first` on."""
        c = self.config
        keys = RunKeys(self.keys, steps=self.steps, epochs=c.epochs, first=first, slices=self.slices, mine=self.mine)
        if len(keys):
            yield from batches(training_loader(self.pictures, keys, c.workers))

    def optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        """Timm's optimiser and cosine schedule, whose learning rate is a function of the step alone."""
        c = self.config
        options: dict[str, Any] = {"lr": c.lr, "weight_decay": c.weight_decay, "layer_decay": c.layer_decay}
        try:
            kind = get_optimizer_info(c.opt.rpartition("_")[2]).opt_class  # it may be a lookahead_...
            if callable(kind) and "fused" in inspect.signature(kind).parameters:
                options["fused"] = True  # one pass over memory, where torch's default takes several
            optimizer = create_optimizer_v2(model, c.opt, **options)
        except (ValueError, AssertionError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(f"opt={c.opt} is not an optimiser of timm that works here: {error}") from None
        if getattr(optimizer, "is_second_order", False):
            raise UserError(f"opt={c.opt} needs second derivatives, which are not computed here: choose another one.")
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=c.epochs - c.cooldown_epochs,
            cooldown_epochs=c.cooldown_epochs,
            warmup_epochs=c.warmup,
            warmup_lr=c.lr / 100 if c.warmup_lr is None else c.warmup_lr,
            min_lr=c.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        return optimizer, scheduler


def saved_config(run: Path) -> TrainConfig | None:
    """The configuration that a run folder was made with, or None where there is none."""
    import yaml  # noqa: PLC0415

    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
    ) as error:  # a ValueError for text that is not UTF-8 or a date that is none
        raise UserError(f"{run}/config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{run}/config.yaml is not a configuration: keys with values are expected.")
    return TrainConfig().with_values(values)


def check_folder(run: Path, config: TrainConfig, resume: str) -> None:
    """Refuse a run folder that is in use for something else.

    Raises:
        UserError: it is not empty and not a run of this configuration, or is one and resuming is not wanted.
    """
    above = next(path for path in (run, *run.absolute().parents) if os.path.lexists(path))
    if above.is_dir() or above != run:
        try:
            tempfile.TemporaryDirectory(dir=above).cleanup()
        except OSError as error:
            raise UserError(f"no run folder can be made at {run}: {reason(error)}; give another --out.") from None
    if run.is_symlink() and not run.exists():
        raise UserError(f"{run} is a link that leads nowhere: give another --out, or remove it.")
    if not run.exists() or (run.is_dir() and all(is_leftover(path) for path in run.iterdir())):
        return
    before = saved_config(run) if run.is_dir() else None
    if before is None:
        raise UserError(f"{run} exists and is neither a run nor an empty folder: give another --out, or remove it.")
    if resume == "never":
        raise UserError(f"{run} holds a run, and --resume never forbids to go on with it: give another --out.")
    if differing := config.differences(before):
        raise UserError(f"{run} holds a run of another configuration: {', '.join(differing)}. Give another --out.")
