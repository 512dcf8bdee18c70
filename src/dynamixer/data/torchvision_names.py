"""torchvision's data sets by name, behind one signature."""

import os
from pathlib import Path
from typing import Any

from torchvision import datasets

from dynamixer.errors import RunError
from dynamixer.logs import log

# Those with a train and a test part that hold pixels: files are our own decoder's business, as a folder or Parquet.
NAMES = {name.lower(): name for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "STL10")}


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
    which: dict[str, Any] = {"split": split} if name == "STL10" else {"train": split == "train"}
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
    labels = [int(label) for label in (data.labels if name == "STL10" else data.targets)]
    return data, [str(c) for c in data.classes], labels
