"""Trained weights that come with the package, each in a folder as `dynamixer.hub.write_folder` makes it, its card included."""

import json
from pathlib import Path
from typing import Any

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


def forget_names(model: Any, name: str) -> None:
    """Take the names of the classes out of the configuration of a model that has not got the weights that ship."""
    cfg = model.pretrained_cfg
    if cfg.get("file") == str(shipped(name)):
        cfg.pop("label_names", None)


def names() -> list[str]:
    """The models whose weights ship."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model.safetensors"))
