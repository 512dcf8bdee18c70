"""One configuration from a recipe, a file and words, and where each of its values came from."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dynamixer.errors import UserError
from dynamixer.training.config import MODEL_PREFIX, TrainConfig, options_of, values_of
from dynamixer.training.recipes import recipe as find_recipe

DEFAULT = "default"


def resolve(
    recipe: str = "", *, file: Path | None = None, data: str | None = None, words: Iterable[str] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """The configuration, each of these over the one before it, and for each key the name of what set it last.

    Args:
        recipe: its name; "" for every key's default.
        file: YAML, such as config.yaml of a run folder.
        data: what --data says.
        words: key=value.

    Raises:
        UserError: an unknown recipe or key, a value of another type, or a combination that cannot work.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    start = find_recipe(recipe) if recipe else TrainConfig()
    for key, value in start.to_dict().items():
        values[key] = value
        origins[key] = DEFAULT if value == TrainConfig().to_dict()[key] else f"recipe {recipe}"
    origins.update({MODEL_PREFIX + name: f"recipe {recipe}" for name in start.model_args})

    def over(changes: dict[str, Any], origin: str) -> None:
        for key, value in changes.items():
            if key == "model_args":
                values["model_args"] = {**values["model_args"], **options_of(value)}
            elif str(key).startswith(MODEL_PREFIX):
                values["model_args"] = {**values["model_args"], key.removeprefix(MODEL_PREFIX): value}
            else:
                values[key] = value
            origins[key] = origin
            if key == "model_args":
                origins.update({MODEL_PREFIX + name: origin for name in options_of(value)})

    if file is not None:
        over(_from_file(file), f"file {file}")
    if data is not None:
        over({"data": data}, "--data")
    given = values_of(words)
    if data is not None and "data" in given:
        raise UserError(f"data is given twice: --data {data} and data={given['data']}.")
    over(given, "command line")
    config = TrainConfig().with_values(values)
    _refuse_idle(config, given)
    return config, origins


def _refuse_idle(config: TrainConfig, given: dict[str, Any]) -> None:
    """Refuse words of the command line that would change nothing."""
    if "scale" in given and config.crop != "rrc":
        raise UserError(
            f"scale is of random resized crops, and this run has crop={config.crop}: add crop=rrc, or no scale."
        )
    generator = config.model_args.get("generator", "dynamic")
    if "model.reduced" in given and generator != "dynamic":
        raise UserError(
            f"model.reduced is of generator=dynamic, and this run has {generator}: leave one of the two out."
        )


def _from_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {file} to read the configuration from.") from None
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
    ) as error:  # a ValueError for text that is not UTF-8 or a date that is none
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file} is not a configuration: `key: value` lines are expected.")
    return values


def show(config: TrainConfig, origins: dict[str, str]) -> str:
    """YAML that --config reads, with the origin of every value behind it."""
    lines = []
    for item in dataclasses.fields(config):
        value = yaml.safe_dump(config.to_dict()[item.name], default_flow_style=True, width=1000).removesuffix("...\n")
        text = f"{item.name}: {value.strip()}"
        origin = origins[item.name]
        if item.name == "model_args" and config.model_args:
            origin = ", ".join(f"{name}: {origins[MODEL_PREFIX + name]}" for name in config.model_args)
        lines.append(f"{text:50}  # {origin}")
    return "\n".join(lines)
