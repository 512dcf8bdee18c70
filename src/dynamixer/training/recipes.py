"""One function for each run that we stand for; its docstring holds command, hardware, time and accuracy."""

from collections.abc import Callable

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


RECIPES: dict[str, Callable[[], TrainConfig]] = {f.__name__: f for f in (fashion_nano, cifar10_nano, imagenette_tiny)}
