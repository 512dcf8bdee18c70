"""Checkpoints: one safetensors file that holds the weights and, in its header, all that using them needs."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import dynamixer.models.dynamixer  # registers the models with timm
from dynamixer.data.preprocess import Preprocessing
from dynamixer.errors import RunError, UserError, did_you_mean
from dynamixer.files import whole_file

KEY, FORMAT = "dynamixer", 1
MEMBERS = ("best.safetensors", "last.safetensors")  # of a run folder, in the order in which they are looked for


@dataclass(frozen=True)
class Checkpoint:
    """A model with its weights, ready for use."""

    model: nn.Module
    name: str
    args: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trained: dict[str, Any]  # how it came about: epoch, data, accuracy on held-out pictures
    path: Path


def create_model(name: str, **args: Any) -> nn.Module:
    """Any model that timm knows, ours included.

    Raises:
        UserError: an unknown name, or arguments that the model does not take.
    """
    name = str(name)
    if not timm.is_model(name):
        ours = timm.list_models(module="dynamixer")
        near = did_you_mean(name, ours)
        raise UserError(
            f"unknown model {name!r}: {near if near.startswith('did') else did_you_mean(name, timm.list_models())}"
        )
    try:
        model: nn.Module = timm.create_model(name, **args)
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "unexpected keyword" not in str(error):
            raise UserError(f"{name} cannot be built with {args}: {error}") from None
        wrong = str(error).split("'")[1]
        known = inspect.signature(dynamixer.models.dynamixer.DynaMixer).parameters
        hint = f" {did_you_mean(wrong, known)}" if name.startswith("dynamixer_") else ""
        raise UserError(f"{name} has no option {wrong!r};{hint}".rstrip(";")) from None
    return model


def save_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    name: str,
    args: dict[str, Any],
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    trained: dict[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        RunError: a weight is not finite, or the file cannot be written.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"{path} was not written: the weight {key} is not finite.")
    about = {
        "format": FORMAT,
        "dynamixer": version("dynamixer"),
        "model": name,
        "model_args": args,
        "classes": classes,
        "preprocessing": preprocessing.to_dict(),
        "trained": trained,
    }
    with whole_file(path) as temporary:
        try:
            safetensors.torch.save_file(weights, temporary, metadata={KEY: json.dumps(about)})
        except safetensors.SafetensorError as error:  # its way to pass on what the system said
            raise RunError(f"{path} could not be written: {error}.") from None


def find_checkpoint(model: str | Path) -> Path:
    """The file that MODEL means: a checkpoint, or the best one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(model)
    if path.is_dir():
        for member in MEMBERS:
            if (path / member).is_file():
                return path / member
        raise UserError(f"{path} is not a run folder: it has neither {' nor '.join(MEMBERS)}.")
    if path.is_file():
        return path
    if timm.is_model(str(model)):
        raise UserError(
            f"no weights ship for {model} yet: train it (dynamixer train model={model}) and give the run folder."
        )
    raise UserError(f"there is no {path}: MODEL is a run folder or a .safetensors checkpoint that dynamixer wrote.")


def load(model: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a trained model by run folder or checkpoint, in evaluation mode.

    Raises:
        UserError: there is none, or the file is not one of ours, damaged, or of another model than it says.
    """
    path = find_checkpoint(model)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {str(error).splitlines()[0]}") from None
    about = _about(metadata, path)
    built = create_model(about["model"], **about["model_args"])
    try:
        built.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"{path} does not hold the weights of the {about['model']} it names: {' '.join(lines)}"
        ) from None
    if not all(math.isfinite(value.sum()) for value in weights.values() if value.is_floating_point()):
        raise UserError(f"{path} holds weights that are not finite.")
    return Checkpoint(
        model=built.eval().to(device),
        name=about["model"],
        args=about["model_args"],
        classes=tuple(about["classes"]),
        preprocessing=about["preprocessing"],
        trained=about["trained"],
        path=path,
    )


def _about(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    if KEY not in metadata:
        raise UserError(f"{path} was not written by dynamixer: its header does not say which model it is of.")
    forbidden = {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
    }
    try:
        about: dict[str, Any] = json.loads(metadata[KEY])
        if about["format"] != FORMAT:
            raise UserError(f"{path} has format {about['format']}; this version reads {FORMAT}: update dynamixer.")
        about["preprocessing"] = Preprocessing.from_dict(about["preprocessing"])
        args, classes = about["model_args"], about["classes"]
        if not isinstance(args, dict) or forbidden.intersection(args):
            raise UserError(f"{path} has model arguments that are not a model's options: {args}.")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
            raise UserError(f"{path} has no list of class names in its header.")
        if args.get("num_classes") != len(classes):
            raise UserError(f"{path} names {len(classes)} classes for a model of {args.get('num_classes')}.")
        return {key: about[key] for key in ("model", "model_args", "classes", "preprocessing", "trained")}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a damaged header: {error!r}.") from None
