"""One function for each run that we stand for; its docstring holds command, hardware, time and accuracy."""

from collections.abc import Callable

from dynamixer.training.config import TrainConfig


def fashion_nano() -> TrainConfig:
    """The demo: dynamixer_nano on the embedded Fashion-MNIST subset, minutes on two CPU cores.

    `dynamixer train fashion_nano`; time and accuracy of the last measured run are in benchmarks/results/demo.json.
    """
    return TrainConfig(
        data="fashion-mnist-mini",
        model="dynamixer_nano",
        epochs=10,
        batch_size=64,
        lr=2e-3,
        crop="pad",
        label_smoothing=0.1,
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
