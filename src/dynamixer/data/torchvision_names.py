"""torchvision's data sets by name, behind one signature."""

import os
from pathlib import Path
from typing import Any

from torchvision import datasets

from dynamixer.errors import RunError
from dynamixer.logs import log

# Those with a train and a test part, labels for all pictures, and a download of their own.
_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS")
_BY_SPLIT = ("SVHN", "STL10", "GTSRB", "Food101", "Flowers102", "DTD", "FGVCAircraft", "StanfordCars", "OxfordIIITPet")
NAMES = {name.lower(): name for name in (*_BY_FLAG, *_BY_SPLIT)}


def cache_folder() -> Path:
    """Where downloads are kept: $DYNAMIXER_CACHE, or `dynamixer` in the user's cache folder."""
    if "DYNAMIXER_CACHE" in os.environ:
        return Path(os.environ["DYNAMIXER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dynamixer"


def load(name: str, split: str) -> tuple[Any, list[str], list[int]]:
    """A data set's split ("train" or "test"), its class names and its labels; downloaded where it is not in the cache.

    Raises:
        RunError: it could not be downloaded.
    """
    name = NAMES[name.lower()]
    made = getattr(datasets, name)
    root = cache_folder() / "torchvision"
    which: dict[str, Any] = {"train": split == "train"} if name in _BY_FLAG else {"split": split}
    if name == "OxfordIIITPet" and split == "train":
        which["split"] = "trainval"
    try:
        data = made(root, download=False, **which)
    except RuntimeError:  # torchvision's way to say that it is not there
        log(f"downloading {name} to {root}")
        try:
            data = made(root, download=True, **which)
        except Exception as error:  # whatever the network, the archive or the disk does
            raise RunError(
                f"{name} could not be downloaded to {root}: {error}. A folder or a Parquet file can be given instead."
            ) from None
    labels = next(getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key))
    labels = [int(label) for label in labels]
    classes = getattr(data, "classes", None) or [str(i) for i in range(max(labels) + 1)]
    return data, [str(c) for c in classes], labels
