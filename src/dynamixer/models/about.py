"""What a model file says of itself, from a stranger perhaps: read as data, checked, and refused with a sentence.

Two forms: the JSON in the header of our safetensors files, and the `config.json` that timm writes beside a `model.safetensors`.
Nothing in either is imported, opened or called; a model is built only by a name that timm's registry knows and by options that
are numbers, words and lists of numbers.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from timm.layers import to_2tuple
from torch import Tensor

import dynamixer.models.dynamixer
from dynamixer.data.preprocess import Preprocessing
from dynamixer.errors import UserError

KEY, FORMAT = "dynamixer", 1
CONFIG = "config.json"
CONFIG_BYTES = 2**24
MOST = 10_000_000  # the largest number among a model's options
DEEPEST = 1000  # the largest among those that count layers
# Of timm's create_model and build_model_with_cfg: what leads to files, addresses, code or another kind of model.
FORBIDDEN = {
    "cache_dir", "checkpoint_path", "default_cfg", "device", "dtype", "exportable", "feature_cfg", "feature_filter_fn",
    "features_only", "kwargs_filter", "model_cls", "no_jit", "out_indices", "scriptable", "variant",
}  # fmt: skip
# Control characters, ends of lines and of paragraphs, changes of direction, and halves of characters.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load")


def from_header(text: str, path: Path) -> dict[str, Any]:
    """The model, model_args, classes, preprocessing and trained of one of our files.

    Raises:
        UserError: damaged, of another format, or with something in it that is not what it should be.
    """
    try:
        about = _json(text)
        if about["format"] != FORMAT:
            raise UserError(f"{path} has format {about['format']}; this version reads {FORMAT}: update dynamixer.")
        about["preprocessing"] = _preprocessing(about["preprocessing"], path)
        if not isinstance(about["trained"], dict):
            raise TypeError("trained is no object")
        if about["model_args"] is None or "num_classes" not in about["model_args"]:
            raise UserError(f"{path} has model arguments that are not a model's options: {about['model_args']}.")
        return _checked(
            {key: about[key] for key in ("model", "model_args", "classes", "preprocessing", "trained")}, path
        )
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header: {_short(error)}.") from None


def from_config(path: Path) -> dict[str, Any]:
    """The same from a `config.json` of timm's.

    Raises:
        UserError: as above, or a preprocessing that ours cannot do.
    """
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a description of a model.")
        config = _json(path.read_text(encoding="utf-8"))
        pretrained = config.get("pretrained_cfg", config)
        if sources := [key for key in SOURCES if pretrained.get(key)]:
            raise UserError(
                f"{path} names another place for the weights ({sources[0]}): only those beside it are read."
            )
        if pretrained.get("crop_mode", "center") != "center":
            raise UserError(f"{path} asks for crop_mode {pretrained['crop_mode']!r}, and only 'center' is known here.")
        _, height, width = pretrained["input_size"]
        if str(config["architecture"]).startswith("dynamixer_"):  # timm leaves the size before set_input_size there
            height, width = to_2tuple(config.get("model_args", {}).get("img_size", (height, width)))
        values = {key: pretrained[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in pretrained}
        preprocessing = _preprocessing({**values, "size": [height, width]}, path)
        count = config.get("num_classes", pretrained.get("num_classes"))
        if type(count) is not int or not 0 < count <= MOST:
            raise UserError(f"{path} is of a model with {count} classes, and one that classifies is needed.")
        labels = config.get("label_names", pretrained.get("label_names"))
        if isinstance(labels, dict):
            labels = [labels[str(i)] for i in range(count)]
        args = config.get("model_args", {}) | {"num_classes": count}
        about = {"model": config["architecture"], "model_args": args, "classes": labels or [*map(str, range(count))]}
        return _checked({**about, "preprocessing": preprocessing, "trained": {}}, path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a description of a model as timm writes it: {_short(error)}.") from None


def check_depths(about: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a model of ours with other numbers of layers than the file has weights for, before it is built.

    Raises:
        UserError: they differ.
    """
    depths = about["model_args"].get("depths")
    if depths is None or not str(about["model"]).startswith("dynamixer_"):
        return
    there = {found[0] for key in weights if (found := re.match(r"stages\.\d+\.blocks\.\d+\.", key))}
    if not isinstance(depths, list) or not all(type(n) is int for n in depths) or len(there) != sum(depths):
        raise UserError(
            f"{path} does not hold the weights of the {about['model']} it names: {len(there)} blocks, not {depths}."
        )


def _json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise TypeError("it is no JSON object")
    return value


def _preprocessing(values: dict[str, Any], path: Path) -> Preprocessing:
    try:
        return Preprocessing.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _checked(about: dict[str, Any], path: Path) -> dict[str, Any]:
    name, args, classes = about["model"], about["model_args"], about["classes"]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]{1,100}", name):
        raise UserError(f"{path} is of an unknown model {str(name)[:100]!r}: a name that timm knows is needed.")
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise UserError(f"{path} has model arguments that are not a model's options: {str(args)[:200]}.")
    ours = inspect.signature(dynamixer.models.dynamixer.DynaMixer).parameters
    for key, value in args.items():
        if (name.startswith("dynamixer_") and key not in ours) or not is_option(key, value):
            raise UserError(f"{path} has model arguments that are not a model's options: {key}={str(value)[:100]!r}.")
    if args.get("in_chans", 3) != 3:
        raise UserError(f"{path} is of a model for pictures of {args['in_chans']} channels: 3 are read.")
    if not args.get("global_pool", "avg"):
        raise UserError(f"{path} is of a model without global_pool, which has no answer for a whole picture.")
    if not isinstance(classes, list) or not all(isinstance(c, str) and is_class_name(c) for c in classes):
        raise UserError(f"{path} has no list of class names in its header: words of printable characters are needed.")
    if args.get("num_classes") != len(classes):
        raise UserError(f"{path} names {len(classes)} classes for a model of {args.get('num_classes')}.")
    return about


def is_class_name(name: str) -> bool:
    """Whether a file of weights may name a class so: up to 500 letters, of any script, none that steers a terminal."""
    return len(name) <= 500 and not STEERING.search(name)


def is_option(key: str, value: Any) -> bool:
    """Whether a file of weights may set this option of a model: it is harmless, and leads to no file, address or code."""
    return key not in FORBIDDEN and not key.startswith("pretrained") and _harmless(key, value)


def _harmless(key: str, value: Any) -> bool:
    """Numbers that are not absurd, words such as "avg", nothing, and lists of these."""
    if isinstance(value, list | tuple):
        return len(value) <= 100 and all(_harmless(key, one) for one in value)
    if isinstance(value, str):
        return bool(re.fullmatch(r"[A-Za-z0-9_]{0,40}", value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= (DEEPEST if key.startswith(("depth", "num_blocks", "layers")) else MOST)
    return value is None or isinstance(value, bool)


def _short(error: Exception) -> str:
    lines = repr(error).splitlines()
    return lines[0][:200]
