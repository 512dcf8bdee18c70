"""Trained weights that come with the package, each in a folder as `dynamixer.hub.write_folder` makes it, its card included."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parents[1] / "weights"
DEFAULT = "dynamixer_tiny"  # the model of predict, explain and serve where none is named


def shipped(name: str) -> Path | None:
    """The safetensors file with the weights that ship for a model name, or None."""
    path = FOLDER / name / "model.safetensors"
    return path if name and path.is_file() else None


def pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm has to know of the weights that ship for a model name: their file and the names of the classes; else nothing."""
    weights = shipped(name)
    if weights is None:
        return {}
    config = json.loads((weights.parent / "config.json").read_text(encoding="utf-8"))
    return {"file": str(weights), "label_names": tuple(config["label_names"])}


def names() -> list[str]:
    """The models whose weights ship."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model.safetensors"))


def at_size(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of the size that the model's configuration names, made native to the model's own size."""
    wanted, size = model.img_size, tuple(model.pretrained_cfg["input_size"][-2:])
    if size == wanted:
        return weights
    made = deepcopy(model)
    made.set_input_size(size)
    # timm fits the stem to other channels and the classifier to other classes, after this.
    others = {key: weights[key] for key in weights if key.startswith(("head.", "patch_embed."))}
    made.load_state_dict(made.state_dict() | {key: weights[key] for key in weights.keys() - others.keys()})
    made.set_input_size(wanted)
    native: dict[str, Tensor] = made.state_dict()
    return native | others
