"""An optimiser's state as named tensors and plain numbers, and back: what safetensors and JSON can hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamixer.errors import RunError

PLAIN = (bool, int, float, type(None))


def take(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name (optimizer.NUMBER OF THE PARAMETER.ENTRY) and everything else; single numbers are plain.

    Raises:
        RunError: an entry is neither a tensor nor a number.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    scalars: dict[str, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    if more := set(saved) - {"state", "param_groups"}:
        raise RunError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(more))}, which checkpoints cannot hold: choose another opt."
        )
    for number, entries in saved["state"].items():
        for key, value in entries.items():
            name = f"optimizer.{number}.{key}"
            if isinstance(value, Tensor) and value.ndim:
                tensors[name] = value
                shapes[name] = {"shape": list(value.shape), "dtype": str(value.dtype)}
            elif (plain := _number(value)) is not None:
                scalars[name] = plain
            else:
                raise RunError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__}, which checkpoints cannot hold: "
                    "choose another opt."
                )
    groups = [{k: n for k, v in group.items() if (n := _number(v))} for group in saved["param_groups"]]
    return tensors, {"shapes": shapes, "scalars": scalars, "groups": groups}


def places(optimizer: Optimizer, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors to read the saved ones into, sharded like the parameters that they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made = {}
    for name, spec in about["shapes"].items():
        parameter, dtype = parameters[int(name.split(".")[1])], _dtype(spec["dtype"])
        like = list(parameter.shape) == spec["shape"]
        made[name] = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(spec["shape"], dtype=dtype)
    return made


def put(optimizer: Optimizer, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Bring an optimiser of the same configuration to the saved state."""
    state: dict[int, dict[str, Any]] = {}

    def keep(name: str, value: Any) -> None:
        _, number, key = name.split(".", 2)
        state.setdefault(int(number), {})[key] = value

    for name in about["shapes"]:
        keep(name, tensors[name])
    for name, spec in about["scalars"].items():
        keep(name, _back(spec))
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, about["groups"], strict=True):
        group.update({key: _back(spec) for key, spec in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _number(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Tensor) and not value.ndim:
        return {"value": value.item(), "dtype": str(value.dtype)}
    return {"value": value} if isinstance(value, PLAIN) else None


def _back(spec: Mapping[str, Any]) -> Any:
    return torch.tensor(spec["value"], dtype=_dtype(spec["dtype"])) if "dtype" in spec else spec["value"]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype
