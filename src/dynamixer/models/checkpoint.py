"""Checkpoints: one safetensors file that holds the weights and, in its header, all that using them needs."""

import contextlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import dynamixer.models.dynamixer  # registers the models with timm
import dynamixer.models.peers  # and the peers of the study
from dynamixer.data.preprocess import Preprocessing
from dynamixer.errors import RunError, UserError, did_you_mean, first_line
from dynamixer.files import whole_file
from dynamixer.models.about import CONFIG, FORMAT, KEY, check_depths, from_config, from_header
from dynamixer.models.download import HUB, WEIGHTS, fetch
from dynamixer.models.shipped import names, shipped

MEMBERS = ("best.safetensors", "last.safetensors", WEIGHTS)  # of a run folder or the hub's, in the order of the search
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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

    def at(self, size: int | tuple[int, int] | None) -> Preprocessing:
        """The preprocessing for pictures of `size` pixels, or for the model's own.

        Raises:
            UserError: it is no size, or the model does not take such pictures.
        """
        found = self.preprocessing.at(size)
        if found.size != self.preprocessing.size:
            check_sizes(self.model.eval(), self.name, [found.size])
        return found


def check_sizes(model: nn.Module, name: str, sizes: Iterable[tuple[int, int]]) -> None:
    """Run one black picture of each size through the model.

    Raises:
        UserError: it does not take such pictures.
    """
    like = next(model.parameters())
    for size in sizes:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"{name} does not take pictures of {size[0]}x{size[1]}: {first_line(error)}") from None


def check_classifier(checkpoint: Checkpoint) -> None:
    """Refuse a model without a classifier.

    Raises:
        UserError: it has none.
    """
    if not checkpoint.classes:
        raise UserError(f"{checkpoint.path} has no classes: a model without a classifier has nothing to predict.")


def in_order(model: nn.Module, known: Sequence[str], wanted: Sequence[str]) -> bool:
    """Put the rows of a classifier that knows some classes into the order of `wanted`; False if those are other classes."""
    if list(known) == list(wanted):
        return True
    if sorted(known) != sorted(wanted):
        return False
    places, timms = [known.index(name) for name in wanted], cast(Any, model)
    found = timms.get_classifier()
    with torch.no_grad():
        for part in found if isinstance(found, tuple) else (found,):
            for parameter in part.parameters():
                parameter.copy_(parameter[places])
    return True


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
        # not save_file, which writes to a file of its own beside this one, that nobody would remove after a kill
        temporary.write_bytes(safetensors.torch.save(weights, metadata={KEY: json.dumps(about)}))


def find_checkpoint(model: str | Path) -> Path:
    """The file that MODEL means: a checkpoint, the best one of a run folder, one of the hub, or one that ships.

    Raises:
        UserError: there is none.
        RunError: it could not be downloaded.
    """
    if str(model).startswith(HUB):
        return fetch(str(model)) / WEIGHTS
    if not str(model):
        raise UserError("MODEL is an empty word: name a run folder, a checkpoint or a model whose weights ship.")
    path = Path(model)
    if path.is_dir():
        for member in MEMBERS:
            if (path / member).is_file():
                return path / member
        raise UserError(f"{path} is not a run folder: it has neither {' nor '.join(MEMBERS)}.")
    if path.suffix in (".onnx", ".xml", ".pt2"):
        raise UserError(
            f"{path} is an exported file, which its own runtime runs (docs/export.md shows how): MODEL is what it was made of."
        )
    if path.is_file():
        return path
    if (weights := shipped(str(model))) is not None:
        return weights
    ours = " and ".join(names())
    if timm.is_model(str(model)):
        raise UserError(
            f"weights ship for {ours}, none for {model}: train it (dynamixer train model={model}) and give the run folder."
        )
    near = did_you_mean(str(model), names())
    hint = f" ({near})" if near.startswith("did") else ""
    raise UserError(
        f"there is no {path}{hint}: MODEL is a run folder, a .safetensors checkpoint that dynamixer wrote, or {ours}."
    )


def load(model: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a trained model in evaluation mode: a run folder, a checkpoint, a folder as timm writes it, hf-hub:OWNER/NAME, or the
    name of a model whose weights ship.

    The file may come from a stranger: it is read as data, and nothing in it is run.

    Raises:
        UserError: there is none, or the file is not one of ours, damaged, or of another model than it says.
        RunError: it could not be downloaded.
    """
    path = find_checkpoint(model)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:
        raise UserError(f"{path} is not a whole safetensors file: {(str(error).splitlines() or ['?'])[0]}") from None
    if KEY in metadata:
        about = from_header(metadata[KEY], path)
    elif (path.parent / CONFIG).is_file() and path.name == WEIGHTS:
        about = from_config(path.parent / CONFIG)
    else:
        raise UserError(f"{path} was not written by dynamixer: its header does not say which model it is of.")
    _check_weights(weights, path)
    check_depths(about, weights, path)
    built: Any = _built(about, weights, path)
    built.pretrained_cfg = built.default_cfg = _cfg_of(about, built)
    return Checkpoint(
        model=built.eval().to(device),
        name=about["model"],
        args=about["model_args"],
        classes=tuple(about["classes"]),
        preprocessing=about["preprocessing"],
        trained=about["trained"],
        path=path,
    )


def _cfg_of(about: dict[str, Any], model: Any) -> dict[str, Any]:
    """What timm asks a model for: its own, with the preprocessing and the classes that the file names."""
    preprocessing: Preprocessing = about["preprocessing"]
    values = preprocessing.to_dict()
    shape = (len(preprocessing.mean), *values.pop("size"))
    classes = {"num_classes": len(about["classes"]), "label_names": tuple(about["classes"])}
    return {**model.default_cfg, "file": "", **values, "input_size": shape, **classes}


def _check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    for key, value in weights.items():
        if value.dtype not in FLOATS and (value.is_floating_point() or value.is_complex()):
            raise UserError(
                f"{path} holds weights of type {value.dtype} ({key}), and fp32, fp16, bf16 or fp64 are read."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite ({key}).")


def _built(about: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The model that a file describes, with the file's weights."""

    def fill(model: nn.Module, *, assign: bool) -> None:
        try:
            expected = model.state_dict()
            for key in expected.keys() & weights.keys():
                if expected[key].is_floating_point() != weights[key].is_floating_point():
                    raise RuntimeError(f"\n{key} is of type {weights[key].dtype}")
            model.load_state_dict(weights, assign=assign)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:4]]
            raise UserError(
                f"{path} does not hold the weights of the {about['model']} it names: {' '.join(lines)[:800]}"
            ) from None

    def create(**more: Any) -> nn.Module:
        try:
            return create_model(about["model"], **about["model_args"], **more)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    # Without memory first: a description may ask for any amount. A few of timm's models cannot be made so.
    ours, empty = about["model"].startswith("dynamixer_"), None
    with contextlib.suppress(*(() if ours else (Exception,))), torch.device("meta"):
        empty = create()
    if empty is not None:
        fill(empty, assign=True)
    built = create()
    fill(built, assign=False)
    return built
