"""One function for each run that we stand for; its docstring holds command, hardware, time and accuracy."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from dynamixer.errors import UserError, did_you_mean
from dynamixer.models.variants import VARIANTS
from dynamixer.training.config import TrainConfig


def fashion_nano() -> TrainConfig:
    """The demo: dynamixer_nano on the embedded Fashion-MNIST subset, minutes on two CPU cores.

    `dynamixer train fashion_nano`. Patches of 4 pixels quarter the work, and mixing without the softmax learns faster than
    the paper's in so few epochs (docs/log.md). Time and accuracy of a measured run: benchmarks/results/demo.json.
    """
    return TrainConfig(
        data="fashion-mnist-mini",
        model="dynamixer_nano",
        model_args={"patch_size": 4, "softmax": False},
        size=28,
        epochs=8,
        batch_size=64,
        lr=3e-3,
        crop="none",
    )


def cifar10_nano() -> TrainConfig:
    """dynamixer_nano on CIFAR-10: `dynamixer train cifar10_nano --data cifar10/train.parquet`."""
    return TrainConfig(
        data="CIFAR10",
        model="dynamixer_nano",
        epochs=30,
        batch_size=128,
        lr=2e-3,
        warmup_epochs=2,
        crop="pad",
        drop_path=0.05,
    )


def imagenette_tiny() -> TrainConfig:
    """dynamixer_tiny on photographs of 128 pixels: `dynamixer train imagenette_tiny --data imagenette128`."""
    return TrainConfig(
        data="imagenette128",
        model="dynamixer_tiny",
        epochs=40,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=3,
        crop="rrc",
        drop_path=0.1,
    )


def study_cifar10() -> TrainConfig:
    """The study's rows (docs/evidence.md) on CIFAR-10: `dynamixer train study_cifar10 --data cifar10/train.parquet`.

    A few epochs, the same for every row; `dynamixer reproduce` runs them all.
    """
    return TrainConfig(
        data="CIFAR10",
        model="dynamixer_nano",
        epochs=2,
        batch_size=64,
        lr=2e-3,
        warmup_epochs=0.5,
        crop="pad",
        precision="bf16",
        kernel="auto",
    )


def study_imagenette() -> TrainConfig:
    """The study's rows on photographs: `dynamixer train study_imagenette --data imagenette128/train.parquet`.

    See study_cifar10.
    """
    return TrainConfig(
        data="imagenette128",
        model="dynamixer_tiny",
        size=112,
        epochs=4,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=1,
        crop="rrc",
        precision="bf16",
        kernel="auto",
    )


def imagenet_s() -> TrainConfig:
    """dynamixer_s on ImageNet-1K as the paper trains it (82.7 % there): `torchrun ... train imagenet_s --data D`, 8 GPUs.

    `torchrun --nproc-per-node 8 -m dynamixer train imagenet_s --data D --out RUN`. Values of the paper's section 4.2 and of the
    published command line; 300 epochs of cosine, then 10 at its end. Not said there and ours: bf16, and timm's smallest crop of
    0.08. The accuracy is the paper's: we have not run it.
    """
    return _imagenet("dynamixer_s", batch_size=8 * 256, drop_path=0.1)


def imagenet_m() -> TrainConfig:
    """dynamixer_m on ImageNet-1K as the paper trains it (83.7 % there): `torchrun ... train imagenet_m --data D`, 8 GPUs.

    See imagenet_s.
    """
    return _imagenet("dynamixer_m", batch_size=8 * 128, drop_path=0.1)


def imagenet_l() -> TrainConfig:
    """dynamixer_l on ImageNet-1K as the paper trains it (84.3 % there): `torchrun ... train imagenet_l --data D`, 8 GPUs.

    See imagenet_s. The learning rate is the paper's; the published command line has 2e-3.
    """
    return replace(_imagenet("dynamixer_l", batch_size=8 * 64, drop_path=0.3), lr=1e-3)


def _imagenet(model: str, *, batch_size: int, drop_path: float) -> TrainConfig:
    return TrainConfig(
        data="imagenet",
        model=model,
        epochs=310,
        cooldown_epochs=10,
        batch_size=batch_size,
        lr=2e-3,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=20,
        weight_decay=0.05,
        clip_grad=None,
        label_smoothing=0.1,
        drop_path=drop_path,
        mixup=0.8,
        cutmix=1.0,
        ema=0.99996,
        crop="rrc",
        scale=0.08,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        precision="bf16",
        seed=42,
        workers=8,
        checkpoint_every=500,
    )


def finetune() -> TrainConfig:
    """From trained weights to other classes or another size: `dynamixer train finetune weights=RUN --data D size=160`.

    Layer-wise learning-rate decay keeps what the early layers know; the classifier is fresh where the classes are others.
    """
    return TrainConfig(
        model="",
        epochs=20,
        batch_size=64,
        lr=5e-4,
        warmup_epochs=2,
        layer_decay=0.75,
        crop="rrc",
        scale=0.5,
        drop_path=0.1,
    )


ABLATIONS: dict[str, dict[str, Any]] = {
    "one_segment": {"segments": 1},
    "width_96": {"width": 96},
    "width_48": {"width": 48},
    "width_24": {"width": 24},
    "static": {"generator": "static"},
    "dense": {"generator": "dense"},
    "reduced_1": {"reduced": 1},
    "reduced_4": {"reduced": 4},
    "reduced_8": {"reduced": 8},
    "no_row": {"row": False},
    "no_column": {"column": False},
    "no_channel": {"channel": False},
    "no_reweighting": {"reweight": False},
    "shared": {"shared": True},
}


def ablate(row: str, base: str = "imagenet_s") -> TrainConfig:
    """A row of the paper's ablation tables, on any recipe: `dynamixer train ablate:static:cifar10_nano --data D`.

    Args:
        row: a key of `ABLATIONS`.
        base: the recipe that is changed.
    """
    if row not in ABLATIONS:
        raise UserError(f"unknown ablation {row!r}: {did_you_mean(row, ABLATIONS)}")
    if base not in RECIPES or base == "finetune":
        raise UserError(f"unknown recipe {base!r} to ablate: {did_you_mean(base, set(RECIPES) - {'finetune'})}")
    config = RECIPES[base]()
    args = dict(ABLATIONS[row])
    if (width := args.pop("width", None)) is not None:
        dims = VARIANTS[config.model].dims
        if any(dim % width for dim in dims):
            raise UserError(f"segments of {width} channels do not fit {config.model}, whose widths are {list(dims)}.")
        args["segments"] = [dim // width for dim in dims]
    return replace(config, model_args=config.model_args | args)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    f.__name__: f
    for f in (
        fashion_nano,
        cifar10_nano,
        imagenette_tiny,
        study_cifar10,
        study_imagenette,
        imagenet_s,
        imagenet_m,
        imagenet_l,
        finetune,
    )
}


def recipe(name: str) -> TrainConfig:
    """A recipe by name; `ablate:ROW` or `ablate:ROW:RECIPE` for the ablations.

    Raises:
        UserError: there is none.
    """
    kind, *rest = name.split(":")
    if kind == "ablate" and 1 <= len(rest) <= 2:
        return ablate(*rest)
    if kind == "ablate":
        raise UserError(
            f"{name!r} names no ablation: write ablate:ROW or ablate:ROW:RECIPE, such as ablate:static:cifar10_nano."
        )
    if name in {item.name for item in fields(TrainConfig)}:
        raise UserError(f"{name!r} is a key and needs a value: write {name}=...")
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: {did_you_mean(name, [*RECIPES, 'ablate:ROW'])}")
    return RECIPES[name]()
