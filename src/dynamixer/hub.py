"""Share a trained model: a folder as timm and huggingface_hub read it, with a model card, and its upload."""

import contextlib
import json
import re
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import yaml

from dynamixer.errors import RunError, UserError, first_line
from dynamixer.files import is_leftover, write_text
from dynamixer.logs import log
from dynamixer.models.about import CONFIG, KEY
from dynamixer.models.checkpoint import MEMBERS, Checkpoint, load, save_checkpoint
from dynamixer.models.count import count
from dynamixer.models.download import WEIGHTS, called
from dynamixer.models.dynamixer import DynaMixer
from dynamixer.training.config import TrainConfig

CARD = "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
LICENSE = "apache-2.0"
CITATION = """
## Citation

```bibtex
@inproceedings{wang2022dynamixer,
  title     = {{DynaMixer}: A Vision {MLP} Architecture with Dynamic Mixing},
  author    = {Wang, Ziyu and Jiang, Wenhao and Zhu, Yiming and Yuan, Li and Song, Yibing and Liu, Wei},
  booktitle = {International Conference on Machine Learning},
  year      = {2022}
}
```
"""
ABOUT = """DynaMixer is an image backbone of linear
layers in which each row and column of tokens generates its own mixing matrix ([paper](https://arxiv.org/abs/2201.12083))."""


def write_folder(
    model: str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    license: str = LICENSE,
    recipe: dict[str, Any] | None = None,
    half: bool = False,
) -> Path:
    """Write model.safetensors, config.json and README.md (the model card) to a folder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it after `import dynamixer`, and so does `dynamixer.load`.

    Args:
        model: a run folder, a checkpoint or hf-hub:OWNER/NAME.
        out: the folder, new or one that this wrote; by default the model's name and "-hub" in the current folder.
        name: OWNER/NAME that it will have on the hub; by default the folder's name stands for NAME.
        license: identifier of the licence of the weights, as Hugging Face lists them.
        recipe: what the card says of the training; by default what the run folder's config.yaml says.
        half: store the weights in fp16, which takes half the bytes; they are computed with in fp32 all the same.

    Raises:
        UserError: no such model, or the folder holds something else.
        RunError: it cannot be written.
    """
    checkpoint = load(model)
    data = checkpoint.trained.get("data")
    if isinstance(data, str) and data.startswith(("/", "~", ".")):  # a path says much of a person's machine
        checkpoint = replace(checkpoint, trained={**checkpoint.trained, "data": Path(data).name})
    path = checkpoint.path.absolute()
    folder = Path(out) if out is not None else Path(f"{called(path)}-hub")
    if folder.exists() and not _is_ours(folder):
        raise UserError(f"{folder} holds something else: give --out the name of a new folder.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UserError(f"{license!r} is not the identifier of a licence, such as apache-2.0, cc-by-nc-4.0 or other.")
    weights = checkpoint.model.state_dict()
    save_checkpoint(
        folder / WEIGHTS,
        {key: value.half() if half and value.is_floating_point() else value for key, value in weights.items()},
        name=checkpoint.name,
        args=checkpoint.args,
        classes=checkpoint.classes,
        preprocessing=checkpoint.preprocessing,
        trained=checkpoint.trained,
    )
    write_text(folder / CONFIG, json.dumps(timm_config(checkpoint), indent=2) + "\n")
    if recipe is None:
        recipe = _recipe(path.parent / "config.yaml") if path.name in MEMBERS else {}
    write_text(folder / CARD, model_card(checkpoint, name or f"OWNER/{folder.name}", license=license, recipe=recipe))
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or one that `write_folder` wrote."""
    if not folder.is_dir():
        return False
    held = {path.name for path in folder.iterdir() if not is_leftover(path)}
    if not held <= {*FILES}:
        return False
    with (
        contextlib.suppress(OSError, safetensors.SafetensorError),
        safetensors.safe_open(folder / WEIGHTS, "np") as file,
    ):
        return KEY in (file.metadata() or {})
    return not held


def push(
    model: str | Path,
    repository: str,
    *,
    private: bool = False,
    license: str = LICENSE,
    message: str = "Add the model",
) -> str:
    """Upload a trained model to the Hugging Face hub, as `write_folder` writes it; the repository is made if need be.

    A card that is already there is kept. Who you are is known from `hf auth login` or HF_TOKEN.

    Args:
        model: a run folder or a checkpoint.
        repository: OWNER/NAME.
        private: whether a new repository is seen by its owner only.
        license: identifier of the licence of the weights.
        message: of the commit.

    Returns:
        The address of the model's page.

    Raises:
        UserError: no such model, a name that cannot be, or you may not write there.
        RunError: the upload failed.
    """
    import huggingface_hub  # noqa: PLC0415 - half a second
    from huggingface_hub import errors  # noqa: PLC0415

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository!r} is not a repository: it has to be OWNER/NAME.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(model, Path(temporary) / "model", name=repository, license=license)
        api = huggingface_hub.HfApi(library_name="dynamixer", library_version=version("dynamixer"))
        try:
            made = api.create_repo(repository, private=private, exist_ok=True)
            if private and not api.model_info(made.repo_id).private:
                raise UserError(
                    f"{repository} is there and public: make it private on the hub, or leave --private out."
                )
            kept = [CARD] if api.file_exists(made.repo_id, CARD) else []
            if kept:
                log(f"{repository} has a {CARD}: it is kept")
            api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message, ignore_patterns=kept)
        except UserError:
            raise
        except errors.HFValidationError as error:
            raise UserError(f"{repository} cannot be the name of a repository: {str(error).splitlines()[0]}") from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise UserError(
                    f"you may not write to {repository}: `hf auth login` with a token that may (the hub said {status})."
                ) from None
            raise RunError(f"{repository} could not be written: {str(error).strip().splitlines()[0]}") from None
        except (errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise UserError(f"{repository} was not written: {str(error).strip().splitlines()[0]}") from None
        except Exception as error:  # whatever the network does
            raise RunError(f"{repository} could not be written: {first_line(error)}") from None
    return str(made)


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What timm keeps in config.json: how to build the model, its classes and its preprocessing."""
    model: Any = checkpoint.model
    preprocessing, known = checkpoint.preprocessing, model.default_cfg
    classes = {"num_classes": len(checkpoint.classes)}
    return {
        "architecture": checkpoint.name,
        **classes,
        **({"num_features": model.num_features} if hasattr(model, "num_features") else {}),
        "label_names": list(checkpoint.classes),
        "model_args": checkpoint.args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [len(preprocessing.mean), *preprocessing.size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            **classes,
            **{key: known[key] for key in ("first_conv", "classifier", "paper_ids", "paper_name") if known.get(key)},
        },
    }


def model_card(checkpoint: Checkpoint, repository: str, *, license: str, recipe: dict[str, Any]) -> str:
    """The model card, Markdown: use, data, recipe, metrics, limits, licence and how to cite."""
    name = repository.rpartition("/")[2]
    source = f"hf-hub:{repository}" if "/" in repository else repository  # of the hub, or one that ships
    trained = checkpoint.trained
    held, test = _measured(trained, "held_out"), _measured(trained, "test")
    parameters, multiply_adds = count(checkpoint.model)
    height, width = checkpoint.preprocessing.size
    data = _word(trained.get("data", "unknown"))
    ours = isinstance(checkpoint.model, DynaMixer)
    head = {
        "license": license,
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", *(["dynamixer", "mlp"] if ours else [])],
        **({"model-index": [{"name": name, "results": _results(data, held, test)}]} if held or test else {}),
    }
    shown = ", ".join(checkpoint.classes[:20]) + (
        f" and {len(checkpoint.classes) - 20} more" if len(checkpoint.classes) > 20 else ""
    )
    metrics = "\n\n".join(
        f"On {kind} pictures of {data}:\n\n{_rows(figures)}"
        for kind, figures in (("test", test), ("held-out", held))
        if figures
    )
    if not metrics:
        metrics = (
            "No pictures were held out in training, so nothing was measured. Measure before use: `dynamixer eval`."
        )
    if held:
        metrics += (
            "\n\nThe held-out ones come from the data that the model was trained on, and the best epoch was chosen on them: "
            "other pictures may do worse."
        )
    epochs = (
        f", epoch {_word(trained['epoch'])} of {_word(trained.get('epochs', 'unknown'))}" if "epoch" in trained else ""
    )
    about = f" {ABOUT}" if ours else ""
    sizes = (
        f"Pictures of any size can be given; trained at {height}x{width}." if ours else f"Trained at {height}x{width}."
    )
    recipe_text = f"\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False).strip()}\n```\n" if recipe else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {name}

A {checkpoint.name} that tells {len(checkpoint.classes):,} classes apart: {_word(shown)}.{about}
{parameters:,} parameters, {multiply_adds:,} multiply-adds for a picture of {height}x{width} pixels.

## Use

    pip install .    # in a checkout of dynamixer, which is on no index yet
    dynamixer predict photo.jpg --model {source}

```python
import dynamixer  # registers the model with timm
import timm

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

{sizes}

## Training

Data: {data}. Seed {_word(trained.get("seed", "unknown"))}{epochs}, dynamixer {version("dynamixer")}.
{recipe_text}
## Metrics

{metrics}

## Limits

The model names one of its classes for every picture, also for one that shows none of them, and its probabilities say how sure it
is among these classes only. It has the biases of its data. It was not tested for decisions about people.

## Licence

{license}. That of the data may restrict the use further.
{CITATION if ours else ""}"""


def _measured(trained: dict[str, Any], kind: str) -> dict[str, Any]:
    """The figures of held-out or test pictures, if all are there."""
    held = trained.get(kind)
    known = isinstance(held, dict) and all(
        isinstance(held.get(key), int | float) for key in ("top1", "top5", "loss", "ece", "images")
    )
    return held if known and held else {}


def _rows(figures: dict[str, Any]) -> str:
    rows = [
        ("top-1", f"{figures['top1']:.2f} %"), ("top-5", f"{figures['top5']:.2f} %"), ("loss", f"{figures['loss']:.4f}"),
        ("calibration error", f"{figures['ece']:.2f} %"), ("pictures", f"{figures['images']:,}"),
    ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _results(data: str, held: dict[str, Any], test: dict[str, Any]) -> list[dict[str, Any]]:
    """The accuracy as Hugging Face lists it."""
    return [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": f"{data}, {kind}", "type": "custom"},
            "metrics": [{"type": "accuracy", "value": round(figures["top1"] / 100, 4)}],
        }
        for kind, figures in (("test", test), ("held out", held))
        if figures
    ]


def _recipe(path: Path) -> dict[str, Any]:
    """The keys of a run's config.yaml without what is only true on the machine of the run; none of a file that is no run's."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        TrainConfig().with_values(values if isinstance(values, dict) else {"": values})
    except (OSError, ValueError, yaml.YAMLError):  # a UserError is a ValueError
        return {}
    kept = {k: v for k, v in values.items() if k not in {"device", "workers", "data"}}
    return {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in kept.items()}


def _word(text: object) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(text).split()))
