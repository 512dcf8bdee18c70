"""Picture sizes as timm keeps them beside a model: the one that it was built for, and the one that weights are of."""

from contextlib import suppress
from copy import deepcopy
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor


def record_size(model: Any, size: tuple[int, int]) -> None:
    """Tell timm of another native size, (height, width): it writes that into what it saves."""
    with suppress(ImportError):  # older versions of timm keep none
        from timm.models._input import update_model_input_size  # noqa: PLC0415

        update_model_input_size(model, size)


def at_size(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of the size that they were saved with, made native to the model's own size."""
    # timm fits the stem to other channels and the classifier to other classes, after this.
    others = {key: weights[key] for key in weights if key.startswith(("head.", "patch_embed."))}
    inner = {key: weights[key] for key in weights.keys() - others.keys()}
    own = model.state_dict()
    if all(inner[key].shape == own[key].shape for key in inner.keys() & own.keys()):
        return weights
    wanted = model.img_size
    saved = getattr(model, "pretrained_model_args", {}).get("img_size")  # as timm saves it
    made = deepcopy(model)
    made.set_input_size(to_2tuple(saved or model.pretrained_cfg["input_size"][-2:]))
    made.load_state_dict(made.state_dict() | inner)
    made.set_input_size(wanted)
    native: dict[str, Tensor] = made.state_dict()
    return native | others
