"""A small network with mixing far from uniform, in each of its options."""

from pathlib import Path

import timm
import torch

from dynamixer.data import Preprocessing
from dynamixer.models.checkpoint import save_checkpoint
from helpers import sharpen

EXAMPLES = Path(__file__).parents[1] / "examples" / "pictures"
BAG = EXAMPLES / "bag.png"
NUMBERS = {"img_size": 16, "patch_size": 2, "depths": [1, 2], "dims": [8, 16], "segments": [2, 4], "num_classes": 3}

PICTURES = {"native": (16, 16), "larger": (20, 26), "smaller": (10, 12)}
OPTIONS = {
    "paper": {},
    "static": {"generator": "static"},
    "dense": {"generator": "dense"},
    "no softmax": {"softmax": False},
    "static, no softmax": {"generator": "static", "softmax": False},
    "added static": {"static": True},
    "shared": {"shared": True},
    "no row": {"row": False},
    "no column": {"column": False},
    "no channel": {"channel": False},
    "summed": {"reweight": False},
    "one segment": {"segments": 1},
    "overlap": {"stem": "overlap"},
    "resampled": {"windows": False},
    "enlarged": {"enlarge": True},
}


def small(**options):
    """8x8 tokens, down-sampled to 4x4: one block, then two."""
    return sharpen(timm.create_model("dynamixer_nano", **(NUMBERS | options))).eval()


def pictures(size=(16, 16), count=2, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def saved(folder, **options):
    """The same as a checkpoint, with classes a, b and c."""
    path = folder / "model.safetensors"
    made = small(**options)
    about = {"name": "dynamixer_nano", "args": NUMBERS | options, "classes": ("a", "b", "c"), "trained": {}}
    save_checkpoint(path, made.state_dict(), preprocessing=Preprocessing.of(made), **about)
    return path
